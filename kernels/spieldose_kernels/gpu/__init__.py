"""Sparse products and the base's weights on the GPU, written in Triton."""

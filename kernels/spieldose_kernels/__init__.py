"""Sparse deltas on a 4-bit base: their file, their products, the layer and the base itself."""

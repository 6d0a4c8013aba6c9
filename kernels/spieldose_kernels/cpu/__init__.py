"""Sparse products on the CPU, compiled by numba."""

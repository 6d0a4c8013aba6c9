"""Deltas that mend what rounding to 4 bits took from a base."""

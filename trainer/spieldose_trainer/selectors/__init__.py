"""Which weights are in the support, and when that changes."""

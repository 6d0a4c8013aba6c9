"""Serve one 4-bit base model with a different sparse adapter for every request."""

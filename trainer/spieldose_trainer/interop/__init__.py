"""Other projects' sparse adapters, full fine-tunes, and what a delta file holds."""

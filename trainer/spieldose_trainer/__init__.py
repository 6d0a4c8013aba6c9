"""Fine-tune a sparse set of a model's weights and write it as a small delta file."""

"""Fine-tune a sparse set of a 4-bit model's weights and write it as a small delta file."""

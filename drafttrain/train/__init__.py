"""Training: one accelerate loop for everything that has a loss, and its checkpoints."""

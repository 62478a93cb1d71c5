"""Tensors only: types, trees, sampling distributions, rng, losses, layers. No files, no network, no model zoo."""

"""Tensors only: types, trees, sampling laws, chance, losses, layers. No files, no network, no model zoo."""

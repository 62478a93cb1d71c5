"""Choosing before measuring: forecasts, the study over a grid of drafters, the tuner of a run's trees."""

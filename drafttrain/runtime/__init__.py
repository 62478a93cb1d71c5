"""Decoding: the round, policies, statistics, offline replay, and the Python inference API."""

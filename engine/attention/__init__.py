"""Attention over blocks of keys and values, between the dense slices."""

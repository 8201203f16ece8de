"""Attention that reads beyond its own past, or under another mask."""

"""Variants whose layers share keys and values, or weights."""

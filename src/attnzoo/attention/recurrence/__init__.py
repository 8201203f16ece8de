"""Recurrences with gates and delta rules: what a state forgets, overwrites and hands on."""

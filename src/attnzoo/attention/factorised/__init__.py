"""Projections of few parameters: shared between heads, in factors, of a chosen rank."""

"""Attention with normalisers that no fused library kernel has."""

from attnzoo_kernels.attention.api import NORMALISERS, attention

__all__ = ["NORMALISERS", "attention"]

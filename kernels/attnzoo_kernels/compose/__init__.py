"""Attention whose scores and weights are mixed across heads: `compose` with `Mix`."""

from attnzoo_kernels.compose.api import MOST_HEADS, MOST_RANK, compose
from attnzoo_kernels.compose.reference import Mix

__all__ = ["MOST_HEADS", "MOST_RANK", "Mix", "compose"]

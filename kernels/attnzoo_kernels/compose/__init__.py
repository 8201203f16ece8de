"""Attention whose scores and weights are mixed across heads: `compose` with `Mix`."""

from attnzoo_kernels.compose.api import compose
from attnzoo_kernels.compose.reference import Mix

__all__ = ["Mix", "compose"]

"""Sparse softmax of rows with a learnable alpha: `entmax`."""

from attnzoo_kernels.entmax.api import entmax

__all__ = ["entmax"]

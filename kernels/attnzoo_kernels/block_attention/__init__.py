"""Attention of query blocks to listed key blocks: `block_attention`."""

from attnzoo_kernels.block_attention.api import block_attention

__all__ = ["block_attention"]

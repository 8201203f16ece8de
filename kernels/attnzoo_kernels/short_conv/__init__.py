"""Causal depthwise convolution of a few taps, cut at documents: `short_conv`."""

from attnzoo_kernels.short_conv.api import MAX_TAPS, short_conv

__all__ = ["MAX_TAPS", "short_conv"]

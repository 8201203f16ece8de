"""Functional fronts: `attention` for scores over keys, `scan` for recurrent states."""

from attnzoo.ops.attention import Keys, attention
from attnzoo.ops.scan import scan

__all__ = ["Keys", "attention", "scan"]

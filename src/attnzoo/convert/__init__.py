"""Checkpoints of one variant as a start for another: see `convert` and ``METHODS``."""

from attnzoo.convert.methods import METHODS
from attnzoo.convert.model import Report, convert, convert_best
from attnzoo.convert.recency import recency_heads
from attnzoo.convert.target import Method, Target

__all__ = ["METHODS", "Method", "Report", "Target", "convert", "convert_best", "recency_heads"]

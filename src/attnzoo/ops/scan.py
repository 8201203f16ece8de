"""State recurrences; see `attnzoo_kernels.scan` for the algebra and the implementations."""

from __future__ import annotations

from attnzoo_kernels.scan import scan

__all__ = ["scan"]

"""The state space recurrence whose decay differs in every channel and state entry: `selective_scan`."""

from attnzoo_kernels.selective_scan.api import selective_scan

__all__ = ["selective_scan"]

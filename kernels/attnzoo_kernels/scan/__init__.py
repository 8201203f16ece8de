"""Linear, gated, delta-rule and rank-1 recurrences: `scan`, and what it costs: `scan_flops`."""

from attnzoo_kernels.scan.api import LARGEST, scan
from attnzoo_kernels.scan.flops import ScanFlops, scan_flops

__all__ = ["LARGEST", "ScanFlops", "scan", "scan_flops"]

"""RMSNorm of rows times an activated gate: `norm_gate`."""

from attnzoo_kernels.norm_gate.api import norm_gate

__all__ = ["norm_gate"]

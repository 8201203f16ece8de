"""RMSNorm of rows times an activated gate: `norm_gate`."""

from attnzoo_kernels.norm_gate.api import MAX_WIDTH, norm_gate

__all__ = ["MAX_WIDTH", "norm_gate"]

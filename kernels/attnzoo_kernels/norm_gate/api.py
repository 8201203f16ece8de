"""The front of the gated norm."""

from __future__ import annotations

import math

from torch import Tensor

from attnzoo_kernels import launch
from attnzoo_kernels.checks import check_choice, check_floats, check_shape
from attnzoo_kernels.norm_gate.reference import ACTIVATIONS, norm_gate_reference

MAX_WIDTH = 1024


def norm_gate(
    o: Tensor,
    gain: Tensor,
    gate: Tensor | None = None,
    *,
    activation: str = "silu",
    eps: float = 1e-6,
    impl: str = "auto",
) -> Tensor:
    """o / sqrt(mean(o^2) + eps) * gain * act(gate), the mean over the last axis.

    RMSNorm (arXiv 1910.07467) with the output gate of gated linear attention (arXiv 2312.06635).

    Args:
        o: (...,d), d up to 1024; read where it lies if its last axis is contiguous (of more than three
            leading axes, the first ones may be copied together).
        gain: (d,). Its dtype may differ from o's.
        gate: o's shape, or None for the norm alone. Its dtype may differ from o's.
        activation: "silu" or "sigmoid", of the gate.
        eps: added to the mean square.
        impl: "triton", "reference" or "auto".

    Returns:
        o's shape, in its dtype: all of it computed in fp32 (fp64 if an operand is) and rounded once. First
        derivatives by o, gain and gate.

    Raises:
        ValueError: a shape, dtype, device or value is wrong.
    """
    _validate(o, gain, gate, activation, eps)
    if launch.choose("norm_gate", impl, o, gain, gate) == "reference":
        return norm_gate_reference(o, gain, gate, activation, eps)
    from attnzoo_kernels.norm_gate.ops import norm_gate_forward, worst

    launch.self_check("norm_gate", o.device, worst)
    rows, gates = _four_axes(o), None if gate is None else _four_axes(gate)
    return norm_gate_forward(rows, gain, gates, activation == "silu", float(eps)).view(o.shape)


def _four_axes(x: Tensor) -> Tensor:
    return x.flatten(0, -4) if x.dim() > 4 else x[(None,) * (4 - x.dim())]


def _validate(o: Tensor, gain: Tensor, gate: Tensor | None, activation: str, eps: float) -> None:
    if o.dim() < 1:
        raise ValueError(f"o: needs shape (..., d), got {tuple(o.shape)}; add the axis to norm over")
    check_shape("o", o, tuple(o.shape))
    check_floats({"o": o, "gain": gain, "gate": gate}, "o")
    d = o.shape[-1]
    if d > MAX_WIDTH:
        raise ValueError(f"o: needs a last axis of at most {MAX_WIDTH}, got {d}; norm heads, not the model")
    check_shape("gain", gain, (d,))
    check_shape("gate", gate, tuple(o.shape))
    check_choice("activation", activation, tuple(ACTIVATIONS))
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps: needs a finite number of at least 0, got {eps}; 1e-6 is usual")

"""The gated norm in plain torch: its definition, exact in fp64."""

from __future__ import annotations

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"silu": F.silu, "sigmoid": torch.sigmoid}


def norm_gate_reference(o: Tensor, gain: Tensor, gate: Tensor | None, activation: str, eps: float) -> Tensor:
    """As the public function."""
    given = (x.dtype for x in (o, gain, gate) if x is not None)
    dtype = reduce(torch.promote_types, given, torch.float32)
    wide = o.to(dtype)
    y = wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * gain.to(dtype)
    return (y if gate is None else y * ACTIVATIONS[activation](gate.to(dtype))).to(o.dtype)

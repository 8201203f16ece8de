"""Softmax over the keys that a query sees, as one autograd node on a CPU.

Torch fills by a mask at six times the cost of an addition, twice in each direction. Scores that are bounded
by a small table, then exponentiated, come out as exact zeros, and so do their gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def softmax(s: Tensor, visible: Tensor) -> Tensor:
    """Softmax over visible keys in at least fp32, exactly 0 elsewhere; a row that sees nothing is 0.

    Args:
        s: ``(B, H, T, S)``; nothing follows from what is hidden, be it infinite or no number.
        visible: ``(B or 1, H or 1, T, S)`` bool.
    """
    s = s if s.dtype == torch.float64 else s.float()
    if not s.is_cpu or torch.compiler.is_compiling():
        return plain_softmax(s, visible)
    return _Softmax.apply(s, visible)


def plain_softmax(s: Tensor, visible: Tensor) -> Tensor:
    """`softmax` in torch's own operations."""
    p = s.masked_fill(~visible, float("-inf")).softmax(-1)
    return p.masked_fill(~visible, 0.0)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, s: Tensor, visible: Tensor) -> Tensor:
        least = torch.finfo(s.dtype).min
        bound = s.new_full(visible.shape, float("inf")).masked_fill_(~visible, least)
        p = s.minimum(bound)
        p = torch.softmax(p, -1)
        if not bool(p.sum().isfinite()):  # a score is no number, maybe a hidden one
            p = plain_softmax(s, visible)
        elif not bool(visible.any(-1).all()):
            p.mul_(visible)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        (p,) = ctx.saved_tensors
        return torch.ops.aten._softmax_backward_data(grad, p, -1, p.dtype), None

"""Scores whose heads have unit length together, per pair of tokens, as one autograd node.

The graph of tanh, norm, quotient and product keeps and passes over (H, T, S) tensors some twenty times, and
torch's norm along an axis that is not the last is its slowest reduction.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def unit_heads(s: Tensor, gain: Tensor, eps: float, squash: bool) -> Tensor:
    """``gain_h a_h / (|a| + eps)`` with a = tanh(s) or s, the norm over axis 1.

    Args:
        s: ``(B, H, T, S)``. gain: ``(H,)``, in the dtype of s.

    Returns:
        The shape of ``s``. No second derivatives.
    """
    if not s.is_cpu or torch.compiler.is_compiling():
        return plain_unit_heads(s, gain, eps, squash)
    return _UnitHeads.apply(s, gain, eps, squash)


def plain_unit_heads(s: Tensor, gain: Tensor, eps: float, squash: bool) -> Tensor:
    """`unit_heads` in torch's own operations."""
    a = s.tanh() if squash else s
    return a / (torch.linalg.vector_norm(a, dim=1, keepdim=True) + eps) * gain[:, None, None]


class _UnitHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, s: Tensor, gain: Tensor, eps: float, squash: bool) -> Tensor:
        a = s.tanh() if squash else s
        out = a * a
        norm = out.sum(1, keepdim=True).sqrt_()
        inverse = (norm + eps).reciprocal_()
        ctx.squash = squash
        ctx.save_for_backward(a, gain, norm, inverse)
        return torch.mul(a, inverse, out=out).mul_(gain[:, None, None])

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, gain, norm, inverse = ctx.saved_tensors
        wide = gain[:, None, None]
        product = (grad * a).mul_(inverse)
        grad_gain = product.sum((0, 2, 3)) if ctx.needs_input_grad[1] else None
        pull = product.mul_(wide).sum(1, keepdim=True)
        pull /= -norm.clamp(min=torch.finfo(norm.dtype).tiny)
        grad_a = torch.mul(grad, wide, out=product).addcmul_(a, pull).mul_(inverse)
        if ctx.squash:
            torch.ops.aten.tanh_backward.grad_input(grad_a, a, grad_input=grad_a)
        return grad_a, grad_gain, None, None

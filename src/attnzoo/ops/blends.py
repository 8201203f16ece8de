"""Several blends of two vectors per token as one autograd node: gradients meet in place, not in new ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def blends(x: Tensor, other: Tensor, mu: Tensor) -> tuple[Tensor, ...]:
    """``x + (other - x) mu_i`` for every row of mu. No second derivatives.

    Args:
        x, other: ``(B, T, D)``. mu: ``(n, D)``, in the dtype of x.
    """
    if not x.is_cpu or torch.compiler.is_compiling():
        return plain_blends(x, other, mu)
    return _Blends.apply(x, other, mu)


def plain_blends(x: Tensor, other: Tensor, mu: Tensor) -> tuple[Tensor, ...]:
    """`blends` in torch's own operations."""
    step = other - x
    return tuple(torch.addcmul(x, step, row) for row in mu)


class _Blends(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, other: Tensor, mu: Tensor) -> tuple[Tensor, ...]:
        step = other - x
        ctx.save_for_backward(step, mu)
        return tuple(torch.addcmul(x, step, row) for row in mu)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        step, mu = ctx.saved_tensors
        with torch.autocast(step.device.type, enabled=False):
            total, grad_step = grads[0].clone(), grads[0] * mu[0]
            for grad, row in zip(grads[1:], mu[1:], strict=True):
                total += grad
                grad_step.addcmul_(grad, row)
            # a product of matrices sums over rows faster than sum() does
            ones = step.new_ones(1, step.shape[0] * step.shape[1])
            product = torch.empty_like(step)
            rows = [ones @ torch.mul(grad, step, out=product).flatten(0, 1) for grad in grads]
            return total.sub_(grad_step), grad_step, torch.cat(rows)

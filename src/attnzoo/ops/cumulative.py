"""Log-sum-exps over all tokens so far, on a CPU as one autograd node that steps from token to token.

Torch's kernel takes each channel for itself, in the direction in which memory is not contiguous, and its
gradient takes four more such passes; a step for all rows and channels is a tenth of that.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable


def logcumsumexp(z: Tensor) -> Tensor:
    """``log sum_(j <= t) exp z_j`` over axis 1 of ``(B, T, ...)``; -inf as long as every z is. No second
    derivatives."""
    if not z.is_cpu or torch.compiler.is_compiling():
        return plain_logcumsumexp(z)
    return _LogCumSumExp.apply(z)


def plain_logcumsumexp(z: Tensor) -> Tensor:
    """`logcumsumexp` in torch's own operations."""
    return z.logcumsumexp(1)


class _LogCumSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, z: Tensor) -> Tensor:
        out = torch.empty_like(z)
        values, sums = z.unbind(1), out.unbind(1)
        if values:
            sums[0].copy_(values[0])
        for t in range(1, len(values)):
            torch.logaddexp(values[t], sums[t - 1], out=sums[t])
        ctx.save_for_backward(z, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        z, out = ctx.saved_tensors
        # what a token's own value is of its sum, then what the sum before is of the next; exp2 is torch's
        # fastest, and where there is nothing yet, -inf - -inf, nothing follows
        own = z.sub(out).mul_(1 / math.log(2)).exp2_().nan_to_num_(0.0)
        share = out[:, :-1].sub(out[:, 1:]).mul_(1 / math.log(2)).exp2_().nan_to_num_(0.0)
        total = grad.clone(memory_format=torch.contiguous_format)
        steps, shares = total.unbind(1), share.unbind(1)
        for t in reversed(range(len(shares))):
            steps[t].addcmul_(shares[t], steps[t + 1])
        return total.mul_(own)

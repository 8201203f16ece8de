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


def softmax_steps(s: Tensor) -> tuple[Tensor, Tensor]:
    """A softmax over all tokens so far as a recurrence: log decays of what it holds, and new tokens' weights.

    Args:
        s: ``(B, T, ...)`` finite scores; l their log-sum-exps so far.

    Returns:
        ``l_(t-1) - l_t``, 0 at the first token, and ``exp(s_t - l_t)``. No second derivatives.
    """
    if not s.is_cpu or torch.compiler.is_compiling():
        return plain_softmax_steps(s)
    return _SoftmaxSteps.apply(s)


def plain_softmax_steps(s: Tensor) -> tuple[Tensor, Tensor]:
    """`softmax_steps` in torch's own operations."""
    total = s.logcumsumexp(1)
    before = torch.cat([total[:, :1], total[:, :-1]], dim=1)
    return (before - total).clamp(max=0), (s - total).exp()


def _sums(z: Tensor) -> Tensor:
    out = torch.empty_like(z)
    values, sums = z.unbind(1), out.unbind(1)
    if values:
        sums[0].copy_(values[0])
    for t in range(1, len(values)):
        torch.logaddexp(values[t], sums[t - 1], out=sums[t])
    return out


def _flow_back(grad: Tensor, shares: Tensor) -> Tensor:
    """``grad_t += shares_t grad_(t+1)`` from the last token on, in place."""
    steps = grad.unbind(1)
    for t, share in reversed(list(enumerate(shares.unbind(1)))):
        steps[t].addcmul_(share, steps[t + 1])
    return grad


class _SoftmaxSteps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, s: Tensor) -> tuple[Tensor, Tensor]:
        total = _sums(s)
        decay = torch.zeros_like(total)
        torch.sub(total[:, :-1], total[:, 1:], out=decay[:, 1:]).clamp_(max=0)
        weights = torch.sub(s, total, out=total).mul_(1 / math.log(2)).exp2_()
        ctx.save_for_backward(decay, weights)
        return decay, weights

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_decay: Tensor, grad_weights: Tensor) -> Tensor:
        decay, weights = ctx.saved_tensors
        total = torch.mul(grad_weights, weights).neg_()
        total[:, 1:] -= grad_decay[:, 1:]
        total[:, :-1] += grad_decay[:, 1:]
        shares = decay[:, 1:].mul(1 / math.log(2)).exp2_()
        return _flow_back(total, shares).add_(grad_weights).mul_(weights)


class _LogCumSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, z: Tensor) -> Tensor:
        out = _sums(z)
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
        return _flow_back(total, share).mul_(own)

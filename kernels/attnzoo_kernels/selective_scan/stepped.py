"""The selective scan on a CPU: one autograd node that steps through spans small enough for the caches.

States lie as (tokens, rows, N, channels): decays broadcast along channels, a step is contiguous, and what
sums over N or over channels is a product of matrices. A span's decays and states are made, used and
forgotten; the backward pass makes them again from the state at the span's start, the only one kept.
`reference` is the plain twin.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

SPAN = 16  # tokens per kept state
ROOM = 1 << 15  # numbers in a step of as many rows as go together


def selective_scan_stepped(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `attnzoo_kernels.selective_scan`; all operands in one dtype."""
    starts = None
    if segments is not None:
        before = torch.cat([torch.zeros_like(segments[:, :1]), segments[:, :-1]], dim=1)
        starts = segments != before
    return _Stepped.apply(delta * u, delta, A, B, C, state, starts)


class _Stepped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        state: Tensor,
        starts: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        rates, last, y = A.t().contiguous(), state.mT.contiguous(), torch.empty_like(x)
        x, delta, B, C, out = (z.transpose(0, 1) for z in (x, delta, B, C, y))  # tokens first
        starts = None if starts is None else starts.transpose(0, 1)
        spans = _spans(len(x))
        kept = last.new_empty(len(spans), *last.shape) if any(ctx.needs_input_grad) else None
        for rows in _groups(last):
            h = last[rows]
            for i, span in enumerate(spans):
                if kept is not None:
                    kept[i, rows] = h
                _, hs = _states(x, delta, rates, B, starts, h, span, rows)
                out[span, rows] = (C[span, rows, None] @ hs[1:]).squeeze(2)
                h = hs[-1]
            last[rows] = h
        ctx.save_for_backward(x, delta, rates, B, C, starts, kept)
        return y, last.mT.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        x, delta, rates, B, C, starts, kept = ctx.saved_tensors
        grad_x, grad_delta, grad_B, grad_C = grads = [torch.empty_like(z) for z in (x, delta, B, C)]
        grad, grad_rates, carry = grad.transpose(0, 1), torch.zeros_like(rates), grad_last.mT.contiguous()
        spans = _spans(len(x))
        for rows in _groups(carry):
            for i, span in reversed(list(enumerate(spans))):
                at = span, rows
                a, hs = _states(x, delta, rates, B, starts, kept[i, rows], *at)
                dy, here = grad[at].unsqueeze(2), delta[at].unsqueeze(2)
                grad_C[at] = (dy @ hs[1:].mT).squeeze(2)
                g = torch.mul(dy, C[at][..., None], out=a.new_empty(a.shape))
                steps, decays = g.unbind(), a.unbind()
                steps[-1].add_(carry[rows])
                for t in reversed(range(len(steps) - 1)):
                    steps[t].addcmul_(decays[t + 1], steps[t + 1])
                torch.mul(decays[0], steps[0], out=carry[rows])
                grad_B[at] = (x[at].unsqueeze(2) @ g.mT).squeeze(2)
                grad_x[at] = (B[at].unsqueeze(2) @ g).squeeze(2)
                e = a.mul_(g).mul_(hs[:-1])  # of the exponents delta A
                grad_rates += torch.mul(e, here, out=g).sum((0, 1))
                grad_delta[at] = e.mul_(rates).sum(2)
        grad_x, grad_delta, grad_B, grad_C = (z.transpose(0, 1) for z in grads)
        return grad_x, grad_delta, grad_rates.t(), grad_B, grad_C, carry.mT, None


def _states(
    x: Tensor,
    delta: Tensor,
    rates: Tensor,
    B: Tensor,
    starts: Tensor | None,
    h: Tensor,
    span: slice,
    rows: slice,
) -> tuple[Tensor, Tensor]:
    """Decays ``(t, rows, N, channels)`` and states ``(1 + t, rows, N, channels)`` of a span, ``h`` first."""
    step = delta[span, rows, None]
    # a product by itself would lie as its operands do, rows first; torch's exp2 takes a quarter of its exp
    a = step.new_empty(*step.shape[:2], *rates.shape)
    torch.mul(step, rates / math.log(2), out=a).exp2_()
    if starts is not None:
        a.masked_fill_(starts[span, rows, None, None], 0.0)
    hs = a.new_empty(1 + len(a), *a.shape[1:])
    hs[0] = h
    torch.mul(x[span, rows, None], B[span, rows, :, None], out=hs[1:])
    states = hs.unbind()
    for t, decay in enumerate(a.unbind()):
        states[t + 1].addcmul_(decay, states[t])
    return a, hs


def _spans(T: int) -> list[slice]:
    return [slice(first, min(first + SPAN, T)) for first in range(0, T, SPAN)]


def _groups(state: Tensor) -> list[slice]:
    """Rows whose states fit `ROOM`, at least one."""
    some = max(1, ROOM // max(1, state[0].numel())) if len(state) else 1
    return [slice(first, first + some) for first in range(0, len(state), some)]

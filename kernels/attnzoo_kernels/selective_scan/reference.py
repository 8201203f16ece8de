"""The selective scan in torch: chunks side by side, their boundary states one after the other.

A decay per channel and entry has no matmul form. A chunk of ``CHUNK`` tokens is stepped through for all
chunks, rows and channels at once, from a zero state; then the states at chunk starts follow, each from the
one before, and add their decayed part. So a span of n chunks takes CHUNK + n steps, not CHUNK n. Decays are
multiplied, never divided by: nothing overflows, and a decay of 0 (the start of a document) is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.utils.checkpoint import checkpoint

CHUNK = 8
SPAN = 128  # tokens whose states are in memory at a time


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See `attnzoo_kernels.selective_scan`; all operands in one dtype."""
    T, starts = u.shape[1], None
    if segments is not None:
        before = torch.cat([torch.zeros_like(segments[:, :1]), segments[:, :-1]], dim=1)
        starts = segments != before
    ys = []
    for first in range(0, T, SPAN):
        here = slice(first, first + SPAN)
        cut = None if starts is None else starts[:, here]
        part = (u[:, here], delta[:, here], A, B[:, here], C[:, here], state, cut)
        if T > SPAN and torch.is_grad_enabled():
            y, state = checkpoint(_span, *part, use_reentrant=False, preserve_rng_state=False)
        else:
            y, state = _span(*part)
        ys.append(y)
    return ys[0] if len(ys) == 1 else torch.cat(ys, dim=1), state


def _span(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    decay = (delta[..., None] * A).exp()  # (batch, t, channels, N)
    if starts is not None:
        decay = decay.masked_fill(starts[..., None, None], 0.0)
    h = _Recurrence.apply(decay, (delta * u)[..., None] * B[:, :, None], state)
    return (h @ C[..., None]).squeeze(-1), h[:, -1]


class _Recurrence(torch.autograd.Function):
    """``h_t = a_t h_(t-1) + b_t`` over axis 1; its gradient is the same recurrence backwards."""

    @staticmethod
    def forward(ctx: FunctionCtx, a: Tensor, b: Tensor, state: Tensor) -> Tensor:
        h = _run(a, b, state)
        ctx.save_for_backward(a, h, state)
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, h, state = ctx.saved_tensors
        later = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], dim=1)
        grad_b = _run(later.flip(1), grad.flip(1), torch.zeros_like(state)).flip(1)
        before = torch.cat([state[:, None], h[:, :-1]], dim=1)
        return grad_b * before, grad_b, grad_b[:, 0] * a[:, 0]


def _run(a: Tensor, b: Tensor, state: Tensor) -> Tensor:
    T = a.shape[1]
    if T == 1:
        return torch.addcmul(b, a, state[:, None])
    length = min(CHUNK, T)
    count = -(-T // length)
    if count * length > T:  # what follows the end changes nothing before it
        more = (0, 0, 0, 0, 0, count * length - T)
        a, b = torch.nn.functional.pad(a, more), torch.nn.functional.pad(b, more)
    a, h = a.unflatten(1, (count, length)), b.unflatten(1, (count, length)).clone()
    whole = a.clone()  # decay since the chunk's start; torch's cumprod takes several times as long
    for t in range(1, length):
        h[:, :, t].addcmul_(a[:, :, t], h[:, :, t - 1])
        whole[:, :, t] *= whole[:, :, t - 1]
    incoming = [state]
    for n in range(count - 1):
        incoming.append(torch.addcmul(h[:, n, -1], whole[:, n, -1], incoming[-1]))
    return h.addcmul_(whole, torch.stack(incoming, dim=1)[:, :, None]).flatten(1, 2)[:, :T]

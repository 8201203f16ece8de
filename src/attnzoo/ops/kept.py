"""Softmax attention that keeps its weights for the backward pass: training on short sequences on a CPU.

Torch's CPU kernel works in small tiles and computes scores and weights again in the backward pass; on
sequences so short that the weights take no more room than q, k, v and the output do, keeping them is faster.
Scores, softmax and the gradients of weights are fp32 (fp64 for fp64 values); weights are kept in the values'
dtype.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

ROWS = 128  # query rows per product: later keys than the last of them are skipped


def fits(q: Tensor, v: Tensor) -> bool:
    """Whether causal weights (T / 2 per query and head) take no more room than q, k, v and the output."""
    return q.shape[2] <= 4 * (q.shape[3] + v.shape[3])


def kept_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor | None = None) -> Tensor:
    """Causal attention of a sequence with itself.

    Args:
        q: ``(B, H, T, d)``; k: ``(B, G, T, d)``; v: ``(B, G, T, d_v)``; consecutive query heads share.
        hidden: ``(B or 1, 1, T, T)`` bool, True where the mask hides a key, later ones included; None = only
            those.

    Returns:
        ``(B, H, T, d_v)`` in v's dtype, laid out as ``(B, T, H, d_v)``. A row that sees nothing is finite.
    """
    # autocast would round the scores
    with torch.autocast(q.device.type, enabled=False):
        return _Kept.apply(q, k, v, scale, hidden)


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, scale: float, hidden: Tensor | None
    ) -> Tensor:
        (B, H, T, _), G = q.shape, k.shape[1]
        wide = torch.promote_types(v.dtype, torch.float32)
        ctx.scale, ctx.dtypes = scale, (q.dtype, k.dtype)
        q, k = q.to(wide), k.to(wide)
        o = v.new_empty(B, T, H, v.shape[-1])
        runs = _runs(T)
        kept = [v.new_empty(B, H, rows.stop - rows.start, rows.stop) for rows in runs]
        later = torch.full((ROWS, ROWS), float("-inf"), dtype=wide, device=q.device).triu(1)
        for b in range(B):
            for rows, weights in zip(runs, kept, strict=True):
                s = _grouped(q[b, :, rows], G) @ k[b, :, : rows.stop].mT
                s = s.mul_(scale).view(weights[b].shape)
                if hidden is None:
                    n = rows.stop - rows.start
                    s[:, :, rows].add_(later[:n, :n])
                else:
                    # finite, so that the rows of padding are
                    s.masked_fill_(hidden[b % hidden.shape[0], :, rows, : rows.stop], torch.finfo(wide).min)
                p = weights[b].copy_(torch.softmax(s, dim=-1))
                o[b, rows] = (
                    (_grouped(p, G) @ v[b, :, : rows.stop]).view(H, *p.shape[1:2], -1).transpose(0, 1)
                )
        ctx.save_for_backward(q, k, v, o, *kept)
        return o.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad.device.type, enabled=False):
            return _Kept._gradients(ctx, grad)

    @staticmethod
    def _gradients(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, *kept = ctx.saved_tensors
        (B, H, T, _), G = q.shape, k.shape[1]
        wide, narrow, runs = q.dtype, v.dtype, _runs(T)
        scaled = grad.to(wide) * ctx.scale
        mean = (scaled * o.transpose(1, 2)).sum(-1, keepdim=True)
        wide_v, grad, q, k = v.to(wide), grad.to(narrow), q.to(narrow), k.to(narrow)
        grad_q, grad_k, grad_v = (z.new_empty(B, T, *z.shape[1::2]) for z in (q, k, v))
        for b in range(B):
            into_k = into_v = None
            for rows, weights in zip(reversed(runs), reversed(kept), strict=True):
                p, past = weights[b], slice(0, rows.stop)
                ds = (_grouped(scaled[b, :, rows], G) @ wide_v[b, :, past].mT).view(p.shape)
                ds = _grouped(ds.sub_(mean[b, :, rows]).mul_(p).to(narrow), G)
                grad_q[b, rows] = (ds @ k[b, :, past]).view(H, rows.stop - rows.start, -1).transpose(0, 1)
                own_k = ds.mT @ _grouped(q[b, :, rows], G)
                own_v = _grouped(p, G).mT @ _grouped(grad[b, :, rows], G)
                if into_k is None:  # the last rows, which see every key
                    into_k, into_v = own_k, own_v
                else:
                    into_k[:, past] += own_k
                    into_v[:, past] += own_v
            grad_k[b], grad_v[b] = into_k.transpose(0, 1), into_v.transpose(0, 1)
        grads = (z.transpose(1, 2) for z in (grad_q, grad_k, grad_v))
        return *(z.to(d) for z, d in zip(grads, (*ctx.dtypes, narrow), strict=True)), None, None


def _runs(T: int) -> list[slice]:
    return [slice(first, min(first + ROWS, T)) for first in range(0, T, ROWS)]


def _grouped(z: Tensor, groups: int) -> Tensor:
    """``(H, t, n)`` with the rows of heads that share a key head side by side: ``(G, H / G * t, n)``."""
    return z if z.shape[0] == groups else z.reshape(groups, -1, z.shape[-1])

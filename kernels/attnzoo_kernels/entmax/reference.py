"""alpha-entmax in plain torch, and its gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Elements worked on at once: temporaries stay at a few times this number.
CHUNK = 1 << 22


def _chunks(scores: Tensor) -> Iterator[tuple[int, slice]]:
    """Batch index and slice of T."""
    B, H, T, S = scores.shape
    step = max(1, CHUNK // (H * S))
    for b in range(B):
        for start in range(0, T, step):
            yield b, slice(start, start + step)


def bisect(z: Tensor, alpha: Tensor, visible: Tensor | None, n_iter: int) -> Tensor:
    """p of ``z (H,t,S)`` for ``alpha (H,1,1)``, in z's dtype.

    tau is sought below the row's maximum, which keeps its digits where scores are large.
    """
    if visible is not None:
        z = z.masked_fill(~visible, -torch.inf)
    top = z.amax(-1, keepdim=True)
    seen = top > -torch.inf
    u = (alpha - 1) * (z - top.masked_fill(~seen, 0.0))
    power = 1 / (alpha - 1)
    low = torch.full_like(top, -1.0)
    high = -torch.pow(torch.tensor(1.0 / z.shape[-1], dtype=z.dtype, device=z.device), alpha - 1)
    high = high.expand_as(low)
    for _ in range(n_iter):
        tau = (low + high) / 2
        enough = (u - tau).clamp_min(0).pow(power).sum(-1, keepdim=True) >= 1
        low, high = torch.where(enough, tau, low), torch.where(enough, high, tau)
    p = (u - low).clamp_min(0).pow(power)
    return torch.where(seen, p / p.sum(-1, keepdim=True), 0.0)


def _phi(t: Tensor) -> Tensor:
    """e^t - 1 - t e^t for t <= 0, by its series near 0, where the terms cancel."""
    series = torch.zeros_like(t)
    for k in range(16, 1, -1):
        series = series * t + (k - 1) / math.factorial(k)
    return torch.where(t > -0.5, -t * t * series, t.exp() * (1 - t) - 1)


def gradients(g: Tensor, p: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """By z, and by alpha per row ``(..., T)``; all in g's dtype.

    With w = p^(2 - alpha) on the support, gbar = sum w g / sum w and t = (alpha - 1) ln p:

        dz_j = w_j (g_j - gbar),  dalpha = sum_j dz_j (e^t_j - 1 - t_j e^t_j) / (alpha - 1)^2

    That is the papers' sum of g_j dp_j/dalpha, rearranged by sum w (g - gbar) = 0: there, terms of the size
    of 1 / (alpha - 1)^2 cancel; this keeps its digits down to alpha = 1, where it is -sum dz ln^2 p / 2.
    """
    on = p > 0
    base = torch.where(on, p, 1.0)
    w = torch.where(on, base.pow(2 - alpha), 0.0)
    total = w.sum(-1, keepdim=True)
    dz = w * (g - (w * g).sum(-1, keepdim=True) / torch.where(total > 0, total, 1.0))
    return dz, (dz * _phi((alpha - 1) * base.log())).sum(-1) / (alpha - 1).squeeze(-1) ** 2


class _Entmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores: Tensor, alpha: Tensor, visible: Tensor | None, n_iter: int) -> Tensor:
        p = torch.empty_like(scores)
        seen = None if visible is None else visible.expand(*scores.shape[:1], *visible.shape[1:])
        heads = alpha[:, None, None]
        for b, rows in _chunks(scores):
            part = None if seen is None else seen[b, :, rows]
            p[b, :, rows] = bisect(scores[b, :, rows].to(alpha.dtype), heads, part, n_iter)
        ctx.save_for_backward(p, alpha)
        return p

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        p, alpha = ctx.saved_tensors
        dz, dalpha = torch.empty_like(p), torch.zeros_like(alpha)
        heads = alpha[:, None, None]
        for b, rows in _chunks(p):
            operands = (x[b, :, rows].to(alpha.dtype) for x in (g, p))
            dz[b, :, rows], part = gradients(*operands, heads)
            dalpha += part.sum(-1)
        return dz, dalpha if ctx.needs_input_grad[1] else None, None, None


def entmax_reference(scores: Tensor, alpha: Tensor, visible: Tensor | None, n_iter: int) -> Tensor:
    """As the public function; ``alpha (H,)`` in the dtype that the work is done in."""
    return _Entmax.apply(scores, alpha, visible, n_iter)

"""Polynomial attention: weights f(q . k), f the Taylor polynomial of exp of order 1 or 2, in linear time.

    o_t = sum_(j <= t) f(s_tj) v_j / (sum_(j <= t) f(s_tj) + eps),   f(s) = 1 + s (+ s^2 / 2)

f(q . k) = phi(q) . W phi(k) with phi(z) all products of two entries of [1, z], each pair once: (n^2 + n) / 2
for n = d + 1, and W = 1/2 for squares of entries of z. So a state of phi(k) v^T carries the past from chunk
to chunk; inside a chunk, and for short sequences as a whole, f is taken of the products q . k themselves,
d wide where phi is n^2 / 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo_kernels.rows import by_rows, chunk_rows
from attnzoo_kernels.scan.blocks import first_order
from attnzoo_kernels.scan.decay import Grid, Runs
from attnzoo_kernels.scan.states import Accumulate


class TaylorFlops(NamedTuple):
    """FLOPs of one sequence, all heads: what the method needs in its cheaper form, what runs; which form."""

    method: int
    executed: int
    quadratic: bool


def polynomial(s: Tensor, order: int) -> Tensor:
    """f of the scores."""
    return torch.addcmul(s + 1, s, s, value=0.5) if order == 2 else s + 1


def feature_count(width: int, order: int, packed: bool = True) -> int:
    """Width of phi."""
    if order == 1:
        return width + 1
    return (width + 1) * (width + 2) // 2 if packed else 1 + width + width**2


def features(z: Tensor, order: int, packed: bool = True) -> Tensor:
    """phi, tokens last: ``(..., d, C)`` -> ``(..., F, C)``; all d^2 products of entries unless ``packed``."""
    one = F.pad(z, (0, 0, 1, 0), value=1.0)
    if order == 1:
        return one
    if packed:
        return pairs(one)
    return torch.cat([one, (z[..., :, None, :] * z[..., None, :, :]).flatten(-3, -2)], dim=-2)


def pairs(rows: Tensor) -> Tensor:
    """Products of two of ``n`` rows, each pair once: ``(..., n, C)`` -> ``(..., n (n + 1) / 2, C)``.

    Row i times row i + r round the circle meets each pair once for r up to n / 2: runs of rows in place of
    index tables, which are slow to gather and slower to scatter.
    """
    return plain_pairs(rows) if torch.compiler.is_compiling() else _Pairs.apply(rows)


def plain_pairs(rows: Tensor) -> Tensor:
    """`pairs` in torch's own operations."""
    n = rows.shape[-2]
    circle = torch.cat([rows, rows[..., : n // 2, :]], dim=-2)
    return torch.cat(
        [circle[..., :width, :] * circle[..., r : r + width, :] for r, width in _runs(n)], dim=-2
    )


class _Pairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        n = rows.shape[-2]
        circle = torch.cat([rows, rows[..., : n // 2, :]], dim=-2)
        out = rows.new_empty(*rows.shape[:-2], n * (n + 1) // 2, rows.shape[-1])
        for r, width in _runs(n):
            to = out[..., r * n : r * n + width, :]
            torch.mul(circle[..., :width, :], circle[..., r : r + width, :], out=to)
        ctx.save_for_backward(circle)
        return out

    @staticmethod
    @first_order
    def backward(ctx, dout: Tensor) -> Tensor:
        (circle,) = ctx.saved_tensors
        n = (2 * circle.shape[-2] + 2) // 3
        grad = torch.zeros_like(circle)
        for r, width in _runs(n):
            part = dout[..., r * n : r * n + width, :]
            grad[..., :width, :].addcmul_(part, circle[..., r : r + width, :])
            grad[..., r : r + width, :].addcmul_(part, circle[..., :width, :])
        grad[..., : n // 2, :] += grad[..., n:, :]
        return grad[..., :n, :]


def _runs(n: int) -> list[tuple[int, int]]:
    """(step round the circle, rows that take it): n rows, half of them for the longest step of an even n."""
    total = n * (n + 1) // 2
    return [(r, min(n, total - r * n)) for r in range(n // 2 + 1)]


def feature_weights(width: int, order: int, packed: bool, like: Tensor) -> Tensor:
    """``(feature_count, 1)`` diagonal of W."""
    weights = like.new_ones(feature_count(width, order, packed), 1)
    if order == 2:
        weights[1 : width + 1 if packed else 1] = 0.5
        if not packed:
            weights[width + 1 :] = 0.5
    return weights


def taylor_flops(T: int, H: int, K: int, V: int, order: int, chunk_size: int, packed: bool) -> TaylorFlops:
    """Both forms counted; without a state to read or leave the cheaper one runs. V includes the sum's 1."""
    pair, state = 2 * (K + V), 4 * feature_count(K, order, packed) * V
    step = chunk_rows(T)
    direct = pair * sum((min(a + step, T) - a) * min(a + step, T) for a in range(0, T, step))
    grid = Grid.of(T, chunk_size)
    tail = T - (grid.count - 1) * grid.size
    inside = (grid.count - 1) * grid.size * (grid.size + 1) // 2 + tail * (tail + 1) // 2
    chunked = grid.count * grid.size * (pair * grid.size + state)
    if direct <= chunked:
        return TaylorFlops(H * pair * (T * (T + 1) // 2), H * direct, True)
    return TaylorFlops(H * (pair * inside + state * T), H * chunked, False)


def taylor(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    order: int = 2,
    scale: float = 1.0,
    eps: float = 1e-12,
    packed: bool = True,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    chunk_size: int = 64,
    segments: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Polynomial attention over one document per run of ``segments``.

    Args:
        q, k: (B,T,H,K); v: (B,T,H,V). scale: s = scale * q . k. packed: see `features`.
        initial_state: (B,H,F,V+1) of run 0, the last column for v = 1. segments: as in `scan`.
        valid: (B,T) False where a token writes nothing.

    Returns:
        o (B,T,H,V) in v's dtype, and the state after the last token, or None; fp32 work, or fp64.
    """
    dtype = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype) else torch.float32
    ones = torch.ones_like(v[..., :1], dtype=dtype)
    if valid is not None:
        ones = ones * valid[..., None, None]
    with torch.autocast(q.device.type, enabled=False):
        q, k, both = q.to(dtype) * scale, k.to(dtype), torch.cat([v.to(dtype), ones], dim=-1)
        (_, T, H, K), V = q.shape, both.shape[-1]
        alone = initial_state is None and not output_final_state
        if alone and taylor_flops(T, H, K, V, order, chunk_size, packed).quadratic:
            o, state = _quadratic(q, k, both, order, segments), None
        else:
            o, state = _chunked(q, k, both, order, packed, initial_state, Grid.of(T, chunk_size), segments)
        o = o[..., :-1] / (o[..., -1:] + eps)
    return o.to(v.dtype), state if output_final_state else None


def _quadratic(q: Tensor, k: Tensor, v: Tensor, order: int, segments: Tensor | None) -> Tensor:
    q, k, v = (z.transpose(1, 2) for z in (q, k, v))  # B,H,T,·

    def run(rows: slice) -> tuple[Tensor]:
        keys = slice(0, rows.stop)
        weights = polynomial(q[:, :, rows] @ k[:, :, keys].mT, order).tril_(rows.start)
        if segments is not None:
            weights = weights * (segments[:, rows, None] == segments[:, None, keys])[:, None]
        return (weights @ v[:, :, keys],)

    (o,) = by_rows(run, q.shape[2], k.shape[2])
    return o.transpose(1, 2)


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: int,
    packed: bool,
    initial: Tensor | None,
    grid: Grid,
    segments: Tensor | None,
) -> tuple[Tensor, Tensor]:
    (B, _, H, K), dtype = q.shape, q.dtype
    runs = None if segments is None else Runs.of(segments, grid)
    q, k, v = (grid.split(z, dtype) for z in (q, k, v))  # N,B,H,C,·
    weights = polynomial(q @ k.mT, order).tril_()
    if runs is not None:
        weights = weights * runs.pair
    q, k = (z.mT.contiguous() for z in (q, k))
    writes = features(k, order, packed) @ (v if runs is None else v * runs.write)
    writes = writes * feature_weights(K, order, packed, writes)
    if initial is None:
        initial = torch.zeros_like(writes[0])
    carry = q.new_ones(1, 1, 1, 1, 1) if runs is None else runs.carry.to(dtype)
    carry = carry.expand(grid.count, B, H, 1, 1).flatten(1, 2)
    states, final = Accumulate.apply(initial.to(dtype).flatten(0, 1), writes.flatten(1, 2), carry, None)
    read = features(q, order, packed).mT @ states.view_as(writes)
    o = weights @ v + (read if runs is None else read * runs.read)
    return grid.join(o, dtype), final.view(B, H, *final.shape[1:])

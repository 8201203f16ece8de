"""A scan that keeps the past by Fenwick levels, each read with a weight of its own, in O(T log T).

Tokens t and j of a document meet at level ``bit_length(t xor j)``: 0 is the token itself, level l > 0 a block
of 2^(l-1) tokens that begins at a multiple of its size. Chunks of C = 2^c tokens begin at multiples of C of
their document. Inside a chunk the level of a pair is a table of its two slots; chunks meet at level
``c + bit_length(chunk xor chunk)``, so whole chunks merge as tokens do: before chunk i is read, the previous
chunk and all levels up to c + lowest set bit of i become the next level.

With P the weights of a chunk's own values, Q the queries and Phi the transition from its start:

    o = (P * lambda) v + sum over levels l of lambda^l (Q S^l)
    S^l <- Phi S^l,    S^0 = (the keys at the chunk's end) v

Shapes: B batch, N chunks, H heads, C slots, K and V widths, M levels of whole chunks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.attention.recurrence.level_grid import Grid, bits
from attnzoo.attention.timeline import Timeline
from attnzoo_kernels.scan.blocks import first_order, unit_lower_inverse
from attnzoo_kernels.scan.decay import MIN_LOG_DECAY


class Chunk(NamedTuple):
    """All chunks by what they do: P ``(B, N, H, C, C)``, Q ``(.., C, K)``, ends ``(.., K, C)`` of the keys at
    the chunk's last slot, and Phi, ``(.., 1, 1)`` or ``(.., K, K)``.

    Where a token's decay is one number, that is left out of Q and ends: ``start`` ``(.., C, 1)`` goes to
    the weights of what is read and ``end`` to the values, which are narrower.
    """

    weights: Tensor
    queries: Tensor
    ends: Tensor
    carry: Tensor
    start: Tensor | None = None
    end: Tensor | None = None


class LowerInverse(torch.autograd.Function):
    """``(I + tril(matrix, -1))^-1``."""

    @staticmethod
    def forward(ctx, matrix: Tensor) -> Tensor:
        inverse = unit_lower_inverse(matrix)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    @first_order
    def backward(ctx, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return -(inverse.mT @ grad @ inverse.mT).tril(-1)


def chunked(q: Tensor, k: Tensor, g: Tensor, beta: Tensor | None) -> Chunk:
    """What each chunk does, from q, k ``(B, N, H, C, K)``, g and beta ``(B, N, H, C)``."""
    dtype = q.dtype
    # fp64 keeps the digits of a decay near 1 that follows one near 0
    sums = g.double().clamp(min=MIN_LOG_DECAY).cumsum(-1) * math.log2(math.e)
    # a sum over later tokens, above 0, may overflow
    pair = (sums[..., :, None] - sums[..., None, :]).to(dtype).tril().exp2().tril()
    start, end = sums.exp2().to(dtype)[..., None], (sums[..., -1:] - sums).exp2().to(dtype)[..., None]
    scores, carry = (q @ k.mT) * pair, start[..., -1:, :]
    if beta is None:
        return Chunk(scores, q, k.mT, carry, start, end)
    queries, ends = q * start, (k * end).mT
    inverse = LowerInverse.apply((k * beta[..., None]) @ k.mT * pair) * beta[..., None, :]
    weights, ends, k = scores @ inverse, ends @ inverse, k * start
    eye = torch.eye(k.shape[-1], dtype=dtype, device=k.device)
    return Chunk(weights, queries - weights @ k, ends, carry * eye - ends @ k)


def level_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    level_weights: Tensor,
    line: Timeline,
    chunk_size: int,
    states: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Reads all levels of the past, with weights.

    Args:
        q, k: ``(B, T, H, K)``. v: ``(B, T, H, V)``. g, beta: ``(B, T, H)`` log decay, write strength or None.
        level_weights: ``(B, T, H, L)``. line: documents. chunk_size: power of two.
        states: ``(B, L, H, K, V)`` levels that the cached document has reached, None without a cache.

    Returns:
        ``(B, T, H, V)`` in v's dtype, and the levels after the last token of each row.
    """
    T, out_dtype = q.shape[1], v.dtype
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    size = chunk_of(chunk_size, T)
    grid = Grid.of(line, size)
    q, k, v, g, lam = (grid.split(z, dtype) for z in (q, k, v, g, level_weights))
    chunk = chunked(q, k, g, None if beta is None else grid.split(beta, dtype))
    slot = torch.arange(size, device=q.device)
    table = bits(slot[:, None] ^ slot)
    own = lam.gather(-1, table.expand(*lam.shape[:-1], size))
    o = (chunk.weights * own) @ v
    if chunk.start is not None:
        lam, v = lam * chunk.start, v * chunk.end
    writes = chunk.ends @ v
    low = previous = high = None
    inner, top = size.bit_length(), grid.levels  # levels inside a chunk, and of whole chunks
    if states is None and grid.place is None:
        far = _whole(chunk, writes, lam[..., inner : inner + top], beta is not None)
        return grid.join(o if far is None else o + far, T).to(out_dtype), None
    if states is not None:
        aligned = _per_row(grid.first == 0, 4)
        began = _per_row(grid.first + grid.index[:, 0] > 0, 4)
        low, high = states[:, :inner] * began, states[:, inner : inner + top]
        previous = (low * aligned).sum(1)
        low = low * ~aligned
        more, levels = _read_low(chunk, lam, low, grid)
        o = torch.cat([o[:, :1] + more[:, None], o[:, 1:]], dim=1)
        over = (chunk.carry[:, 0] * low.sum(1)) if beta is None else chunk.carry[:, 0] @ low.sum(1)
        writes = torch.cat([writes[:, :1] + over[:, None], writes[:, 1:]], dim=1)
    before = _pass(chunk.carry, writes, grid, top, high, previous, beta is not None)
    if top:
        shares = lam[..., inner : inner + top, None] * chunk.queries[..., None, :]  # B,N,H,C,M,K
        o = o + shares.flatten(-2) @ before.transpose(2, 3).flatten(3, 4)
    if states is None:
        return grid.join(o, T).to(out_dtype), None
    after = _last(chunk, v, grid, before, low, levels, states)
    return grid.join(o, T).to(out_dtype), after


def chunk_of(chunk_size: int, length: int) -> int:
    """C: no larger than the tokens need."""
    return min(chunk_size, 1 << (length - 1).bit_length())


def _per_row(flags: Tensor, more: int) -> Tensor:
    return flags.reshape(-1, *(1,) * more)


def _carried(carry: Tensor, states: Tensor, full: bool) -> Tensor:
    """States ``(B, M, H, K, V)`` over one chunk."""
    return carry[:, None] @ states if full else carry[:, None] * states


def _whole(chunk: Chunk, writes: Tensor, lam: Tensor, full: bool) -> Tensor | None:
    """What chunks of one document, from its start on, read of levels: only of those that hold something.

    Args:
        lam: ``(B, N, H, C, M)`` weights of the levels of whole chunks.
    """
    outs, levels, previous = [], {}, None
    parts = (chunk.queries, chunk.carry, lam, writes)
    for n, (q, carry, weights, write) in enumerate(zip(*(z.unbind(1) for z in parts), strict=True)):
        if n:
            merged, joined = (n & -n).bit_length(), previous
            for level in [level for level in levels if level < merged]:
                joined = joined + levels.pop(level)
            levels[merged] = joined
            weights = weights.unbind(-1)
            outs.append(sum(weights[level - 1][..., None] * (q @ state) for level, state in levels.items()))
        levels = {level: carry @ state if full else carry * state for level, state in levels.items()}
        previous = write
    return torch.stack([torch.zeros_like(outs[0]), *outs], dim=1) if outs else None


def _pass(
    carry: Tensor,
    writes: Tensor,
    grid: Grid,
    top: int,
    levels: Tensor | None,
    previous: Tensor | None,
    full: bool,
) -> Tensor:
    """Levels of whole chunks as each chunk reads them, ``(B, N, M, H, K, V)``."""
    B, N, H, K, V = writes.shape
    if levels is None:
        levels = writes.new_zeros(B, top, H, K, V)
        previous = writes.new_zeros(B, H, K, V)
    level, found = torch.arange(1, top + 1, device=writes.device), []
    for n in range(N):
        i = grid.index[:, n]
        merged = bits(i & -i)
        below, at = (z[..., None, None, None] for z in (level < merged[:, None], level == merged[:, None]))
        levels = levels * _per_row(i > 0, 4)
        joined = previous + (levels * below).sum(1)
        levels = levels * ~below + at * joined[:, None]
        found.append(levels)
        levels, previous = _carried(carry[:, n], levels, full), writes[:, n]
    return torch.stack(found, dim=1)


def _read_low(chunk: Chunk, lam: Tensor, low: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """What the first chunk reads of earlier tokens in it; and slots that stand for each of their levels."""
    count, size = low.shape[1], grid.size
    end = (grid.first - 1).clamp(min=0)[:, None]
    level = torch.arange(count, device=low.device)
    stands = torch.where(level == 0, end, (end >> level) << level)  # (B or 1, levels)
    slot = torch.arange(size, device=low.device)[:, None]
    table = bits(slot ^ stands[:, None])[:, None].expand(*lam[:, 0].shape[:-1], count)
    shares = lam[:, 0].gather(-1, table)[..., None] * chunk.queries[:, 0, ..., None, :]  # B,H,C,levels,K
    return shares.flatten(-2) @ low.transpose(1, 2).flatten(2, 3), stands


def _last(
    chunk: Chunk, v: Tensor, grid: Grid, before: Tensor, low: Tensor, stands: Tensor, states: Tensor
) -> Tensor:
    """All levels after each row's last token; rows without a token keep theirs."""
    B, inner, full = len(v), low.shape[1], chunk.carry.shape[-1] > 1
    row, (at, slot) = torch.arange(B, device=v.device), grid.last.expand(B, 2).T
    ends, values, carry, high = chunk.ends[row, at], v[row, at], chunk.carry[row, at], before[row, at]
    level = torch.arange(inner, device=v.device)
    own = bits(torch.arange(grid.size, device=v.device) ^ slot[:, None])[..., None] == level  # B,C,levels
    parts = (values[..., None, :] * own[:, None, ..., None]).flatten(-2)  # B,H,C,levels V
    inside = (ends @ parts).unflatten(-1, (inner, -1)).movedim(3, 1)
    moved = bits(stands ^ slot[:, None])[..., None] == level  # B, from, to
    kept = _carried(carry, low * _per_row(at == 0, 4), full)
    inside = inside + (kept[:, :, None] * moved[..., None, None, None]).sum(1)
    after = torch.cat([inside, _carried(carry, high, full), states[:, inner + high.shape[1] :] * 0], dim=1)
    if grid.place is None:
        return after
    some = (grid.place < grid.count * grid.size).any(1)
    return torch.where(_per_row(some, 4), after, states)

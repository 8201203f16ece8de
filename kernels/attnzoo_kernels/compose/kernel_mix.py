"""Mixing across heads on tiles of pairs that hold all heads, and its gradients.

A tile holds the heads (16, those from H on being 0) of one query row and a block of keys. What depends on the
query alone is one matrix, so that it is a product on tensor cores; maps of the keys stay in registers while a
program walks along its rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo_kernels.compose.kernel_products import blocks, bounds, touched
from attnzoo_kernels.launch import Kernel, Tile

# Rows that one program walks along: each group has its own sum of the gradients of the keys' maps.
GROUP = 16
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _seen(low, high, j, S, window, n_sink, WINDOW: tl.constexpr):
    seen = (j < S) & (j <= high) & (j >= low)
    if WINDOW:
        seen &= (high - j < window) | (j - low < n_sink)
    return seen


@triton.jit
def _at(i, h, j, H, S):
    """Places in (rows,H,S) of rows i (RANK,1,1)."""
    return (i * H + h[None, :, None]).to(tl.int64) * S + j[None, None, :]


@triton.jit
def _maps(key, b, h, j, H, S, rank, RANK: tl.constexpr):
    """w1 and w2 (RANK,16,keys), g (16,keys) from key (B, 2 rank + 1, H, S)."""
    key += b * (2 * rank + 1) * H * S
    i = tl.arange(0, RANK)[:, None, None]
    here = (h < H)[:, None] & (j < S)[None, :]
    some = (i < rank) & here[None, :, :]
    w1 = tl.load(key + _at(i, h, j, H, S), mask=some, other=0.0)
    w2 = tl.load(key + _at(rank + i, h, j, H, S), mask=some, other=0.0)
    last = (2 * rank * H + h).to(tl.int64)[:, None] * S + j[None, :]
    return w1, w2, tl.load(key + last, mask=here, other=0.0)


@triton.jit
def _weights(mixed, stat, at, row, count, mask, heads):
    """Softmax of mixed scores from the statistics (2,count) of their rows, 0 where masked."""
    x = tl.load(mixed + at, mask=mask, other=0.0)
    top = tl.load(stat + row, mask=heads, other=0.0)
    log = tl.load(stat + count + row, mask=heads, other=0.0)
    return tl.where(mask, tl.exp2((x - top[:, None]) * LOG2E - log[:, None]), 0.0)


@triton.jit
def mix(
    a, stat, m, key, out, first, own, H, T, S, start, r, P, m_b, m_t, rank, first_b, own_b, window, n_sink,
    WEIGHTS: tl.constexpr, HAS_M: tl.constexpr, HAS_KEY: tl.constexpr, RANK: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """out (B,H,r,16 P) from scores a of that shape: pre's mix, or post's of the weights with ``WEIGHTS``.

    m (B,T,H,H) with strides m_b, m_t; key (B, 2 rank + 1, H, S). Scores are written where they are seen,
    weights everywhere.
    """
    b = tl.program_id(2).to(tl.int64)
    B = tl.num_programs(2).to(tl.int64)
    h = tl.arange(0, 16)
    n = tl.arange(0, 16)
    c = tl.program_id(0) * BLOCK_S
    j = c + tl.arange(0, BLOCK_S)
    heads = h < H
    square = heads[:, None] & (n < H)[None, :]
    if HAS_KEY:
        w1, w2, gain = _maps(key, b, h, j, H, S, rank, RANK)
    begin = tl.program_id(1) * GROUP
    for t in range(begin, tl.minimum(begin + GROUP, r)):
        low = tl.load(first + b * first_b + start + t)
        high = tl.load(own + b * own_b + start + t)
        seen = _seen(low, high, j, S, window, n_sink, WINDOW)
        mask = heads[:, None] & seen[None, :]
        at = ((b * H + h) * r + t)[:, None] * (P * 16) + j[None, :]
        y = tl.zeros([16, BLOCK_S], tl.float32)
        if touched(low, high, c, BLOCK_S, window, n_sink, WINDOW):
            if WEIGHTS:
                x = _weights(a, stat, at, (b * H + h) * T + start + t, B * H * T, mask, heads)
            else:
                x = tl.load(a + at, mask=mask, other=0.0)
            if HAS_M:
                left = m + b * m_b + (start + t).to(tl.int64) * m_t + h[:, None] * H + n[None, :]
                y = tl.dot(tl.load(left, mask=square, other=0.0), x, input_precision=PRECISION)
            else:
                y = x
            if HAS_KEY:
                inner = tl.sum(w1 * x[None, :, :], axis=1)
                y += x * gain + tl.sum(w2 * inner[:, None, :], axis=0)
            y = tl.where(mask, y, 0.0)
        if WEIGHTS:
            mask = heads[:, None] & (j < S)[None, :]
        tl.store(out + at, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def stats(
    a, stat, first, own, H, T, S, start, r, P, first_b, own_b, window, n_sink,
    WINDOW: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Rows of stat (2,B,H,T) from scores a (B,H,r,16 P): the largest visible one, and log2 of the sum of exp.

    They stay apart, so that large scores keep their digits; both are 0 in rows that see nothing.
    """
    head = tl.program_id(1).to(tl.int64)
    b = head // H
    t = start + tl.program_id(0)
    one = tl.arange(0, 1)
    low, high = bounds(first + b * first_b, own + b * own_b, t + one, T)
    near, sinks, rest, more = blocks(low, high, S, window, n_sink, WINDOW, BLOCK_S)
    low, high = tl.max(low, axis=0), tl.max(high, axis=0)
    a += (head * r + tl.program_id(0)) * (P * 16)
    top = tl.full([BLOCK_S], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_S], tl.float32)
    for i in range(sinks + more):
        j = tl.where(i < sinks, near + i, rest + i - sinks) * BLOCK_S + tl.arange(0, BLOCK_S)
        seen = _seen(low, high, j, S, window, n_sink, WINDOW)
        x = tl.load(a + j, mask=seen, other=-float("inf"))
        new = tl.maximum(top, x)
        shift = tl.where(new == -float("inf"), 0.0, new)
        total = total * tl.exp2((top - shift) * LOG2E) + tl.exp2((x - shift) * LOG2E)
        top = new
    best = tl.max(top, axis=0)
    best = tl.where(best == -float("inf"), 0.0, best)
    whole = tl.sum(total * tl.exp2((top - best) * LOG2E), axis=0)
    count = tl.num_programs(1).to(tl.int64) * T
    tl.store(stat + head * T + t, best)
    tl.store(stat + count + head * T + t, tl.log2(tl.where(whole == 0, 1.0, whole)))


@triton.jit
def unmix(
    mixed, stat, a, by_out, delta, m, key, by_in, by_m, by_key, by_row, first, own,
    H, T, S, start, r, P, m_b, m_t, rank, first_b, own_b, window, n_sink,
    PRE: tl.constexpr, FRESH: tl.constexpr, HAS_M: tl.constexpr, HAS_KEY: tl.constexpr, RANK: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, GROUP: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Gradients of one mix, of a tile's pairs. mixed: scores after pre, p their softmax by stat.

    Post: by_out is that of the mixed weights; by_in (fp32, where seen) is that of p, and by_row
    (blocks,B,H,r) its product with p, summed over a block of keys.
    ``PRE``: by_out is that of p, delta (B,H,r) the sum of by_row, so p (by_out - delta) is that of the mixed
    scores; a are the scores before the mix; by_in is theirs, 0 where hidden.

    by_m (blocks,B,r,H,H) is each block's part of m's; by_key (groups,B, 2 rank + 1, H,S) adds up over chunks,
    from 0 where ``FRESH``.
    """
    b = tl.program_id(2).to(tl.int64)
    B = tl.num_programs(2).to(tl.int64)
    h = tl.arange(0, 16)
    n = tl.arange(0, 16)
    c = tl.program_id(0) * BLOCK_S
    j = c + tl.arange(0, BLOCK_S)
    heads = h < H
    square = heads[:, None] & (n < H)[None, :]
    if HAS_KEY:
        w1, w2, gain = _maps(key, b, h, j, H, S, rank, RANK)
        by_w1 = tl.zeros([RANK, 16, BLOCK_S], tl.float32)
        by_w2 = tl.zeros([RANK, 16, BLOCK_S], tl.float32)
        by_gain = tl.zeros([16, BLOCK_S], tl.float32)
    begin = tl.program_id(1) * GROUP
    for t in range(begin, tl.minimum(begin + GROUP, r)):
        low = tl.load(first + b * first_b + start + t)
        high = tl.load(own + b * own_b + start + t)
        mask = heads[:, None] & _seen(low, high, j, S, window, n_sink, WINDOW)[None, :]
        at = ((b * H + h) * r + t)[:, None] * (P * 16) + j[None, :]
        y = tl.zeros([16, BLOCK_S], tl.float32)
        part = tl.zeros([16, 16], tl.float32)
        inside = tl.zeros([16], tl.float32)
        if touched(low, high, c, BLOCK_S, window, n_sink, WINDOW):
            x = _weights(mixed, stat, at, (b * H + h) * T + start + t, B * H * T, mask, heads)
            z = tl.load(by_out + at, mask=mask, other=0.0)
            if PRE:
                z = x * (z - tl.load(delta + (b * H + h) * r + t, mask=heads, other=0.0)[:, None])
                x = tl.load(a + at, mask=mask, other=0.0)
            if HAS_M:
                left = m + b * m_b + (start + t).to(tl.int64) * m_t + h[:, None] + n[None, :] * H
                y = tl.dot(tl.load(left, mask=square, other=0.0), z, input_precision=PRECISION)
                part = tl.dot(z, tl.trans(x), input_precision=PRECISION)
            else:
                y = z
            if HAS_KEY:
                inner = tl.sum(w1 * x[None, :, :], axis=1)
                outer = tl.sum(w2 * z[None, :, :], axis=1)
                by_w1 += x[None, :, :] * outer[:, None, :]
                by_w2 += z[None, :, :] * inner[:, None, :]
                by_gain += x * z
                y += z * gain + tl.sum(w1 * outer[:, None, :], axis=0)
            y = tl.where(mask, y, 0.0)
            if not PRE:
                inside = tl.sum(x * y, axis=1)
        slot = (tl.program_id(0).to(tl.int64) * B + b) * r
        if HAS_M:
            to = by_m + (slot + t) * H * H + h[:, None] * H + n[None, :]
            tl.store(to, part, mask=square)
        if PRE:
            mask = heads[:, None] & (j < S)[None, :]
        else:
            tl.store(by_row + slot * H + h * r + t, inside, mask=heads)
        tl.store(by_in + at, y.to(by_in.dtype.element_ty), mask=mask)
    if HAS_KEY:
        i = tl.arange(0, RANK)[:, None, None]
        by_key += (tl.program_id(1).to(tl.int64) * B + b) * (2 * rank + 1) * H * S
        to = by_key + _at(i, h, j, H, S)
        second = by_key + _at(rank + i, h, j, H, S)
        last = by_key + (2 * rank * H + h).to(tl.int64)[:, None] * S + j[None, :]
        here = heads[:, None] & (j < S)[None, :]
        some = (i < rank) & here[None, :, :]
        if not FRESH:
            by_w1 += tl.load(to, mask=some, other=0.0)
            by_w2 += tl.load(second, mask=some, other=0.0)
            by_gain += tl.load(last, mask=here, other=0.0)
        tl.store(to, by_w1, mask=some)
        tl.store(second, by_w2, mask=some)
        tl.store(last, by_gain, mask=here)


_INTS = ("H", "T", "S", "start", "r", "P", "rank", "first_b", "own_b", "window", "n_sink")
_TYPES = (
    dict.fromkeys(("first", "own"), "*i32")
    | dict.fromkeys(_INTS, "i32")
    | dict.fromkeys(("m_b", "m_t"), "i64")
    | dict.fromkeys(
        ("a", "stat", "m", "key", "mixed", "by_out", "delta", "by_m", "by_key", "by_row"), "*fp32"
    )
)
_FULL = {"HAS_M": True, "HAS_KEY": True, "RANK": 2, "WINDOW": False, "PRECISION": "tf32", "GROUP": GROUP}
_TALKING = _FULL | {"HAS_KEY": False, "WINDOW": True, "RANK": 1}
MIX = Kernel(
    "compose_mix",
    mix,
    (
        Tile({"BLOCK_S": 64}, 4, 1),
        Tile({"BLOCK_S": 128}, 4, 1, ("sm_80", "sm_90", "gfx942")),
        Tile({"BLOCK_S": 128}, 8, 1),
    ),
    {
        "bf16_pre": _FULL | {"WEIGHTS": False},
        "bf16_post": _FULL | {"WEIGHTS": True},
        "bf16_post_static_window": _TALKING | {"WEIGHTS": True},
    },
    lambda case: _TYPES | {"out": "*bf16" if case["WEIGHTS"] else "*fp32"},
)
STATS = Kernel(
    "compose_stats",
    stats,
    (Tile({"BLOCK_S": 1024}, 4, 1), Tile({"BLOCK_S": 2048}, 4, 1)),
    {"fp32": {"WINDOW": False}, "fp32_window": {"WINDOW": True}},
    _TYPES,
)
UNMIX = Kernel(
    "compose_unmix",
    unmix,
    (
        Tile({"BLOCK_S": 32}, 4, 1),
        Tile({"BLOCK_S": 64}, 8, 1),
    ),
    {
        "bf16_pre": _FULL | {"PRE": True, "FRESH": False},
        "bf16_post": _FULL | {"PRE": False, "FRESH": False},
        "bf16_post_static_window": _TALKING | {"PRE": False, "FRESH": False},
    },
    lambda case: _TYPES | {"by_in": "*bf16" if case["PRE"] else "*fp32"},
)
KERNELS: list[Kernel] = [MIX, STATS, UNMIX]

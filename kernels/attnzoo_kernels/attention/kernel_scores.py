"""What the attention kernels share: scores of a tile, weights from scores, and the scores' gradient.

Scores are in units of log 2 where an exponential follows, natural for relu. Functions take whole tiles, of
either orientation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo_kernels.launch import Kernel

SOFTMAX, SIGNED, CLIPPED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SIGMOID, RELU, SOFTPLUS = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_tile(x, start, rows, stride, n, D: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """(BLOCK, WIDE) of rows ``start ...`` of a matrix with ``rows`` rows of width D; zeros outside."""
    d = tl.arange(0, WIDE)
    x += tl.cast(start, tl.int64) * stride
    at = x + n[:, None] * stride + d[None, :]
    inside = (start + n < rows)[:, None]
    if WIDE > D:
        inside = inside & (d < D)[None, :]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def store_tile(x, value, start, rows, stride, n, D: tl.constexpr, WIDE: tl.constexpr):
    d = tl.arange(0, WIDE)
    x += tl.cast(start, tl.int64) * stride
    inside = (start + n < rows)[:, None] & (d < D)[None, :]
    tl.store(x + n[:, None] * stride + d[None, :], value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def visible(own, first, j, window, n_sink, WINDOW: tl.constexpr):
    """Broadcasts; see `span`. A row with own < first sees nothing, as no j satisfies both."""
    seen = (j <= own) & (j >= first)
    if WINDOW:
        seen &= (own - j < window) | (j - first < n_sink)
    return seen


@triton.jit
def score(qk, distance, scale, cap, slope, bias, CAP: tl.constexpr, SLOPES: tl.constexpr, BIAS: tl.constexpr):
    """Scores, and what the soft cap does to their gradient."""
    s = qk * scale
    chain = 1.0
    if CAP:
        t = 1.0 - 2.0 / (1.0 + tl.exp2(s * (2.0 * LOG2_E)))
        s = t * cap
        chain = 1.0 - t * t
    if SLOPES:
        s -= slope * distance.to(tl.float32)
    if BIAS:
        s += bias
    return s, chain


@triton.jit
def softplus(s):
    """log2(1 + 2^s), with all digits where it is small."""
    y = tl.exp2(-tl.abs(s))
    u = 1.0 + y
    step = u - 1.0
    log = tl.where(step == 0, y * LOG2_E, tl.log2(u) * (y / tl.where(step == 0, 1.0, step)))
    return tl.maximum(s, 0.0) + log


@triton.jit
def weigh(s, norm, low, high, NORM: tl.constexpr):
    """Weights of the values. ``norm``: the row's log-sum-exp (log 2 units), or 1 / sum for softplus."""
    if NORM == SOFTMAX:
        w = tl.exp2(s - norm)
    elif NORM == SIGNED:
        w = tl.exp2(tl.abs(s) - norm)
        w = tl.where(s > 0, w, tl.where(s < 0, -w, 0.0))
    elif NORM == CLIPPED:
        w = tl.minimum(tl.maximum((high - low) * tl.exp2(s - norm) + low, 0.0), 1.0)
    elif NORM == SIGMOID:
        w = 1.0 / (1.0 + tl.exp2(-s))
    elif NORM == RELU:
        w = tl.maximum(s, 0.0)
    else:
        w = softplus(s) * norm
    return w


@triton.jit
def unclipped(s, norm, low, high):
    """Weights before clipping, and where clipping changed nothing."""
    p = tl.exp2(s - norm)
    x = (high - low) * p + low
    return p, (x >= 0) & (x <= 1)


@triton.jit
def gradient(s, dp, norm, delta, low, high, NORM: tl.constexpr):
    """Of natural scores, from dp = do . v and the row's delta = do . o (clipped: sum of p dp, unclipped)."""
    if NORM == SOFTMAX:
        ds = tl.exp2(s - norm) * (dp - delta)
    elif NORM == SIGNED:
        sign = tl.where(s > 0, 1.0, -1.0)
        ds = tl.where(s == 0, 0.0, tl.exp2(tl.abs(s) - norm) * (dp - sign * delta))
    elif NORM == CLIPPED:
        p, free = unclipped(s, norm, low, high)
        ds = (high - low) * p * (tl.where(free, dp, 0.0) - delta)
    elif NORM == SIGMOID:
        w = 1.0 / (1.0 + tl.exp2(-s))
        ds = w * (1.0 - w) * dp
    elif NORM == RELU:
        ds = tl.where(s > 0, dp, 0.0)
    else:
        ds = norm * LOG2_E / (1.0 + tl.exp2(-s)) * (dp - delta)
    return ds


@triton.jit
def row_norm(saved, at, inside, NORM: tl.constexpr):
    """What `weigh` needs of a row, from what the forward saved; safe for rows that see nothing."""
    if NORM == SOFTPLUS:
        total = tl.load(saved + at, mask=inside, other=0.0)
        norm = tl.where(total == 0, 0.0, 1.0 / tl.where(total == 0, 1.0, total))
    elif NORM <= CLIPPED:
        lse = tl.load(saved + at, mask=inside, other=0.0)
        norm = tl.where(lse == -float("inf"), 0.0, lse * LOG2_E)
    else:
        norm = 0.0 * at.to(tl.float32)
    return norm


KERNELS: list[Kernel] = []

"""Products between tokens and their pairs, over the tiles that the span shows.

Pairs are kept as (B,H,r,16 P) for a chunk of r query rows, of which columns below S are used; `start` is the
chunk's first row.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo_kernels.launch import Kernel, Tile


@triton.jit
def bounds(first, own, t, stop):
    """First visible key and own key of rows t; rows from ``stop`` on see nothing."""
    here = t < stop
    return tl.load(first + t, mask=here, other=1), tl.load(own + t, mask=here, other=-1)


@triton.jit
def touched(low, high, j, size, window, n_sink, WINDOW: tl.constexpr):
    """Whether rows with these bounds see any of the keys j to j + size - 1."""
    hit = (low <= high) & (j <= high) & (j + size > low)
    if WINDOW:
        hit &= (high - (j + size - 1) < window) | (j - low < n_sink)
    return hit


@triton.jit
def blocks(low, high, S, window, n_sink, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Blocks of keys that some of a run of rows sees: ``a`` from block ``x``, then ``b`` from block ``y``."""
    seen = low <= high
    start = tl.min(tl.where(seen, tl.maximum(low, 0), S), axis=0)
    stop = tl.minimum(tl.max(tl.where(seen, high, -1), axis=0) + 1, S)
    x = start // BLOCK
    a = 0
    y = x
    if WINDOW:
        near = tl.maximum(tl.min(tl.where(seen, high, S), axis=0) - window + 1, start)
        sinks = tl.minimum(tl.max(tl.where(seen, low, -n_sink), axis=0) + n_sink, near)
        a = tl.maximum(tl.cdiv(sinks, BLOCK) - x, 0)
        y = tl.maximum(near // BLOCK, x + a)
    b = tl.maximum(tl.cdiv(stop, BLOCK) - y, 0)
    return x, a, y, b


@triton.jit
def pairs(
    x, y, out, first, own, H, T, S, start, r, P, scale, first_b, own_b, window, n_sink,
    D: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out (B,H,r,16 P) = scale x y^T for x (B,H,T,D), y (B,H,S,D); tiles that nobody sees stay unwritten."""
    head = tl.program_id(2).to(tl.int64)
    b = head // H
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    j = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    low, high = bounds(first + b * first_b, own + b * own_b, start + t, start + r)
    hit = touched(low, high, tl.program_id(0) * BLOCK_S, BLOCK_S, window, n_sink, WINDOW)
    if tl.max(hit.to(tl.int32), axis=0) > 0:
        left_at = x + (head * T + start + t)[:, None] * D
        right_at = y + (head * S + j)[None, :] * D
        acc = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
        for at in range(0, D, BLOCK_D):
            d = at + tl.arange(0, BLOCK_D)
            left = tl.load(left_at + d[None, :], mask=(t < r)[:, None] & (d < D)[None, :], other=0.0)
            right = tl.load(right_at + d[:, None], mask=(j < S)[None, :] & (d < D)[:, None], other=0.0)
            acc = tl.dot(left, right, acc, input_precision=PRECISION)
        to = out + (head * r + t)[:, None] * (P * 16) + j[None, :]
        tl.store(to, acc * scale, mask=(t < r)[:, None] & (j < S)[None, :])


@triton.jit
def rows(
    w, y, out, first, own, H, T, S, start, r, P, scale, first_b, own_b, window, n_sink,
    D: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows start .. start + r of out (B,H,T,D) = scale w y for w (B,H,r,16 P), y (B,H,S,D)."""
    head = tl.program_id(2).to(tl.int64)
    b = head // H
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    low, high = bounds(first + b * first_b, own + b * own_b, start + t, start + r)
    near, sinks, rest, more = blocks(low, high, S, window, n_sink, WINDOW, BLOCK_S)
    w += (head * r + t)[:, None] * (P * 16)
    y += head * S * D + d[None, :]
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for i in range(sinks + more):
        block = tl.where(i < sinks, near + i, rest + i - sinks)
        j = block * BLOCK_S + tl.arange(0, BLOCK_S)
        left = tl.load(w + j[None, :], mask=(t < r)[:, None] & (j < S)[None, :], other=0.0)
        right = tl.load(y + j.to(tl.int64)[:, None] * D, mask=(j < S)[:, None] & (d < D)[None, :], other=0.0)
        acc = tl.dot(left, right, acc, input_precision=PRECISION)
    out += (head * T + start + t)[:, None] * D + d[None, :]
    tl.store(out, (acc * scale).to(out.dtype.element_ty), mask=(t < r)[:, None] & (d < D)[None, :])


@triton.jit
def cols(
    w, x, out, first, own, H, T, S, start, r, P, scale, first_b, own_b, window, n_sink,
    D: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr, FRESH: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out (B,H,S,D) += scale w^T x for w (B,H,r,16 P), rows start .. start + r of x (B,H,T,D).

    ``FRESH`` starts from 0 instead: chunks run one after another, and each tile of out has one program.
    """
    head = tl.program_id(2).to(tl.int64)
    b = head // H
    j = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    out += (head * S + j)[:, None] * D + d[None, :]
    inside = (j < S)[:, None] & (d < D)[None, :]
    acc = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for at in range(0, r, BLOCK_T):
        t = at + tl.arange(0, BLOCK_T)
        low, high = bounds(first + b * first_b, own + b * own_b, start + t, start + r)
        hit = touched(low, high, tl.program_id(0) * BLOCK_S, BLOCK_S, window, n_sink, WINDOW)
        if tl.max(hit.to(tl.int32), axis=0) > 0:
            left = tl.load(
                w + (head * r + t)[None, :] * (P * 16) + j[:, None],
                mask=(t < r)[None, :] & (j < S)[:, None],
                other=0.0,
            )
            right = tl.load(
                x + (head * T + start + t)[:, None] * D + d[None, :],
                mask=(t < r)[:, None] & (d < D)[None, :],
                other=0.0,
            )
            acc = tl.dot(left, right, acc, input_precision=PRECISION)
    acc *= scale
    if not FRESH:
        acc += tl.load(out, mask=inside, other=0.0)
    tl.store(out, acc, mask=inside)


def _cases(**more: object) -> dict[str, dict[str, object]]:
    plain = {"WINDOW": False, "PRECISION": "ieee"} | more
    return {
        "bf16_d64": {"D": 64} | plain,
        "bf16_d128": {"D": 128} | plain,
        "bf16_d64_window": {"D": 64} | plain | {"WINDOW": True},
    }


_TYPES = (
    dict.fromkeys(("first", "own"), "*i32")
    | dict.fromkeys(("H", "T", "S", "start", "r", "P"), "i32")
    | dict.fromkeys(("first_b", "own_b", "window", "n_sink"), "i32")
    | {"scale": "fp32"}
)
# Where narrow tiles need no stack.
_OLD = ("sm_80", "sm_90", "gfx942")
_SMALL = {"BLOCK_T": 64, "BLOCK_S": 64, "BLOCK_D": 64}
_WIDE = {"BLOCK_T": 64, "BLOCK_S": 128, "BLOCK_D": 64}
PAIRS = Kernel(
    "compose_pairs",
    pairs,
    (Tile(_WIDE, 4, 2), Tile(_WIDE, 8, 2), Tile(_SMALL, 4, 2, _OLD)),
    _cases(),
    _TYPES | {"x": "*bf16", "y": "*bf16", "out": "*fp32"},
)
ROWS = Kernel(
    "compose_rows",
    rows,
    (
        Tile(_SMALL, 4, 3, _OLD),
        Tile(_SMALL, 4, 2, _OLD),
        Tile({"BLOCK_T": 64, "BLOCK_S": 64, "BLOCK_D": 128}, 8, 2),
    ),
    _cases(),
    _TYPES | {"w": "*bf16", "y": "*bf16", "out": "*bf16"},
)
COLS = Kernel(
    "compose_cols",
    cols,
    (Tile(_SMALL, 4, 2), Tile(_WIDE, 8, 2)),
    _cases(FRESH=False),
    _TYPES | {"w": "*bf16", "x": "*bf16", "out": "*fp32"},
)
KERNELS: list[Kernel] = [PAIRS, ROWS, COLS]

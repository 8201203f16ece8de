"""The short convolution: tiles of rows and channels forward, a walk along the rows backward."""

# ruff: noqa: RUF005  (in a kernel, tuples grow by concatenation alone)

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo_kernels.launch import Kernel, Tile


@triton.jit
def _row(x, tail, t, x_t, tail_t, c, mask, N: tl.constexpr, HAS_TAIL: tl.constexpr):
    """Rows t of [tail, x], zero before them; ``t`` and ``c`` broadcast to the tile, ``mask`` bounds it."""
    row = tl.load(x + t * x_t + c, mask=mask & (t >= 0), other=0.0)
    if HAS_TAIL:
        early = mask & (t < 0) & (t >= 1 - N)
        row = tl.where(t < 0, tl.load(tail + (t + (N - 1)) * tail_t + c, mask=early, other=0.0), row)
    return row.to(tl.float32)


@triton.jit
def forward(
    x, weight, bias, tail, order, y, T, C, blocks,
    x_b, x_t, tail_b, tail_t, order_b, order_t,
    N: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TAIL: tl.constexpr, HAS_ORDER: tl.constexpr,
    SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(0) // blocks).to(tl.int64)
    t = ((tl.program_id(0) % blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    c = (tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    x += b * x_b
    tail += b * tail_b
    mask = (t < T) & (c < C)
    if HAS_ORDER:
        age = tl.load(order + b * order_b + t * order_t, mask=t < T, other=0)
    total = tl.zeros([ROWS, BLOCK_C], tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)
    for back in tl.static_range(N):
        seen = mask
        if HAS_ORDER:
            seen = mask & (age >= back)
        tap = tl.load(weight + c * N + (N - 1 - back), mask=c < C, other=0.0).to(tl.float32)
        # The rows overlap from tap to tap: all but the first of these loads come from the cache.
        total += tap * _row(x, tail, t - back, x_t, tail_t, c, seen, N, HAS_TAIL)
    if SILU:
        total = total / (1.0 + tl.exp(-total))
    tl.store(y + (b * T + t) * C + c, total.to(y.dtype.element_ty), mask=mask)


@triton.jit
def backward(
    g, x, weight, bias, tail, order, dx, dtail, parts, T, C, blocks,
    g_b, g_t, x_b, x_t, tail_b, tail_t, order_b, order_t,
    N: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_TAIL: tl.constexpr, HAS_ORDER: tl.constexpr,
    SILU: tl.constexpr, GROUPS: tl.constexpr, LENGTH: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """GROUPS stretches of LENGTH rows, walked side by side: each row of x and g is read once.

    ``past`` holds x of the N - 1 rows before t, latest first; ``pending`` the gradients of those rows, which
    row t adds to, the oldest for the last time. The walk goes N - 1 rows past the stretch to close them.
    """
    b = (tl.program_id(0) // blocks).to(tl.int64)
    first = ((tl.program_id(0) % blocks).to(tl.int64) * GROUPS + tl.arange(0, GROUPS))[:, None] * LENGTH
    c = (tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    inside = c < C
    x += b * x_b
    g += b * g_b
    tail += b * tail_b
    order += b * order_b
    dx += b * T * C
    dtail += b * (N - 1) * C
    zero = tl.zeros([GROUPS, BLOCK_C], tl.float32)
    shift = zero
    if HAS_BIAS:
        shift = zero + tl.load(bias + c, mask=inside, other=0.0).to(tl.float32)
    taps, past, pending, sums = (), (), (), (zero,)
    for back in tl.static_range(N):
        taps = taps + (tl.load(weight + c * N + (N - 1 - back), mask=inside, other=0.0).to(tl.float32),)
        sums = sums + (zero,)
    for back in tl.static_range(1, N):
        t = first - back
        past = past + (_row(x, tail, t, x_t, tail_t, c, inside & (t < T), N, HAS_TAIL),)
        pending = pending + (zero,)
    mask = inside & (first < T)
    next_x = tl.load(x + first * x_t + c, mask=mask, other=0.0)
    next_g = tl.load(g + first * g_t + c, mask=mask, other=0.0)
    for step in range(LENGTH + N - 1):
        t = first + step
        now = next_x.to(tl.float32)
        by_pre = next_g.to(tl.float32)
        # Asked for a row ahead of their use.
        mask = inside & (t + 1 < T)
        next_x = tl.load(x + (t + 1) * x_t + c, mask=mask, other=0.0)
        next_g = tl.load(g + (t + 1) * g_t + c, mask=mask, other=0.0)
        if HAS_ORDER:
            age = tl.load(order + t * order_t, mask=t < T, other=0)
        rows = (now,)
        for back in tl.static_range(1, N):
            row = past[back - 1]
            if HAS_ORDER:
                row = tl.where(age >= back, row, 0.0)
            rows = rows + (row,)
        if SILU:
            pre = shift
            for back in tl.static_range(N):
                pre += taps[back] * rows[back]
            sigmoid = 1.0 / (1.0 + tl.exp(-pre))
            by_pre = tl.where(t < T, by_pre * sigmoid * (1.0 + pre * (1.0 - sigmoid)), 0.0)
        own = tl.where(step < LENGTH, by_pre, 0.0)
        new_sums, new_pending = (sums[0] + own,), ()
        for back in tl.static_range(N):
            new_sums = new_sums + (sums[back + 1] + own * rows[back],)
            part = taps[back] * by_pre
            if back > 0:
                if HAS_ORDER:
                    part = tl.where(age >= back, part, 0.0)
                part += pending[back - 1]
            new_pending = new_pending + (part,)
        sums = new_sums
        row = t - (N - 1)
        closed = new_pending[N - 1]
        mask = inside & (row >= first) & (row < T)
        tl.store(dx + row * C + c, closed.to(dx.dtype.element_ty), mask=mask)
        if HAS_TAIL:
            mask = inside & (row < 0) & (first == 0)
            tl.store(dtail + (row + (N - 1)) * C + c, closed.to(dtail.dtype.element_ty), mask=mask)
        if N > 1:
            moved, still_pending = (now,), (new_pending[0],)
            for i in tl.static_range(N - 2):
                moved = moved + (past[i],)
                still_pending = still_pending + (new_pending[i + 1],)
            past, pending = moved, still_pending
    parts += tl.program_id(0).to(tl.int64) * (N + 1) * C
    for i in tl.static_range(N + 1):
        tl.store(parts + i * C + c, tl.sum(sums[i], axis=0)[None, :], mask=inside)


def _types(constants: dict) -> dict[str, str]:
    types = dict.fromkeys(("g", "x", "tail", "y", "dx", "dtail"), "*bf16")
    types |= dict.fromkeys(("weight", "bias", "parts"), "*fp32") | {"order": "*i32"}
    types |= dict.fromkeys(("T", "C", "blocks"), "i32")
    strides = (f"{name}_{axis}" for name in ("g", "x", "tail", "order") for axis in "bt")
    return types | dict.fromkeys(strides, "i64")


_PLAIN = {"HAS_BIAS": False, "HAS_TAIL": False, "HAS_ORDER": False}
_ALL = dict.fromkeys(_PLAIN, True)
_CASES = {
    "taps4": _PLAIN | {"N": 4, "SILU": False},
    "taps4_silu": _PLAIN | {"N": 4, "SILU": True},
    "taps4_documents": _ALL | {"N": 4, "SILU": True},
    "taps8_documents": _ALL | {"N": 8, "SILU": True},
}
FORWARD = Kernel(
    "short_conv_forward",
    forward,
    (
        Tile({"ROWS": 16, "BLOCK_C": 128}, 4, 1),
        Tile({"ROWS": 32, "BLOCK_C": 64}, 4, 1),
        Tile({"ROWS": 8, "BLOCK_C": 256}, 4, 1),
    ),
    _CASES,
    _types,
)
BACKWARD = Kernel(
    "short_conv_backward",
    backward,
    (
        Tile({"GROUPS": 4, "LENGTH": 32, "BLOCK_C": 128}, 4, 1),
        Tile({"GROUPS": 4, "LENGTH": 64, "BLOCK_C": 128}, 4, 1),
        Tile({"GROUPS": 8, "LENGTH": 32, "BLOCK_C": 64}, 4, 1),
        Tile({"GROUPS": 2, "LENGTH": 64, "BLOCK_C": 128}, 4, 1),
    ),
    _CASES,
    _types,
)
KERNELS: list[Kernel] = [FORWARD, BACKWARD]

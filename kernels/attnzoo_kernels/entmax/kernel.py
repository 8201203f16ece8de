"""Rows of alpha-entmax by bisection, a few rows to a program."""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo_kernels.launch import Kernel, Tile

# The longest row that stays in registers.
WHOLE = 16384
SHORT = 2048


@triton.jit
def _power(x, power):
    """[x]_+ ** power; exactly 0 where x <= 0, and NaN stays NaN."""
    off = x <= 0
    return tl.where(off, 0.0, tl.exp2(tl.log2(tl.where(off, 1.0, x)) * power))


@triton.jit
def _phi(t):
    """e^t - 1 - t e^t for t <= 0, by its series near 0, where the terms cancel."""
    series = 1 / 840 + t * (1 / 5760 + t * (1 / 45360 + t * (1 / 403200)))
    series = 1 / 2 + t * (1 / 3 + t * (1 / 8 + t * (1 / 30 + t * (1 / 144 + t * series))))
    direct = tl.exp2(t * 1.4426950408889634) * (1.0 - t) - 1.0
    return tl.where(t > -0.5, -t * t * series, direct)


@triton.jit
def _load(z, visible, at, seen_at, mask, HAS_VISIBLE: tl.constexpr):
    if HAS_VISIBLE:
        mask &= tl.load(visible + seen_at, mask=mask, other=0) != 0
    return tl.load(z + at, mask=mask, other=-float("inf")).to(tl.float32)


@triton.jit
def forward_whole(
    z, alpha, visible, p, rows, H, T, S, n_iter,
    z_b, z_h, z_t, v_b, v_h, v_t,
    HAS_VISIBLE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    t, h, b = row % T, row // T % H, row // T // H
    j = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (j < S)[None, :]
    at = (b * z_b + h * z_h + t * z_t)[:, None] + j[None, :]
    seen_at = (b * v_b + h * v_h + t * v_t)[:, None] + j[None, :]
    x = _load(z, visible, at, seen_at, mask, HAS_VISIBLE)
    less = tl.load(alpha + h) - 1.0
    power = 1.0 / less
    top = tl.max(x, axis=1)
    seen = top > -float("inf")
    u = less[:, None] * (x - tl.where(seen, top, 0.0)[:, None])
    low = tl.full([ROWS], -1.0, tl.float32)
    high = -tl.exp2(-tl.log2(S.to(tl.float32)) * less)
    for _ in range(n_iter):
        tau = (low + high) * 0.5
        enough = tl.sum(_power(u - tau[:, None], power[:, None]), axis=1) >= 1.0
        low, high = tl.where(enough, tau, low), tl.where(enough, high, tau)
    y = _power(u - low[:, None], power[:, None])
    total = tl.sum(y, axis=1)
    # A NaN among the operands must show: only rows that see nothing are set to 0.
    y = tl.where((top == -float("inf"))[:, None], 0.0, y / tl.where(total == 0, 1.0, total)[:, None])
    tl.store(p + row[:, None] * S + j[None, :], y.to(p.dtype.element_ty), mask=mask)


@triton.jit
def forward_blocks(
    z, alpha, visible, p, rows, H, T, S, n_iter,
    z_b, z_h, z_t, v_b, v_h, v_t,
    HAS_VISIBLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    t, h, b = row % T, row // T % H, row // T // H
    z += b * z_b + h * z_h + t * z_t
    visible += b * v_b + h * v_h + t * v_t
    p += row * S
    less = tl.load(alpha + h) - 1.0
    power = 1.0 / less
    j = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    for start in range(0, S, BLOCK):
        at = start + j
        best = tl.maximum(best, _load(z, visible, at, at, at < S, HAS_VISIBLE))
    top = tl.max(best, axis=0)
    shift = tl.where(top > -float("inf"), top, 0.0)
    low = -1.0 + 0.0 * less
    high = -tl.exp2(-tl.log2(S.to(tl.float32)) * less)
    # One round more than n_iter: it sums at the final tau, which is low.
    tau, total = low, low
    for i in range(n_iter + 1):
        tau = tl.where(i < n_iter, (low + high) * 0.5, low)
        parts = tl.zeros([BLOCK], tl.float32)
        for start in range(0, S, BLOCK):
            at = start + j
            x = _load(z, visible, at, at, at < S, HAS_VISIBLE)
            parts += _power(less * (x - shift) - tau, power)
        total = tl.sum(parts, axis=0)
        enough = total >= 1.0
        low, high = tl.where(enough, tau, low), tl.where(enough, high, tau)
    total = tl.where(total == 0, 1.0, total)
    for start in range(0, S, BLOCK):
        at = start + j
        x = _load(z, visible, at, at, at < S, HAS_VISIBLE)
        y = tl.where(top == -float("inf"), 0.0, _power(less * (x - shift) - low, power) / total)
        tl.store(p + at, y.to(p.dtype.element_ty), mask=at < S)


@triton.jit
def backward(g, p, alpha, dz, dalpha, H, T, S, BLOCK: tl.constexpr):
    """One row: dz, and the row's part of alpha's gradient; the formulas are the reference's."""
    row = tl.program_id(0).to(tl.int64)
    g += row * S
    p += row * S
    dz += row * S
    a = tl.load(alpha + row // T % H)
    j = tl.arange(0, BLOCK)
    sum_w = tl.zeros([BLOCK], tl.float32)
    sum_wg = tl.zeros([BLOCK], tl.float32)
    for start in range(0, S, BLOCK):
        at = start + j
        w = _power(tl.load(p + at, mask=at < S, other=0.0).to(tl.float32), 2.0 - a)
        sum_w += w
        sum_wg += w * tl.load(g + at, mask=at < S, other=0.0).to(tl.float32)
    total = tl.sum(sum_w, axis=0)
    mean = tl.sum(sum_wg, axis=0) / tl.where(total == 0, 1.0, total)
    part = tl.zeros([BLOCK], tl.float32)
    power = 1.0 / (a - 1.0)
    for start in range(0, S, BLOCK):
        at = start + j
        y = tl.load(p + at, mask=at < S, other=0.0).to(tl.float32)
        centred = tl.load(g + at, mask=at < S, other=0.0).to(tl.float32) - mean
        by_score = _power(y, 2.0 - a) * centred
        tl.store(dz + at, by_score.to(dz.dtype.element_ty), mask=at < S)
        log = tl.log2(tl.where(y > 0, y, 1.0)) * 0.6931471805599453
        part += by_score * _phi((a - 1.0) * log) * (power * power)
    tl.store(dalpha + row, tl.sum(part, axis=0))


_ROWS = {"z": "*bf16", "alpha": "*fp32", "visible": "*i1", "p": "*bf16", "rows": "i64"} | dict.fromkeys(
    ("H", "T", "S", "n_iter"), "i32"
)
_FORWARD = _ROWS | dict.fromkeys(("z_b", "z_h", "z_t", "v_b", "v_h", "v_t"), "i64")
_BACKWARD = dict.fromkeys(("g", "p", "dz"), "*bf16") | dict.fromkeys(("alpha", "dalpha"), "*fp32")

SHORT_ROWS = Kernel(
    "entmax_forward_short",
    forward_whole,
    (Tile({"ROWS": 1}, 4, 1), Tile({"ROWS": 2}, 4, 1)),
    {"bf16": {"HAS_VISIBLE": False, "BLOCK": SHORT}, "bf16_visible": {"HAS_VISIBLE": True, "BLOCK": SHORT}},
    _FORWARD,
)
LONG_ROWS = Kernel(
    "entmax_forward_long",
    forward_whole,
    (
        Tile({"ROWS": 1}, 8, 1, ("sm_80", "sm_90", "gfx942")),
        Tile({"ROWS": 1}, 16, 1, ("sm_90", "sm_100", "gfx942")),
    ),
    {"bf16": {"HAS_VISIBLE": False, "BLOCK": WHOLE}, "bf16_visible": {"HAS_VISIBLE": True, "BLOCK": WHOLE}},
    _FORWARD,
)
BLOCKS = Kernel(
    "entmax_forward_blocks",
    forward_blocks,
    (Tile({"BLOCK": 2048}, 4, 1), Tile({"BLOCK": 4096}, 8, 1, ("sm_90", "sm_100", "gfx942"))),
    {"bf16": {"HAS_VISIBLE": False}, "bf16_visible": {"HAS_VISIBLE": True}},
    _FORWARD,
)
BACKWARD = Kernel(
    "entmax_backward",
    backward,
    (
        Tile({"BLOCK": 1024}, 4, 1),
        Tile({"BLOCK": 2048}, 4, 1, ("sm_80", "sm_90", "gfx942")),
        Tile({"BLOCK": 4096}, 8, 1),
    ),
    {"bf16": {}},
    _BACKWARD | dict.fromkeys(("H", "T", "S"), "i32"),
)
KERNELS: list[Kernel] = [SHORT_ROWS, LONG_ROWS, BLOCKS, BACKWARD]

"""Forward of attention: a block of query rows against the keys that it can see, tile by tile.

Tiles at the edges of what a block sees are masked; those that every row sees are not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo_kernels.attention.kernel_scores import (
    CLIPPED,
    LN_2,
    RELU,
    SIGMOID,
    SIGNED,
    SOFTMAX,
    SOFTPLUS,
    load_tile,
    score,
    softplus,
    store_tile,
    visible,
    weigh,
)
from attnzoo_kernels.launch import NVIDIA, Kernel, Tile


@triton.jit
def ranges(own, first, window, n_sink, S, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """Key tiles of some rows: sinks' start and number, left edge's start, full ones' start and stop, stop."""
    valid = own >= first
    low = first
    if WINDOW:
        low = tl.maximum(first, own - window + 1)
    start = tl.maximum(tl.min(tl.where(valid, low, S), 0), 0) // BLOCK_N * BLOCK_N
    stop = tl.minimum(tl.max(tl.where(valid, own + 1, 0), 0), S)
    whole = tl.cdiv(tl.max(tl.where(valid, low, S), 0), BLOCK_N) * BLOCK_N
    whole_stop = tl.min(tl.where(valid, own + 1, 0), 0) // BLOCK_N * BLOCK_N
    whole = tl.minimum(tl.maximum(whole, start), tl.maximum(stop, start))
    whole_stop = tl.maximum(tl.minimum(whole_stop, stop), whole)
    sink, sinks = start, 0
    if WINDOW:
        sink = tl.maximum(tl.min(tl.where(valid, first, S), 0), 0) // BLOCK_N * BLOCK_N
        sink_stop = tl.minimum(tl.max(tl.where(valid, first, 0), 0) + n_sink, start)
        sinks = tl.where(n_sink > 0, tl.cdiv(tl.maximum(sink_stop - sink, 0), BLOCK_N), 0)
    return sink, sinks, start, whole, whole_stop, stop


@triton.jit
def edge(i, sink, sinks, start, whole, whole_stop, BLOCK_N: tl.constexpr):
    """Start of the i-th masked tile: sinks, then the left edge, then the right one."""
    left = tl.cdiv(whole - start, BLOCK_N)
    at = tl.where(i < sinks, sink + i * BLOCK_N, start + (i - sinks) * BLOCK_N)
    return tl.where(i < sinks + left, at, whole_stop + (i - sinks - left) * BLOCK_N)


@triton.jit
def edges(sinks, start, whole, whole_stop, stop, BLOCK_N: tl.constexpr):
    """Number of masked tiles."""
    return sinks + tl.cdiv(whole - start, BLOCK_N) + tl.cdiv(tl.maximum(stop - whole_stop, 0), BLOCK_N)


@triton.jit
def _step(
    acc, top, total, q, k, v, j0, n, own, first, k_s, v_s, S, scale, cap, slope, bias, low, high,
    window, n_sink, norm,
    D: tl.constexpr, D_V: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr, NORM: tl.constexpr,
    PASS: tl.constexpr, CAP: tl.constexpr, SLOPES: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of keys. PASS 0 gathers the normaliser alone, 1 values under a known one, 2 both at once."""
    keys = load_tile(k, j0, S, k_s, n, D, WIDE, BLOCK_N)
    qk = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    j = (j0 + n)[None, :]
    s, _ = score(qk, own[:, None] - j, scale, cap, slope, bias, CAP, SLOPES, BIAS)
    seen = visible(own[:, None], first[:, None], j, window, n_sink, WINDOW)
    if PASS == 1:
        w = weigh(s, norm[:, None], low, high, NORM)
        if MASKED:
            w = tl.where(seen, w, 0.0)
    elif NORM == SOFTPLUS:
        w = softplus(s)
        if MASKED:
            w = tl.where(seen, w, 0.0)
        total += tl.sum(w, 1)
    else:
        z = s
        if NORM == SIGNED:
            z = tl.abs(s)
        if MASKED:
            z = tl.where(seen, z, -float("inf"))
        new = tl.maximum(top, tl.max(z, 1))
        shift = new
        if MASKED:
            shift = tl.where(new == -float("inf"), 0.0, new)
        w = tl.exp2(z - shift[:, None])
        decay = tl.exp2(top - shift)
        total = total * decay + tl.sum(w, 1)
        if NORM == SIGNED:
            w = tl.where(s > 0, w, tl.where(s < 0, -w, 0.0))
        if PASS == 2:
            acc = acc * decay[:, None]
        top = new
    if PASS > 0:
        values = load_tile(v, j0, S, v_s, n, D_V, WIDE_V, BLOCK_N)
        acc = tl.dot(w.to(values.dtype), values, acc, input_precision=PRECISION)
    return acc, top, total


@triton.jit
def forward(
    q, k, v, o, saved, own, first, slopes, biases, sinks_of,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, span_b, H, G, T, S,
    scale, cap, unit, low, high, window, n_sink,
    D: tl.constexpr, D_V: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr, NORM: tl.constexpr,
    SINK: tl.constexpr, CAP: tl.constexpr, SLOPES: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """o (B,H,T,D_V) and saved (B,H,T): log-sum-exp, or the sum of softplus. ``unit``: of the scores."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)  # blocks with the most keys start first
    x = tl.program_id(1).to(tl.int64)
    b, h = x // H, x % H
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    t0 = block * BLOCK_M
    rows = tl.minimum(t0 + m, T - 1)
    mine, start_of = tl.load(own + b * span_b + rows), tl.load(first + b * span_b + rows)
    query = load_tile(q + b * q_b + h * q_h, t0, T, q_t, m, D, WIDE, BLOCK_M)
    g = h // (H // G)
    k += b * k_b + g * k_h
    v += b * v_b + g * v_h
    slope, bias = 0.0, 0.0
    if SLOPES:
        slope = tl.load(slopes + h) * unit
    if BIAS:
        bias = tl.load(biases + h) * unit

    sink, sinks, start, whole, whole_stop, stop = ranges(mine, start_of, window, n_sink, S, WINDOW, BLOCK_N)
    masked = edges(sinks, start, whole, whole_stop, stop, BLOCK_N)
    acc = tl.zeros([BLOCK_M, WIDE_V], tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    norm = total
    ONLINE: tl.constexpr = (NORM <= SIGNED) | (NORM == SOFTPLUS)
    if NORM == CLIPPED:
        for j0 in range(whole, whole_stop, BLOCK_N):
            acc, top, total = _step(
                acc, top, total, query, k, v, j0, n, mine, start_of, k_s, v_s, S, scale, cap, slope, bias,
                low, high, window, n_sink, norm, D, D_V, WIDE, WIDE_V, NORM, 0, CAP, SLOPES, BIAS, WINDOW,
                False, PRECISION, BLOCK_N,
            )  # fmt: skip
        for i in range(masked):
            j0 = edge(i, sink, sinks, start, whole, whole_stop, BLOCK_N)
            acc, top, total = _step(
                acc, top, total, query, k, v, j0, n, mine, start_of, k_s, v_s, S, scale, cap, slope, bias,
                low, high, window, n_sink, norm, D, D_V, WIDE, WIDE_V, NORM, 0, CAP, SLOPES, BIAS, WINDOW,
                True, PRECISION, BLOCK_N,
            )  # fmt: skip
        norm = tl.where(total == 0, 0.0, top + tl.log2(tl.where(total == 0, 1.0, total)))
    for j0 in range(whole, whole_stop, BLOCK_N):
        acc, top, total = _step(
            acc, top, total, query, k, v, j0, n, mine, start_of, k_s, v_s, S, scale, cap, slope, bias,
            low, high, window, n_sink, norm, D, D_V, WIDE, WIDE_V, NORM, 1 + ONLINE, CAP, SLOPES, BIAS,
            WINDOW, False, PRECISION, BLOCK_N,
        )  # fmt: skip
    for i in range(masked):
        j0 = edge(i, sink, sinks, start, whole, whole_stop, BLOCK_N)
        acc, top, total = _step(
            acc, top, total, query, k, v, j0, n, mine, start_of, k_s, v_s, S, scale, cap, slope, bias,
            low, high, window, n_sink, norm, D, D_V, WIDE, WIDE_V, NORM, 1 + ONLINE, CAP, SLOPES, BIAS,
            WINDOW, True, PRECISION, BLOCK_N,
        )  # fmt: skip

    empty = total == 0
    if SINK:
        # the sink joins the sum at the scale of the larger of the two
        beta = tl.load(sinks_of + h) * unit
        new = tl.maximum(top, beta)
        decay = tl.where(empty, 0.0, tl.exp2(top - new))
        total = total * decay + tl.exp2(beta - new)
        acc = acc * decay[:, None]
        top = new
    if ONLINE:
        acc = tl.where(empty[:, None], 0.0, acc / tl.where(empty, 1.0, total)[:, None])
    store_tile(o + x * T * D_V, acc, t0, T, D_V, m, D_V, WIDE_V)
    if NORM <= CLIPPED:
        lse = (top + tl.log2(tl.where(empty, 1.0, total))) * LN_2
        tl.store(saved + x * T + t0 + m, tl.where(empty, -float("inf"), lse), mask=t0 + m < T)
    elif NORM == SOFTPLUS:
        tl.store(saved + x * T + t0 + m, total, mask=t0 + m < T)


_HALVES, _FP32 = ("q", "k", "v", "o"), ("saved", "slopes", "biases", "sinks_of")
STRIDES = ("q_b", "q_h", "q_t", "k_b", "k_h", "k_s", "v_b", "v_h", "v_s")
_TYPES = (
    dict.fromkeys(_HALVES, "*bf16")
    | dict.fromkeys(_FP32, "*fp32")
    | dict.fromkeys(("own", "first"), "*i32")
    | dict.fromkeys(STRIDES, "i64")
    | dict.fromkeys(("span_b", "H", "G", "T", "S", "window", "n_sink"), "i32")
    | dict.fromkeys(("scale", "cap", "unit", "low", "high"), "fp32")
)


def case(d: int, norm: tl.constexpr, **flags: bool) -> dict[str, object]:
    """Constants of a specialisation for the resource table."""
    off = dict.fromkeys(("SINK", "CAP", "SLOPES", "BIAS", "WINDOW"), False)
    sizes = {"D": d, "D_V": d, "WIDE": d, "WIDE_V": d, "NORM": norm.value, "PRECISION": "ieee"}
    return sizes | off | flags


def cases(d: int) -> dict[str, dict[str, object]]:
    """Of a width for the resource table: all normalisers at the usual 128, the extremes elsewhere."""
    found = {
        f"bf16_{d}_softmax": case(d, SOFTMAX),
        f"bf16_{d}_sink_window_cap": case(d, SOFTMAX, SINK=True, WINDOW=True, CAP=True),
        f"bf16_{d}_sigmoid": case(d, SIGMOID, BIAS=True),
    }
    if d == 128:
        found |= {
            f"bf16_{d}_signed": case(d, SIGNED),
            f"bf16_{d}_clipped": case(d, CLIPPED),
            f"bf16_{d}_relu": case(d, RELU),
            f"bf16_{d}_softplus": case(d, SOFTPLUS, SLOPES=True),
        }
    return found


HOPPER = ("sm_90", "sm_100")
# By the widest of queries, keys and values.
FORWARD = {
    64: (
        Tile({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 3, ("sm_90", "sm_100", "gfx942")),
        Tile({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 2, ("sm_90", "sm_100", "gfx942")),
        Tile({"BLOCK_M": 64, "BLOCK_N": 32}, 4, 2),
    ),
    128: (
        Tile({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 3, ("sm_90",)),
        Tile({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 2, ("sm_90",)),
        Tile({"BLOCK_M": 128, "BLOCK_N": 32}, 8, 2, ("sm_90", "sm_100", "gfx942")),
        Tile({"BLOCK_M": 64, "BLOCK_N": 32}, 4, 2),
    ),
    256: (
        Tile({"BLOCK_M": 64, "BLOCK_N": 32}, 8, 2, NVIDIA),
        Tile({"BLOCK_M": 64, "BLOCK_N": 32}, 4, 2, ("gfx942",)),
    ),
}
FORWARD = {
    d: Kernel(f"attention_forward_{d}", forward, tiles, cases(d), _TYPES) for d, tiles in FORWARD.items()
}
KERNELS: list[Kernel] = [*FORWARD.values()]

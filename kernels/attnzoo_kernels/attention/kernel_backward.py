"""Backward of attention: queries' gradient by blocks of rows, keys' and values' by blocks of keys."""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo_kernels.attention.kernel_forward import (
    HOPPER,
    STRIDES,
    cases,
    edge,
    edges,
    ranges,
)
from attnzoo_kernels.attention.kernel_scores import (
    CLIPPED,
    gradient,
    load_tile,
    row_norm,
    score,
    store_tile,
    unclipped,
    visible,
    weigh,
)
from attnzoo_kernels.launch import NVIDIA, Kernel, Tile


@triton.jit
def delta(
    o, do, dlse, out, rows, D_V: tl.constexpr, WIDE_V: tl.constexpr, LSE: tl.constexpr, BLOCK: tl.constexpr
):
    """do . o of every row, less the gradient of its log-sum-exp."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, WIDE_V)
    inside = (row < rows)[:, None] & (d < D_V)[None, :]
    at = row[:, None] * D_V + d[None, :]
    x = tl.load(o + at, mask=inside, other=0.0).to(tl.float32)
    total = tl.sum(x * tl.load(do + at, mask=inside, other=0.0).to(tl.float32), 1)
    if LSE:
        total -= tl.load(dlse + row, mask=row < rows, other=0.0)
    tl.store(out + row, total, mask=row < rows)


@triton.jit
def _below(x, T, step, limit):
    """How many of the nondecreasing x[:T] are below each limit, by steps halved from a power of 2 >= T."""
    found = 0 * limit
    while step > 0:
        here = found + step <= T
        value = tl.load(x + tl.where(here, found + step - 1, 0))
        found = tl.where(here & (value < limit), found + step, found)
        step = step // 2
    return found


@triton.jit
def bounds(
    own, first, out, T, step, S, tiles, window, n_sink,
    WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """For every tile of keys, start and end of the rows that see some of it: (B, 2, tiles).

    own and first are made nondecreasing, rows that see nothing being beyond all keys.
    """
    b = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j0 = tile * BLOCK_N
    j1 = tl.minimum(j0 + BLOCK_N, S) - 1
    own += b * T
    first += b * T
    start = _below(own, T, step, j0)
    last = _below(first, T, step, j1 + 1)
    stop = last
    if WINDOW:
        stop = tl.minimum(last, _below(own, T, step, j1 + window))
        # sinks: the last row of those documents that begin at or before the tile
        document = tl.load(first + tl.maximum(last - 1, 0))
        stop = tl.where((last > 0) & (n_sink > 0) & (document + n_sink > j0), last, stop)
    out += b * 2 * tiles + tile
    tl.store(out, start, mask=tile < tiles)
    tl.store(out + tiles, tl.maximum(stop, start), mask=tile < tiles)


@triton.jit
def _queries_step(
    dq, sums, q, do, k, v, j0, n, own, first, k_s, v_s, S, norm, d_row, scale, cap, slope, bias, low, high,
    window, n_sink,
    D: tl.constexpr, D_V: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr, NORM: tl.constexpr,
    FIRST: tl.constexpr, CAP: tl.constexpr, SLOPES: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of keys. FIRST sums p dp of the clipped softmax into ``sums``; else sums takes those of ds."""
    keys = load_tile(k, j0, S, k_s, n, D, WIDE, BLOCK_N)
    values = load_tile(v, j0, S, v_s, n, D_V, WIDE_V, BLOCK_N)
    qk = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    j = (j0 + n)[None, :]
    s, chain = score(qk, own[:, None] - j, scale, cap, slope, bias, CAP, SLOPES, BIAS)
    dp = tl.dot(do, tl.trans(values), input_precision=PRECISION)
    seen = visible(own[:, None], first[:, None], j, window, n_sink, WINDOW)
    if FIRST:
        p, free = unclipped(s, norm[:, None], low, high)
        if MASKED:
            free = free & seen
        sums += tl.sum(tl.where(free, p * dp, 0.0), 1)
    else:
        ds = gradient(s, dp, norm[:, None], d_row[:, None], low, high, NORM)
        if MASKED:
            ds = tl.where(seen, ds, 0.0)
        if BIAS:
            sums += tl.sum(ds, 1)
        if CAP:
            ds = ds * chain
        dq = tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)
    return dq, sums


@triton.jit
def queries(
    q, k, v, do, dq, saved, deltas, dbiases, own, first, slopes, biases,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, span_b, H, G, T, S,
    scale, cap, unit, factor, low, high, window, n_sink,
    D: tl.constexpr, D_V: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr, NORM: tl.constexpr,
    CAP: tl.constexpr, SLOPES: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq (B,H,T,D); dbiases (B,H,T) rows of the bias's gradient. Clipped softmax writes ``deltas`` first.

    ``factor``: of dq, the scores' natural scale.
    """
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    x = tl.program_id(1).to(tl.int64)
    b, h = x // H, x % H
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    t0 = block * BLOCK_M
    rows = tl.minimum(t0 + m, T - 1)
    mine, start_of = tl.load(own + b * span_b + rows), tl.load(first + b * span_b + rows)
    query = load_tile(q + b * q_b + h * q_h, t0, T, q_t, m, D, WIDE, BLOCK_M)
    dout = load_tile(do + x * T * D_V, t0, T, D_V, m, D_V, WIDE_V, BLOCK_M)
    g = h // (H // G)
    k += b * k_b + g * k_h
    v += b * v_b + g * v_h
    slope, bias = 0.0, 0.0
    if SLOPES:
        slope = tl.load(slopes + h) * unit
    if BIAS:
        bias = tl.load(biases + h) * unit
    at, inside = x * T + t0 + m, t0 + m < T
    norm = row_norm(saved, at, inside, NORM)
    sink, sinks, start, whole, whole_stop, stop = ranges(mine, start_of, window, n_sink, S, WINDOW, BLOCK_N)
    masked = edges(sinks, start, whole, whole_stop, stop, BLOCK_N)
    acc = tl.zeros([BLOCK_M, WIDE], tl.float32)
    sums = tl.zeros([BLOCK_M], tl.float32)
    if NORM == CLIPPED:
        for j0 in range(whole, whole_stop, BLOCK_N):
            acc, sums = _queries_step(
                acc, sums, query, dout, k, v, j0, n, mine, start_of, k_s, v_s, S, norm, sums, scale, cap,
                slope, bias, low, high, window, n_sink, D, D_V, WIDE, WIDE_V, NORM, True, CAP, SLOPES, BIAS,
                WINDOW, False, PRECISION, BLOCK_N,
            )  # fmt: skip
        for i in range(masked):
            j0 = edge(i, sink, sinks, start, whole, whole_stop, BLOCK_N)
            acc, sums = _queries_step(
                acc, sums, query, dout, k, v, j0, n, mine, start_of, k_s, v_s, S, norm, sums, scale, cap,
                slope, bias, low, high, window, n_sink, D, D_V, WIDE, WIDE_V, NORM, True, CAP, SLOPES, BIAS,
                WINDOW, True, PRECISION, BLOCK_N,
            )  # fmt: skip
        d_row = sums
        tl.store(deltas + at, d_row, mask=inside)
        sums = tl.zeros([BLOCK_M], tl.float32)
    else:
        d_row = tl.load(deltas + at, mask=inside, other=0.0)
    for j0 in range(whole, whole_stop, BLOCK_N):
        acc, sums = _queries_step(
            acc, sums, query, dout, k, v, j0, n, mine, start_of, k_s, v_s, S, norm, d_row, scale, cap, slope,
            bias, low, high, window, n_sink, D, D_V, WIDE, WIDE_V, NORM, False, CAP, SLOPES, BIAS, WINDOW,
            False, PRECISION, BLOCK_N,
        )  # fmt: skip
    for i in range(masked):
        j0 = edge(i, sink, sinks, start, whole, whole_stop, BLOCK_N)
        acc, sums = _queries_step(
            acc, sums, query, dout, k, v, j0, n, mine, start_of, k_s, v_s, S, norm, d_row, scale, cap, slope,
            bias, low, high, window, n_sink, D, D_V, WIDE, WIDE_V, NORM, False, CAP, SLOPES, BIAS, WINDOW,
            True, PRECISION, BLOCK_N,
        )  # fmt: skip
    store_tile(dq + x * T * D, acc * factor, t0, T, D, m, D, WIDE)
    if BIAS:
        tl.store(dbiases + at, sums, mask=inside)


@triton.jit
def _keys_step(
    dk, dv, k, v, q, do, saved, deltas, own, first, t0, m, j, q_t, T, scale, cap, slope, bias, low, high,
    window, n_sink,
    D: tl.constexpr, D_V: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr, NORM: tl.constexpr,
    CAP: tl.constexpr, SLOPES: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One block of rows, against a tile of keys that stands in the rows of all products."""
    query = load_tile(q, t0, T, q_t, m, D, WIDE, BLOCK_M)
    dout = load_tile(do, t0, T, D_V, m, D_V, WIDE_V, BLOCK_M)
    inside = t0 + m < T
    norm = row_norm(saved, t0 + m, inside, NORM)
    d_row = tl.load(deltas + t0 + m, mask=inside, other=0.0)
    rows = tl.minimum(t0 + m, T - 1)
    mine = tl.load(own + rows)
    qk = tl.dot(k, tl.trans(query), input_precision=PRECISION)
    s, chain = score(qk, mine[None, :] - j[:, None], scale, cap, slope, bias, CAP, SLOPES, BIAS)
    w = weigh(s, norm[None, :], low, high, NORM)
    dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
    ds = gradient(s, dp, norm[None, :], d_row[None, :], low, high, NORM)
    start_of = tl.load(first + rows)
    seen = visible(mine[None, :], start_of[None, :], j[:, None], window, n_sink, WINDOW) & inside[None, :]
    w, ds = tl.where(seen, w, 0.0), tl.where(seen, ds, 0.0)
    if CAP:
        ds = ds * chain
    dv = tl.dot(w.to(dout.dtype), dout, dv, input_precision=PRECISION)
    dk = tl.dot(ds.to(query.dtype), query, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def keys(
    q, k, v, do, dk, dv, saved, deltas, own, first, limits, slopes, biases,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, span_b, H, G, T, S,
    scale, cap, unit, factor, low, high, window, n_sink,
    D: tl.constexpr, D_V: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr, NORM: tl.constexpr,
    CAP: tl.constexpr, SLOPES: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk (B,G,S,D) and dv (B,G,S,D_V): the query heads of a group one after another. limits: see `bounds`."""
    tile, x = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, g = x // G, x % G
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    j0 = tile * BLOCK_N
    j = j0 + n
    key = load_tile(k + b * k_b + g * k_h, j0, S, k_s, n, D, WIDE, BLOCK_N)
    value = load_tile(v + b * v_b + g * v_h, j0, S, v_s, n, D_V, WIDE_V, BLOCK_N)
    tiles = tl.num_programs(0)
    limits += tl.where(span_b > 0, b, 0) * 2 * tiles + tile
    start, stop = tl.load(limits) // BLOCK_M * BLOCK_M, tl.load(limits + tiles)
    own += b * span_b
    first += b * span_b
    dkey = tl.zeros([BLOCK_N, WIDE], tl.float32)
    dvalue = tl.zeros([BLOCK_N, WIDE_V], tl.float32)
    group = H // G
    for r in range(group):
        h = g * group + r
        y = b * H + h
        slope, bias = 0.0, 0.0
        if SLOPES:
            slope = tl.load(slopes + h) * unit
        if BIAS:
            bias = tl.load(biases + h) * unit
        query, dout = q + b * q_b + h * q_h, do + y * T * D_V
        for t0 in range(start, stop, BLOCK_M):
            dkey, dvalue = _keys_step(
                dkey, dvalue, key, value, query, dout, saved + y * T, deltas + y * T, own, first, t0, m, j,
                q_t, T, scale, cap, slope, bias, low, high, window, n_sink, D, D_V, WIDE, WIDE_V, NORM, CAP,
                SLOPES, BIAS, WINDOW, PRECISION, BLOCK_M,
            )  # fmt: skip
    store_tile(dk + x * S * D, dkey * factor, j0, S, D, n, D, WIDE)
    store_tile(dv + x * S * D_V, dvalue, j0, S, D_V, n, D_V, WIDE_V)


_TYPES = (
    dict.fromkeys(("q", "k", "v", "do", "dq", "dk", "dv"), "*bf16")
    | dict.fromkeys(("saved", "deltas", "dbiases", "slopes", "biases"), "*fp32")
    | dict.fromkeys(("own", "first", "limits"), "*i32")
    | dict.fromkeys(STRIDES, "i64")
    | dict.fromkeys(("span_b", "H", "G", "T", "S", "window", "n_sink"), "i32")
    | dict.fromkeys(("scale", "cap", "unit", "factor", "low", "high"), "fp32")
)


def _cases(d: int) -> dict[str, dict[str, object]]:
    return {name: {key: x for key, x in one.items() if key != "SINK"} for name, one in cases(d).items()}


def _by_width(name: str, fn: object, tiles: dict[int, tuple[Tile, ...]]) -> dict[int, Kernel]:
    return {d: Kernel(f"attention_{name}_{d}", fn, own, _cases(d), _TYPES) for d, own in tiles.items()}


QUERIES = _by_width("queries", queries, {
    64: (
        Tile({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 2, NVIDIA),
        Tile({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 2, ("sm_90", "sm_100", "gfx942")),
        Tile({"BLOCK_M": 64, "BLOCK_N": 32}, 4, 2),
    ),
    128: (
        Tile({"BLOCK_M": 128, "BLOCK_N": 64}, 8, 2, HOPPER),
        Tile({"BLOCK_M": 64, "BLOCK_N": 32}, 8, 2, ("sm_80", "sm_90")),
        Tile({"BLOCK_M": 64, "BLOCK_N": 32}, 4, 2, ("sm_90", "sm_100", "gfx942")),
    ),
    256: (
        Tile({"BLOCK_M": 64, "BLOCK_N": 16}, 8, 1, ("sm_80", "sm_100")),
        Tile({"BLOCK_M": 32, "BLOCK_N": 16}, 4, 1),
    ),
})  # fmt: skip
KEYS = _by_width("keys", keys, {
    64: (
        Tile({"BLOCK_M": 32, "BLOCK_N": 128}, 8, 2, NVIDIA),
        Tile({"BLOCK_M": 32, "BLOCK_N": 64}, 8, 2, NVIDIA),
        Tile({"BLOCK_M": 32, "BLOCK_N": 32}, 4, 1, ("gfx942",)),
        Tile({"BLOCK_M": 16, "BLOCK_N": 32}, 4, 1, ("gfx942",)),
    ),
    128: (
        Tile({"BLOCK_M": 32, "BLOCK_N": 64}, 8, 2, ("sm_80", "sm_90")),
        Tile({"BLOCK_M": 16, "BLOCK_N": 128}, 8, 2, ("sm_90",)),
        Tile({"BLOCK_M": 32, "BLOCK_N": 128}, 8, 1, ("sm_100",)),
        Tile({"BLOCK_M": 64, "BLOCK_N": 32}, 8, 2, ("sm_80",)),
        Tile({"BLOCK_M": 32, "BLOCK_N": 32}, 4, 1, ("gfx942",)),
        Tile({"BLOCK_M": 16, "BLOCK_N": 32}, 4, 1, ("gfx942",)),
    ),
    256: (
        Tile({"BLOCK_M": 32, "BLOCK_N": 32}, 8, 1, NVIDIA),
        Tile({"BLOCK_M": 32, "BLOCK_N": 16}, 4, 1),
    ),
})  # fmt: skip
DELTA = Kernel(
    "attention_delta",
    delta,
    (Tile({"BLOCK": 32}, 4, 1), Tile({"BLOCK": 8}, 4, 1)),
    {"bf16_128": {"D_V": 128, "WIDE_V": 128, "LSE": False}},
    {"o": "*bf16", "do": "*bf16", "dlse": "*fp32", "out": "*fp32", "rows": "i32"},
)
BOUNDS = Kernel(
    "attention_bounds",
    bounds,
    (Tile({"BLOCK": 128}, 4, 1),),
    {"window": {"WINDOW": True, "BLOCK_N": 64}},
    dict.fromkeys(("own", "first", "out"), "*i32")
    | dict.fromkeys(("T", "step", "S", "tiles", "window", "n_sink"), "i32"),
)
KERNELS: list[Kernel] = [*QUERIES.values(), *KEYS.values(), DELTA, BOUNDS]

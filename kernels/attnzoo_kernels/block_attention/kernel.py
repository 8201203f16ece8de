"""Attention to listed key blocks.

A tile of rows holds some queries of a block in all heads that share its list, so that lists per token still
fill a tensor-core tile.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo_kernels.attention.kernel_scores import LN_2, LOG2_E, load_tile, store_tile, visible
from attnzoo_kernels.launch import NVIDIA, Kernel, Tile


@triton.jit
def _rows(t0, l, T, heads, ROWS: tl.constexpr, QUERIES: tl.constexpr):
    """Token and head of every row of a tile, and which exist: heads are next to each other."""
    m = tl.arange(0, ROWS)
    t = t0 + m // heads
    return t, l * heads + m % heads, (m < QUERIES * heads) & (t < T)


@triton.jit
def _load_rows(x, t, h, inside, by_h, by_t, D: tl.constexpr, WIDE: tl.constexpr):
    d = tl.arange(0, WIDE)
    at = h.to(tl.int64) * by_h + t.to(tl.int64) * by_t
    return tl.load(x + at[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def forward(
    q, k, v, blocks, o, lse, own, first, q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, span_b,
    H, G, L, T, S, number, scale, window, n_sink,
    D: tl.constexpr, D_V: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr, WINDOW: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """o (B,H,T,D_V) and lse (B,H,T). ``number`` of blocks per list; ``scale`` includes log2 e."""
    tile, x = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, l = x // L, x % L
    t, h, inside = _rows(tile * QUERIES, l, T, H // L, ROWS, QUERIES)
    rows = tl.minimum(t, T - 1)
    mine, start = tl.load(own + b * span_b + rows), tl.load(first + b * span_b + rows)
    query = _load_rows(q + b * q_b, t, h, inside, q_h, q_t, D, WIDE)
    g = l // (L // G)
    k += b * k_b + g * k_h
    v += b * v_b + g * v_h
    queries = tl.cdiv(T, QUERY_BLOCK)
    blocks += (x * queries + tile * QUERIES // QUERY_BLOCK) * number
    n = tl.arange(0, KEYS)
    acc = tl.zeros([ROWS, WIDE_V], tl.float32)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for i in range(number):
        block = tl.load(blocks + i).to(tl.int32)
        if block >= 0:
            j0 = block * KEYS
            keys = load_tile(k, j0, S, k_s, n, D, WIDE, KEYS)
            s = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
            j = (j0 + n)[None, :]
            seen = visible(mine[:, None], start[:, None], j, window, n_sink, WINDOW) & (j < S)
            s = tl.where(seen, s, -float("inf"))
            new = tl.maximum(top, tl.max(s, 1))
            shift = tl.where(new == -float("inf"), 0.0, new)
            p = tl.exp2(s - shift[:, None])
            decay = tl.exp2(top - shift)
            total = total * decay + tl.sum(p, 1)
            values = load_tile(v, j0, S, v_s, n, D_V, WIDE_V, KEYS)
            acc = tl.dot(p.to(values.dtype), values, acc * decay[:, None], input_precision=PRECISION)
            top = new
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    d = tl.arange(0, WIDE_V)
    at = (b * H + h) * T + t
    mask = inside[:, None] & (d < D_V)[None, :]
    tl.store(o + at[:, None] * D_V + d[None, :], (acc / total[:, None]).to(o.dtype.element_ty), mask=mask)
    tl.store(lse + at, tl.where(empty, -float("inf"), (top + tl.log2(total)) * LN_2), mask=inside)


@triton.jit
def _pair(query, dout, keys, values, mine, start, norm, delta, j, S, scale, window, n_sink,
          WINDOW: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Weights and the scores' gradient of rows against a block of keys."""
    s = tl.dot(query, tl.trans(keys), input_precision=PRECISION) * scale
    seen = visible(mine[:, None], start[:, None], j, window, n_sink, WINDOW) & (j < S)
    p = tl.where(seen, tl.exp2(s - norm[:, None]), 0.0)
    dp = tl.dot(dout, tl.trans(values), input_precision=PRECISION)
    return p, tl.where(seen, p * (dp - delta[:, None]), 0.0)


@triton.jit
def _row_state(own, first, lse, deltas, b, t, h, inside, span_b, H, T):
    """What the backward needs of rows; those beyond T see nothing."""
    rows = tl.minimum(t, T - 1)
    mine = tl.where(inside, tl.load(own + b * span_b + rows), -1)
    start = tl.where(inside, tl.load(first + b * span_b + rows), 0)
    at = (b * H + h) * T + t
    norm = tl.load(lse + at, mask=inside, other=0.0)
    norm = tl.where(norm == -float("inf"), 0.0, norm * LOG2_E)
    return mine, start, norm, tl.load(deltas + at, mask=inside, other=0.0), at


@triton.jit
def queries(
    q, k, v, do, dq, blocks, lse, deltas, own, first,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, span_b, H, G, L, T, S, number, scale, factor, window, n_sink,
    D: tl.constexpr, D_V: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr, WINDOW: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq (B,H,T,D); ``factor``: the natural scale."""
    tile, x = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, l = x // L, x % L
    t, h, inside = _rows(tile * QUERIES, l, T, H // L, ROWS, QUERIES)
    query = _load_rows(q + b * q_b, t, h, inside, q_h, q_t, D, WIDE)
    dout = _load_rows(do + b * H * T * D_V, t, h, inside, T * D_V, D_V, D_V, WIDE_V)
    mine, start, norm, delta, at = _row_state(own, first, lse, deltas, b, t, h, inside, span_b, H, T)
    g = l // (L // G)
    k += b * k_b + g * k_h
    v += b * v_b + g * v_h
    blocks += (x * tl.cdiv(T, QUERY_BLOCK) + tile * QUERIES // QUERY_BLOCK) * number
    n = tl.arange(0, KEYS)
    acc = tl.zeros([ROWS, WIDE], tl.float32)
    for i in range(number):
        block = tl.load(blocks + i).to(tl.int32)
        if block >= 0:
            j0 = block * KEYS
            keys = load_tile(k, j0, S, k_s, n, D, WIDE, KEYS)
            values = load_tile(v, j0, S, v_s, n, D_V, WIDE_V, KEYS)
            _, ds = _pair(
                query, dout, keys, values, mine, start, norm, delta, (j0 + n)[None, :], S, scale, window,
                n_sink, WINDOW, PRECISION,
            )  # fmt: skip
            acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision=PRECISION)
    d = tl.arange(0, WIDE)
    mask = inside[:, None] & (d < D)[None, :]
    tl.store(dq + at[:, None] * D + d[None, :], (acc * factor).to(dq.dtype.element_ty), mask=mask)


@triton.jit
def keys(
    q, k, v, do, dk, dv, offsets, readers, lse, deltas, own, first,
    q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, span_b, H, G, L, T, S, entries,
    scale, factor, window, n_sink,
    D: tl.constexpr, D_V: tl.constexpr, WIDE: tl.constexpr, WIDE_V: tl.constexpr, WINDOW: tl.constexpr,
    QUERY_BLOCK: tl.constexpr, QUERIES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk (B,L,S,D) and dv (B,L,S,D_V) of one key block, from the query blocks that list it.

    offsets (B*L, blocks + 1) into readers (B*L, entries).
    """
    block, x = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, l = x // L, x % L
    g = l // (L // G)
    n = tl.arange(0, KEYS)
    j0 = block * KEYS
    key = load_tile(k + b * k_b + g * k_h, j0, S, k_s, n, D, WIDE, KEYS)
    value = load_tile(v + b * v_b + g * v_h, j0, S, v_s, n, D_V, WIDE_V, KEYS)
    offsets += x * (tl.num_programs(0) + 1) + block
    low, high = tl.load(offsets), tl.load(offsets + 1)
    readers += x * entries
    dkey = tl.zeros([KEYS, WIDE], tl.float32)
    dvalue = tl.zeros([KEYS, WIDE_V], tl.float32)
    TILES: tl.constexpr = QUERY_BLOCK // QUERIES
    for i in range(low * TILES, high * TILES):
        t0 = tl.load(readers + i // TILES).to(tl.int32) * QUERY_BLOCK + i % TILES * QUERIES
        t, h, inside = _rows(t0, l, T, H // L, ROWS, QUERIES)
        query = _load_rows(q + b * q_b, t, h, inside, q_h, q_t, D, WIDE)
        dout = _load_rows(do + b * H * T * D_V, t, h, inside, T * D_V, D_V, D_V, WIDE_V)
        mine, start, norm, delta, _ = _row_state(own, first, lse, deltas, b, t, h, inside, span_b, H, T)
        p, ds = _pair(
            query, dout, key, value, mine, start, norm, delta, (j0 + n)[None, :], S, scale, window,
            n_sink, WINDOW, PRECISION,
        )  # fmt: skip
        dvalue = tl.dot(tl.trans(p.to(dout.dtype)), dout, dvalue, input_precision=PRECISION)
        dkey = tl.dot(tl.trans(ds.to(query.dtype)), query, dkey, input_precision=PRECISION)
    store_tile(dk + x * S * D, dkey * factor, j0, S, D, n, D, WIDE)
    store_tile(dv + x * S * D_V, dvalue, j0, S, D_V, n, D_V, WIDE_V)


def _case(d: int, block: int, rows: int, window: bool) -> dict[str, object]:
    """Query blocks of one head, or single queries of ``rows`` heads."""
    return {
        "D": d, "D_V": d, "WIDE": d, "WIDE_V": d, "WINDOW": window, "PRECISION": "ieee",
        "QUERY_BLOCK": block, "QUERIES": min(block, rows), "ROWS": rows, "KEYS": 64,
    }  # fmt: skip


def _cases(rows: int) -> dict[str, dict[str, object]]:
    return {
        "bf16_64": _case(64, 64, rows, False),
        "bf16_128": _case(128, 64, rows, False),
        "bf16_128_window": _case(128, 64, rows, True),
        "bf16_128_per_token": _case(128, 1, 16, False),
    }


# Rows of a tile, at least one query in all heads of a list; fewer where keys' gradients fill the registers.
ROWS, ROWS_OF_KEYS = 64, 32
_STRIDES = ("q_b", "q_h", "q_t", "k_b", "k_h", "k_s", "v_b", "v_h", "v_s")
_TYPES = (
    dict.fromkeys(("q", "k", "v", "o", "do", "dq", "dk", "dv"), "*bf16")
    | dict.fromkeys(("lse", "deltas"), "*fp32")
    | dict.fromkeys(("blocks", "own", "first", "offsets", "readers"), "*i32")
    | dict.fromkeys(_STRIDES, "i64")
    | dict.fromkeys(("span_b", "H", "G", "L", "T", "S", "number", "entries", "window", "n_sink"), "i32")
    | dict.fromkeys(("scale", "factor"), "fp32")
)
FORWARD = Kernel(
    "block_attention_forward",
    forward,
    (Tile({}, 4, 2, ("sm_90", "gfx942")), Tile({}, 8, 2)),
    _cases(ROWS),
    _TYPES,
)
QUERIES = Kernel(
    "block_attention_queries",
    queries,
    (Tile({}, 4, 2, ("sm_90", "sm_100", "gfx942")), Tile({}, 8, 1, NVIDIA)),
    _cases(ROWS),
    _TYPES,
)
KEYS = Kernel(
    "block_attention_keys",
    keys,
    (Tile({}, 8, 2, NVIDIA), Tile({}, 8, 1, NVIDIA), Tile({}, 4, 1, ("sm_100", "gfx942"))),
    _cases(ROWS_OF_KEYS),
    _TYPES,
)
KERNELS: list[Kernel] = [FORWARD, QUERIES, KEYS]

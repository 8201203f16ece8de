"""Gradients inside the chunks of the delta and rank-1 classes, once the states have been passed both ways.

G, the sum of log decays, enters only as exp(G) on row operands (q, the probe), as exp(-G) on column operands
(e, k) and as exp(G_C) on the leaving state, so it receives +-x dx of every operand x; see `scan.chunked`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo_kernels.launch import Kernel, Tile
from attnzoo_kernels.scan.kernel_delta_pairs import load_probe, load_rows, locate, pair_weights, types
from attnzoo_kernels.scan.kernel_delta_states import decay_weights


@triton.jit
def value_gradients(
    do, v, beta, inverse, lower_k, scores_k, writes_k, y, dy, dstates,
    dz, dv, dbeta, dlower, dscores, dlower_k, dscores_k, N, T, H, V,
    C: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr,
    RANK_ONE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dz = X^T dy, dv, the values' part of dbeta (B*H*N, C), and the matrices' gradients without decay."""
    program = tl.program_id(0).to(tl.int64)
    _, _, row, inside = locate(program, N, T, H, C)
    i = tl.arange(0, C)
    here = (program * C + i)[:, None]
    square = here * C + i[None, :]
    ty = dz.dtype.element_ty
    back = tl.trans(tl.load(inverse + square))
    dl = tl.zeros([C, C], tl.float32)
    ds = tl.zeros([C, C], tl.float32)
    dlk = tl.zeros([C, C], tl.float32)
    dsk = tl.zeros([C, C], tl.float32)
    db = tl.zeros([C], tl.float32)
    for start in range(0, VP, BV):
        c = start + tl.arange(0, BV)
        dout = load_rows(do, row, inside, c, V)
        found = tl.trans(tl.load(y + here * VP + c[None, :]))
        right = tl.dot(back, tl.load(dy + here * VP + c[None, :]), input_precision=PRECISION)
        dright = right.to(ty)
        tl.store(dz + here * VP + c[None, :], dright)
        dl = tl.dot(dright, found, dl, input_precision=PRECISION)
        ds = tl.dot(dout, found, ds, input_precision=PRECISION)
        values = load_rows(v, row, inside, c, V)
        if RANK_ONE:
            dl_values = tl.trans(values)
            dlk = tl.dot(dright, dl_values, dlk, input_precision=PRECISION)
            dsk = tl.dot(dout, dl_values, dsk, input_precision=PRECISION)
            d = tl.arange(0, KP)
            columns = tl.load(writes_k + here * KP + d[None, :])
            dstate = tl.load(dstates + program * KP * VP + d[:, None] * VP + c[None, :])
            dvalues = tl.dot(columns, dstate, input_precision=PRECISION)
            inner = tl.trans(tl.load(scores_k + square))
            dvalues = tl.dot(inner, dout, dvalues, input_precision=PRECISION)
            inner = tl.trans(tl.load(lower_k + square))
            dvalues -= tl.dot(inner, dright, input_precision=PRECISION)
        else:
            db += tl.sum(right * values.to(tl.float32), 1)
            dvalues = right * tl.load(beta + row, mask=inside, other=0.0)[:, None]
        mask = inside[:, None] & (c < V)[None, :]
        tl.store(dv + row[:, None] * V + c[None, :], dvalues.to(dv.dtype.element_ty), mask=mask)
    seen, strict = i[:, None] >= i[None, :], i[:, None] > i[None, :]
    tl.store(dlower + square, tl.where(strict, -dl, 0.0).to(ty))
    tl.store(dscores + square, tl.where(seen, ds, 0.0).to(ty))
    if RANK_ONE:
        tl.store(dlower_k + square, tl.where(strict, -dlk, 0.0).to(ty))
        tl.store(dscores_k + square, tl.where(seen, dsk, 0.0).to(ty))
    else:
        tl.store(dbeta + program * C + i, db)


@triton.jit
def _states_to_keys(
    do, dz, y, v, states, dstates, program, N, row, inside, d, V,
    C: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    RANK_ONE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """do S^T, -dz S^T, y dS^T and v dS^T for one block of K: gradients of the decayed operands."""
    here = (program * C + tl.arange(0, C))[:, None]
    dq = tl.zeros([C, BK], tl.float32)
    dp = tl.zeros([C, BK], tl.float32)
    de = tl.zeros([C, BK], tl.float32)
    dk = tl.zeros([C, BK], tl.float32)
    for start in range(0, VP, BV):
        c = start + tl.arange(0, BV)
        square = d[None, :] * VP + c[:, None]
        state = tl.load(states + (program + program // N) * KP * VP + square)
        dq = tl.dot(load_rows(do, row, inside, c, V), state, dq, input_precision=PRECISION)
        dp = tl.dot(tl.load(dz + here * VP + c[None, :]), state, dp, input_precision=PRECISION)
        dstate = tl.load(dstates + program * KP * VP + square)
        de = tl.dot(tl.load(y + here * VP + c[None, :]), dstate, de, input_precision=PRECISION)
        if RANK_ONE:
            dk = tl.dot(load_rows(v, row, inside, c, V), dstate, dk, input_precision=PRECISION)
    return dq, -dp, de, dk


@triton.jit
def _add_pairs(
    dq, dp, de, dk, q, p, e, k, dlower, dscores, dlower_k, dscores_k, gates, segments, scale, size,
    program, b, n, T, C: tl.constexpr, RANK_ONE: tl.constexpr, RUNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what the pairs of a chunk give under a scalar decay."""
    i = tl.arange(0, C)
    square = program * C * C + i[:, None] * C + i[None, :]
    ty = q.dtype
    weights = tl.where(i[:, None] >= i[None, :], pair_weights(gates, size, program, 0, C), 0.0)
    before = tl.where(i[:, None] > i[None, :], pair_weights(gates, size, program, 2 * RANK_ONE, C), 0.0)
    if RUNS:
        run = tl.load(segments + b * T + tl.minimum(n * C + i, T - 1))
        same = run[:, None] == run[None, :]
        weights, before = tl.where(same, weights, 0.0), tl.where(same, before, 0.0)
    weights = weights * scale
    dpair = (tl.load(dscores + square).to(tl.float32) * weights).to(ty)
    dq = tl.dot(dpair, e, dq, input_precision=PRECISION)
    de = tl.dot(tl.trans(dpair), q, de, input_precision=PRECISION)
    dpair = (tl.load(dlower + square).to(tl.float32) * before).to(ty)
    dp = tl.dot(dpair, e, dp, input_precision=PRECISION)
    de = tl.dot(tl.trans(dpair), p, de, input_precision=PRECISION)
    if RANK_ONE:
        dpair = (tl.load(dscores_k + square).to(tl.float32) * weights).to(ty)
        dq = tl.dot(dpair, k, dq, input_precision=PRECISION)
        dk = tl.dot(tl.trans(dpair), q, dk, input_precision=PRECISION)
        dpair = (tl.load(dlower_k + square).to(tl.float32) * before).to(ty)
        dp = tl.dot(dpair, k, dp, input_precision=PRECISION)
        dk = tl.dot(tl.trans(dpair), p, dk, input_precision=PRECISION)
    return dq, dp, de, dk


@triton.jit
def key_gradients(
    q, k, v, e, a, beta, g, gates, segments, do, dz, y, states, dstates,
    dlower, dscores, dlower_k, dscores_k, inner, dcarry,
    dq_out, dk_out, de_out, da_out, dbeta, dgates, scale, size, N, T, H, K, V, parts,
    C: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DIAGONAL: tl.constexpr, RANK_ONE: tl.constexpr, RUNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of K of a chunk: gradients of q, k, e, a, and its part of those of beta and the gates.

    inner (4, B*H*N, C, KP): what the pairs of a chunk give to q, p, e, k under a diagonal decay.
    dgates: the gradient of g (B,T,H,K) under a diagonal decay, else (K blocks, 2, B*H*N, C) for G and for G
    before the own decay. dbeta (K blocks, B*H*N, C).
    """
    program, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, n, row, inside = locate(program, N, T, H, C)
    i, d = tl.arange(0, C), part * BK + tl.arange(0, BK)
    dq, dp, de, dk = _states_to_keys(
        do, dz, y, v, states, dstates, program, N, row, inside, d, V,
        C, KP, VP, BK, BV, RANK_ONE, PRECISION,
    )  # fmt: skip
    upto, probe, after, _ = decay_weights(
        g, gates, segments, size, program, b, n, row, inside, d, T, H, K, C, DIAGONAL, RANK_ONE, RUNS
    )
    dq, dp, de, dk = dq * upto * scale, dp * probe, de * after, dk * after
    queries = load_rows(q, row, inside, d, K)
    probes = load_probe(a, beta, row, inside, d, K, RANK_ONE)
    columns = load_rows(e, row, inside, d, K)
    keys = load_rows(k, row, inside, d, K)
    if DIAGONAL:
        at = inner + (program * C + i)[:, None] * KP + d[None, :]
        step = size * KP
        dq += tl.load(at) * scale
        dp += tl.load(at + step)
        de += tl.load(at + 2 * step)
        if RANK_ONE:
            dk += tl.load(at + 3 * step)
    else:
        dq, dp, de, dk = _add_pairs(
            dq, dp, de, dk, queries, probes.to(queries.dtype), columns, keys, dlower, dscores, dlower_k,
            dscores_k, gates, segments, scale, size, program, b, n, T, C, RANK_ONE, RUNS, PRECISION,
        )  # fmt: skip
    dsums = queries.to(tl.float32) * dq - columns.to(tl.float32) * de
    dbefore = probes * dp
    if RANK_ONE:
        dsums -= keys.to(tl.float32) * dk
    mask = inside[:, None] & (d < K)[None, :]
    out = row[:, None] * K + d[None, :]
    if DIAGONAL:
        total = tl.zeros([BK], tl.float32)
        for p in range(parts):
            total += tl.load(dcarry + (p * size // C + program) * KP + d)
        dg = tl.cumsum(dsums + dbefore, 0, reverse=True) + total[None, :]
        if RANK_ONE:
            dg -= dbefore
        tl.store(dgates + out, dg.to(dgates.dtype.element_ty), mask=mask)
    else:
        at = dgates + 2 * part * size + program * C + i
        tl.store(at, tl.sum(dsums, 1))
        tl.store(at + size, tl.sum(dbefore, 1))
    tl.store(dq_out + out, dq.to(dq_out.dtype.element_ty), mask=mask)
    if RANK_ONE:
        tl.store(dk_out + out, dk.to(dk_out.dtype.element_ty), mask=mask)
        tl.store(de_out + out, de.to(de_out.dtype.element_ty), mask=mask)
        tl.store(da_out + out, (-dp).to(da_out.dtype.element_ty), mask=mask)
    else:
        strength = tl.load(beta + row, mask=inside, other=0.0)[:, None]
        tl.store(dk_out + out, (de + strength * dp).to(dk_out.dtype.element_ty), mask=mask)
        tl.store(dbeta + part * size + program * C + i, tl.sum(keys.to(tl.float32) * dp, 1))


_SIZES = {"C": 64, "KP": 128, "VP": 128, "PRECISION": "ieee", "RANK_ONE": False}
_CASES = {
    "bf16_64": _SIZES | {"KP": 64, "VP": 64},
    "bf16_128": _SIZES,
    "bf16_128_rank_one": _SIZES | {"RANK_ONE": True},
}
_GATED = {name: case | {"RUNS": True, "DIAGONAL": case["RANK_ONE"]} for name, case in _CASES.items()}
_GATED["bf16_128_scalar_rank_one"] = _GATED["bf16_128_rank_one"] | {"DIAGONAL": False}

VALUE_GRADIENTS = Kernel(
    "scan_delta_value_gradients",
    value_gradients,
    (
        Tile({"BV": 32}, 8, 1, ("sm_90", "sm_100")),
        Tile({"BV": 16}, 8, 1),
        Tile({"BV": 64}, 8, 1, ("sm_100",)),
        Tile({"BV": 64}, 4, 1, ("gfx942",)),
    ),
    _CASES,
    types(
        "do v inverse lower_k scores_k writes_k y dy dstates dz dv dlower dscores dlower_k dscores_k",
        "beta dbeta",
        "N T H V",
    ),
)
KEY_GRADIENTS = Kernel(
    "scan_delta_key_gradients",
    key_gradients,
    (
        Tile({"BK": 32, "BV": 64}, 8, 1, ("sm_90", "sm_100")),
        Tile({"BK": 32, "BV": 32}, 8, 1, ("sm_90", "sm_100", "gfx942")),
        Tile({"BK": 16, "BV": 64}, 8, 1, ("sm_80",)),
        Tile({"BK": 16, "BV": 16}, 8, 1, ("sm_80",)),
        Tile({"BK": 32, "BV": 64}, 4, 1, ("gfx942",)),
    ),
    _GATED,
    types(
        "q k v e a do dz y states dstates dlower dscores dlower_k dscores_k dq_out dk_out de_out da_out",
        "beta g gates inner dcarry dbeta dgates",
        "N T H K V parts",
    ),
)
KERNELS: list[Kernel] = [VALUE_GRADIENTS, KEY_GRADIENTS]

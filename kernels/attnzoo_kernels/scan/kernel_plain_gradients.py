"""Scan of the plain classes, backward: the states' gradients from chunk to chunk, then those of the operands.

G, the sum of log decays, enters only as exp(G) on queries, as exp(-G) on keys and as exp(G_C) on the leaving
state, so it receives q dq, -k dk and the leaving state times its gradient; see `scan.chunked`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo_kernels.launch import NVIDIA, Kernel, Tile
from attnzoo_kernels.scan.kernel_delta_pairs import load_rows, locate, pair_weights, same_run, types
from attnzoo_kernels.scan.kernel_delta_states import decay_weights
from attnzoo_kernels.scan.kernel_plain_states import CASES, INTS, chunk_scores


@triton.jit
def states_backward(
    q, do, g, gates, segments, states, dfinal, dstates, dcarry, dinitial, scale, size, N, T, H, K, V,
    C: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DIAGONAL: tl.constexpr, RUNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of a state back through all chunks: gradients of the leaving states (B*H*N, KP, VP), and
    dcarry (V blocks, B*H*N, KP), the leaving states times them.
    """
    x, part = tl.program_id(0).to(tl.int64), tl.program_id(2)
    d, c = tl.program_id(1) * BK + tl.arange(0, BK), part * BV + tl.arange(0, BV)
    whole = (d < K)[:, None] & (c < V)[None, :]
    at = x * K * V + d[:, None] * V + c[None, :]
    square = d[:, None] * VP + c[None, :]
    dstate = tl.load(dfinal + at, mask=whole, other=0.0)
    dcarry += part * tl.num_programs(0).to(tl.int64) * N * KP
    for back in range(N):
        n = N - 1 - back
        chunk = x * N + n
        leaving = tl.load(states + (chunk + x + 1) * KP * VP + square).to(tl.float32)
        tl.store(dcarry + chunk * KP + d, tl.sum(leaving * dstate, 1))
        tl.store(dstates + chunk * KP * VP + square, dstate.to(dstates.dtype.element_ty))
        b, _, row, inside = locate(chunk, N, T, H, C)
        upto, _, _, carry = decay_weights(
            g, gates, segments, size, chunk, b, n, row, inside, d, T, H, K, C, DIAGONAL, False, RUNS
        )
        queries = load_rows(q, row, inside, d, K)
        queries = (queries.to(tl.float32) * upto * scale).to(queries.dtype)
        dout = load_rows(do, row, inside, c, V)
        dstate = tl.dot(tl.trans(queries), dout, dstate * carry[:, None], input_precision=PRECISION)
    tl.store(dinitial + at, dstate, mask=whole)


@triton.jit
def value_gradients(
    q, k, v, do, g, gates, segments, scores, dstates, dv, dscores, scale, size, N, T, H, K, V,
    C: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DIAGONAL: tl.constexpr, RUNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv of one chunk, and dscores (B*H*N, C, C), the gradient of scale M^{qk} without scale and decay."""
    program = tl.program_id(0).to(tl.int64)
    b, n, row, inside = locate(program, N, T, H, C)
    i = tl.arange(0, C)
    inner = tl.trans(chunk_scores(
        q, k, gates, segments, scores, scale, size, program, b, n, row, inside, T, K,
        C, BK, DIAGONAL, RUNS, PRECISION,
    ))  # fmt: skip
    ds = tl.zeros([C, C], tl.float32)
    for start in range(0, V, BV):
        c = start + tl.arange(0, BV)
        dout = load_rows(do, row, inside, c, V)
        ds = tl.dot(dout, tl.trans(load_rows(v, row, inside, c, V)), ds, input_precision=PRECISION)
        dvalues = tl.dot(inner, dout, input_precision=PRECISION)
        for start_k in range(0, K, BK):
            d = start_k + tl.arange(0, BK)
            _, _, after, _ = decay_weights(
                g, gates, segments, size, program, b, n, row, inside, d, T, H, K, C, DIAGONAL, False, RUNS
            )
            keys = load_rows(k, row, inside, d, K)
            keys = (keys.to(tl.float32) * after).to(keys.dtype)
            dstate = tl.load(dstates + program * KP * VP + d[:, None] * VP + c[None, :])
            dvalues = tl.dot(keys, dstate, dvalues, input_precision=PRECISION)
        mask = inside[:, None] & (c < V)[None, :]
        tl.store(dv + row[:, None] * V + c[None, :], dvalues.to(dv.dtype.element_ty), mask=mask)
    seen = i[:, None] >= i[None, :]
    if RUNS:
        seen &= same_run(segments, b, n, T, C)
    at = program * C * C + i[:, None] * C + i[None, :]
    tl.store(dscores + at, tl.where(seen, ds, 0.0).to(dscores.dtype.element_ty))


@triton.jit
def key_gradients(
    q, k, v, do, g, gates, segments, states, dstates, dscores, inner, dcarry, dq_out, dk_out, dgates,
    scale, size, N, T, H, K, V, parts,
    C: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DIAGONAL: tl.constexpr, RUNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of K of a chunk. inner, dgates and parts: as in `kernel_delta_gradients.key_gradients`."""
    program, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, n, row, inside = locate(program, N, T, H, C)
    i, d = tl.arange(0, C), part * BK + tl.arange(0, BK)
    dq = tl.zeros([C, BK], tl.float32)
    dk = tl.zeros([C, BK], tl.float32)
    for start in range(0, V, BV):
        c = start + tl.arange(0, BV)
        square = d[None, :] * VP + c[:, None]
        state = tl.load(states + (program + program // N) * KP * VP + square)
        dq = tl.dot(load_rows(do, row, inside, c, V), state, dq, input_precision=PRECISION)
        dstate = tl.load(dstates + program * KP * VP + square)
        dk = tl.dot(load_rows(v, row, inside, c, V), dstate, dk, input_precision=PRECISION)
    upto, _, after, _ = decay_weights(
        g, gates, segments, size, program, b, n, row, inside, d, T, H, K, C, DIAGONAL, False, RUNS
    )
    dq, dk = dq * upto * scale, dk * after
    queries = load_rows(q, row, inside, d, K)
    keys = load_rows(k, row, inside, d, K)
    if DIAGONAL:
        at = inner + (program * C + i)[:, None] * KP + d[None, :]
        dq += tl.load(at) * scale
        dk += tl.load(at + 2 * size * KP)
    else:
        weights = pair_weights(gates, size, program, 0, C) * scale
        dpair = tl.load(dscores + program * C * C + i[:, None] * C + i[None, :]).to(tl.float32)
        dpair = tl.where(i[:, None] >= i[None, :], dpair * weights, 0.0).to(queries.dtype)
        dq = tl.dot(dpair, keys, dq, input_precision=PRECISION)
        dk = tl.dot(tl.trans(dpair), queries, dk, input_precision=PRECISION)
    dsums = queries.to(tl.float32) * dq - keys.to(tl.float32) * dk
    mask = inside[:, None] & (d < K)[None, :]
    out = row[:, None] * K + d[None, :]
    if DIAGONAL:
        total = tl.zeros([BK], tl.float32)
        for p in range(parts):
            total += tl.load(dcarry + (p * size // C + program) * KP + d)
        dg = tl.cumsum(dsums, 0, reverse=True) + total[None, :]
        tl.store(dgates + out, dg.to(dgates.dtype.element_ty), mask=mask)
    else:
        tl.store(dgates + part * size + program * C + i, tl.sum(dsums, 1))
    tl.store(dq_out + out, dq.to(dq_out.dtype.element_ty), mask=mask)
    tl.store(dk_out + out, dk.to(dk_out.dtype.element_ty), mask=mask)


STATES_BACKWARD = Kernel(
    "scan_plain_states_backward",
    states_backward,
    (
        Tile({"BK": 64, "BV": 64}, 8, 2, NVIDIA),
        Tile({"BK": 64, "BV": 32}, 4, 2),
        Tile({"BK": 32, "BV": 32}, 4, 2),
    ),
    CASES,
    types("q do states dstates", "g gates dfinal dcarry dinitial", INTS),
)
VALUE_GRADIENTS = Kernel(
    "scan_plain_value_gradients",
    value_gradients,
    (Tile({"BK": 64, "BV": 64}, 8, 1), Tile({"BK": 32, "BV": 32}, 4, 2, ("gfx942",))),
    CASES,
    types("q k v do scores dstates dv dscores", "g gates", INTS),
)
KEY_GRADIENTS = Kernel(
    "scan_plain_key_gradients",
    key_gradients,
    (Tile({"BK": 64, "BV": 64}, 8, 1), Tile({"BK": 32, "BV": 32}, 4, 2), Tile({"BK": 16, "BV": 32}, 4, 2)),
    CASES,
    types("q k v do states dstates dscores dq_out dk_out", "g gates inner dcarry dgates", INTS + " parts"),
)
KERNELS: list[Kernel] = [STATES_BACKWARD, VALUE_GRADIENTS, KEY_GRADIENTS]

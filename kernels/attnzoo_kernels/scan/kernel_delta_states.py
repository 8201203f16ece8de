"""States of the delta and rank-1 classes: operands per chunk, the passes over the chunks, and the outputs.

With X the inverse from `kernel_delta_pairs`, everything that does not need the state is made for all chunks
at once, so that a pass has two products per chunk on its critical path:

    w = X R,  u = X z,  y_n = u_n - w_n S_n,  S_{n+1} = carry_n S_n + W_n^T y_n (+ Wk_n^T v_n)
    o_n = Q_n S_n + scores_n y_n (+ scores_k_n v_n)

with R, Q, W, Wk the probes, queries and columns under their decay to the chunk's start or end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo_kernels.launch import Kernel, Tile
from attnzoo_kernels.scan.kernel_delta_pairs import (
    load_logs,
    load_probe,
    load_rows,
    locate,
    types,
)


@triton.jit
def decay_weights(
    g, gates, segments, size, program, b, n, row, inside, d, T, H, K,
    C: tl.constexpr, DIAGONAL: tl.constexpr, RANK_ONE: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """exp of sums of log decays, (C,1) or (C,BK): from the chunk's start up to a token, and up to the probe;
    from a token to the chunk's end; over the whole chunk (BK). Zero across documents.

    Diagonal sums are running ones in either direction: nothing is subtracted, so nothing cancels.
    """
    i = tl.arange(0, C)
    if DIAGONAL:
        steps = load_logs(g, row, inside, d, K)
        upto = tl.cumsum(steps, 0)
        probe = upto
        if RANK_ONE:
            probe = tl.cumsum(load_logs(g, row - H, inside & (i > 0), d, K), 0)
        follows = (i + 1 < C) & (n * C + i + 1 < T)
        after = tl.cumsum(load_logs(g, row + H, follows, d, K), 0, reverse=True)
        carry = tl.sum(steps, 0)
    else:
        at = gates + program * C
        high, low = tl.load(at + i), tl.load(at + size + i)
        last_high, last_low = tl.load(at + C - 1), tl.load(at + size + C - 1)
        upto = (high + low)[:, None]
        probe = upto
        if RANK_ONE:
            probe = (tl.load(at + 2 * size + i) + tl.load(at + 3 * size + i))[:, None]
        after = tl.minimum((last_high - high) + (last_low - low), 0.0)[:, None]
        carry = (last_high + last_low) + 0.0 * d.to(tl.float32)
    upto, probe, after, carry = tl.exp2(upto), tl.exp2(probe), tl.exp2(after), tl.exp2(carry)
    if RUNS:
        run = tl.load(segments + b * T + tl.minimum(n * C + i, T - 1))
        last = tl.load(segments + b * T + tl.minimum(n * C + C, T) - 1)
        entering = tl.load(segments + b * T + n * C - 1, mask=n > 0, other=0)
        upto = tl.where((run == entering)[:, None], upto, 0.0)
        probe = tl.where((run == entering)[:, None], probe, 0.0)
        after = tl.where((run == last)[:, None], after, 0.0)
        carry = tl.where(entering == last, carry, 0.0)
    return upto, probe, after, carry


@triton.jit
def operands(
    q, k, v, e, a, beta, g, gates, segments, inverse, lower_k, w, u, reads, writes, writes_k, carry,
    scale, size, N, T, H, K, V,
    C: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DIAGONAL: tl.constexpr, RANK_ONE: tl.constexpr, RUNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of K (w, Q, W, Wk and the carry) or one of V (u)."""
    program, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, n, row, inside = locate(program, N, T, H, C)
    i = tl.arange(0, C)
    ty = w.dtype.element_ty
    mixed = tl.load(inverse + program * C * C + i[:, None] * C + i[None, :])
    if part < KP // BK:
        d = part * BK + tl.arange(0, BK)
        upto, probe, after, total = decay_weights(
            g, gates, segments, size, program, b, n, row, inside, d, T, H, K, C, DIAGONAL, RANK_ONE, RUNS
        )
        at = (program * C + i)[:, None] * KP + d[None, :]
        probes = (load_probe(a, beta, row, inside, d, K, RANK_ONE) * probe).to(ty)
        tl.store(w + at, tl.dot(mixed, probes, input_precision=PRECISION).to(ty))
        queries = load_rows(q, row, inside, d, K).to(tl.float32)
        tl.store(reads + at, (queries * upto * scale).to(ty))
        tl.store(writes + at, (load_rows(e, row, inside, d, K).to(tl.float32) * after).to(ty))
        if RANK_ONE:
            tl.store(writes_k + at, (load_rows(k, row, inside, d, K).to(tl.float32) * after).to(ty))
        tl.store(carry + program * KP + d, total)
    else:
        c = (part - KP // BK) * BV + tl.arange(0, BV)
        values = load_rows(v, row, inside, c, V)
        if RANK_ONE:
            inner = tl.load(lower_k + program * C * C + i[:, None] * C + i[None, :])
            right = (-tl.dot(inner, values, input_precision=PRECISION)).to(ty)
        else:
            strength = tl.load(beta + row, mask=inside, other=0.0)
            right = (values.to(tl.float32) * strength[:, None]).to(ty)
        at = (program * C + i)[:, None] * VP + c[None, :]
        tl.store(u + at, tl.dot(mixed, right, input_precision=PRECISION).to(ty))


@triton.jit
def states_forward(
    w, u, writes, writes_k, v, carry, initial, states, y, final, N, T, H, K, V,
    C: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr,
    RANK_ONE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of V through all chunks: entering states (B*H, N+1, KP, VP), the last one final, and y."""
    x = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BV + tl.arange(0, BV)
    d, i = tl.arange(0, KP), tl.arange(0, C)
    whole = (d < K)[:, None] & (c < V)[None, :]
    at = x * K * V + d[:, None] * V + c[None, :]
    state = tl.load(initial + at, mask=whole, other=0.0)
    ty = y.dtype.element_ty
    for n in range(N):
        chunk = x * N + n
        here = (chunk * C + i)[:, None]
        narrow = state.to(ty)
        tl.store(states + (chunk + x) * KP * VP + d[:, None] * VP + c[None, :], narrow)
        probes = tl.load(w + here * KP + d[None, :])
        found = tl.dot(probes, narrow, input_precision=PRECISION)
        found = (tl.load(u + here * VP + c[None, :]).to(tl.float32) - found).to(ty)
        tl.store(y + here * VP + c[None, :], found)
        state = state * tl.load(carry + chunk * KP + d)[:, None]
        columns = tl.trans(tl.load(writes + here * KP + d[None, :]))
        state = tl.dot(columns, found, state, input_precision=PRECISION)
        if RANK_ONE:
            _, _, row, inside = locate(chunk, N, T, H, C)
            columns = tl.trans(tl.load(writes_k + here * KP + d[None, :]))
            values = load_rows(v, row, inside, c, V)
            state = tl.dot(columns, values, state, input_precision=PRECISION)
    tl.store(states + (x * (N + 1) + N) * KP * VP + d[:, None] * VP + c[None, :], state.to(ty))
    tl.store(final + at, state, mask=whole)


@triton.jit
def outputs(
    reads, scores, scores_k, states, y, v, o, N, T, H, V,
    C: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr,
    RANK_ONE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    _, _, row, inside = locate(program, N, T, H, C)
    c = tl.program_id(1) * BV + tl.arange(0, BV)
    d, i = tl.arange(0, KP), tl.arange(0, C)
    here = (program * C + i)[:, None]
    state = tl.load(states + (program + program // N) * KP * VP + d[:, None] * VP + c[None, :])
    out = tl.dot(tl.load(reads + here * KP + d[None, :]), state, input_precision=PRECISION)
    inner = tl.load(scores + here * C + i[None, :])
    out = tl.dot(inner, tl.load(y + here * VP + c[None, :]), out, input_precision=PRECISION)
    if RANK_ONE:
        inner = tl.load(scores_k + here * C + i[None, :])
        out = tl.dot(inner, load_rows(v, row, inside, c, V), out, input_precision=PRECISION)
    mask = inside[:, None] & (c < V)[None, :]
    tl.store(o + row[:, None] * V + c[None, :], out.to(o.dtype.element_ty), mask=mask)


@triton.jit
def states_backward(
    do, w, reads, writes, scores, carry, states, dfinal, dstates, dy, dcarry, dinitial, N, T, H, K, V,
    C: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of V back through all chunks: gradients of the leaving states and of y.

    dcarry (V blocks, B*H*N, KP) is what the decay of a whole chunk receives: the leaving state times its
    gradient, summed over the block.
    """
    x, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = part * BV + tl.arange(0, BV)
    d, i = tl.arange(0, KP), tl.arange(0, C)
    whole = (d < K)[:, None] & (c < V)[None, :]
    at = x * K * V + d[:, None] * V + c[None, :]
    dstate = tl.load(dfinal + at, mask=whole, other=0.0)
    ty = dy.dtype.element_ty
    dcarry += part * tl.num_programs(0).to(tl.int64) * N * KP
    for back in range(N):
        n = N - 1 - back
        chunk = x * N + n
        here = (chunk * C + i)[:, None]
        square = d[:, None] * VP + c[None, :]
        leaving = tl.load(states + (chunk + x + 1) * KP * VP + square).to(tl.float32)
        tl.store(dcarry + chunk * KP + d, tl.sum(leaving * dstate, 1))
        narrow = dstate.to(ty)
        tl.store(dstates + chunk * KP * VP + square, narrow)
        _, _, row, inside = locate(chunk, N, T, H, C)
        dout = load_rows(do, row, inside, c, V)
        columns = tl.load(writes + here * KP + d[None, :])
        inner = tl.trans(tl.load(scores + here * C + i[None, :]))
        total = tl.dot(inner, dout, input_precision=PRECISION)
        total = tl.dot(columns, narrow, total, input_precision=PRECISION)
        tl.store(dy + here * VP + c[None, :], total.to(ty))
        dstate = dstate * tl.load(carry + chunk * KP + d)[:, None]
        queries = tl.trans(tl.load(reads + here * KP + d[None, :]))
        dstate = tl.dot(queries, dout, dstate, input_precision=PRECISION)
        probes = tl.trans(tl.load(w + here * KP + d[None, :]))
        dstate = tl.dot(probes, (-total).to(ty), dstate, input_precision=PRECISION)
    tl.store(dinitial + at, dstate, mask=whole)


_SIZES = {"C": 64, "KP": 128, "VP": 128, "PRECISION": "ieee"}
_CASES = {
    "bf16_64": _SIZES | {"KP": 64, "VP": 64, "RANK_ONE": False},
    "bf16_128": _SIZES | {"RANK_ONE": False},
    "bf16_128_rank_one": _SIZES | {"RANK_ONE": True},
}
_GATED = {name: case | {"RUNS": True, "DIAGONAL": case["RANK_ONE"]} for name, case in _CASES.items()}
_INTS = "N T H K V"

OPERANDS = Kernel(
    "scan_delta_operands",
    operands,
    (Tile({"BK": 64, "BV": 64}, 4, 1), Tile({"BK": 32, "BV": 32}, 4, 1), Tile({"BK": 64, "BV": 64}, 8, 1)),
    _GATED,
    types("q k v e a inverse lower_k w u reads writes writes_k", "beta g gates carry", _INTS),
)
STATES_FORWARD = Kernel(
    "scan_delta_states_forward",
    states_forward,
    (
        Tile({"BV": 32}, 4, 2),
        Tile({"BV": 64}, 8, 2),
        Tile({"BV": 64}, 4, 2, ("sm_90", "sm_100", "gfx942")),
        Tile({"BV": 16}, 4, 3, ("sm_90", "sm_100")),
    ),
    _CASES,
    types("w u writes writes_k v states y", "carry initial final", _INTS),
)
OUTPUTS = Kernel(
    "scan_delta_outputs",
    outputs,
    (
        Tile({"BV": 64}, 8, 1),
        Tile({"BV": 32}, 4, 1),
        Tile({"BV": 64}, 4, 1, ("sm_90", "sm_100", "gfx942")),
    ),
    _CASES,
    types("reads scores scores_k states y v o", "", "N T H V"),
)
STATES_BACKWARD = Kernel(
    "scan_delta_states_backward",
    states_backward,
    (Tile({"BV": 32}, 4, 1), Tile({"BV": 64}, 8, 1), Tile({"BV": 16}, 4, 2)),
    {"bf16_64": _SIZES | {"KP": 64, "VP": 64}, "bf16_128": _SIZES},
    types("do w reads writes scores states dstates dy", "carry dfinal dcarry dinitial", _INTS),
)
KERNELS: list[Kernel] = [OPERANDS, STATES_FORWARD, OUTPUTS, STATES_BACKWARD]

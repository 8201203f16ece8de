"""Scan of the plain classes, forward: states from chunk to chunk, and the outputs of all chunks at once.

    S_{n+1} = carry_n S_n + (k e^{G_C - G})^T v,    o_n = scale ((q e^G) S_n + tril(M^{qk}) v)

Blocks of keys and of values of a state are independent: a pass over the chunks has a program for each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo_kernels.launch import NVIDIA, Kernel, Tile
from attnzoo_kernels.scan.kernel_delta_pairs import load_rows, locate, pair_weights, same_run, types
from attnzoo_kernels.scan.kernel_delta_states import decay_weights


@triton.jit
def states_forward(
    k, v, g, gates, segments, initial, states, final, size, N, T, H, K, V,
    C: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DIAGONAL: tl.constexpr, RUNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of a state through all chunks: entering states (B*H, N+1, KP, VP), the last one final."""
    x = tl.program_id(0).to(tl.int64)
    d, c = tl.program_id(1) * BK + tl.arange(0, BK), tl.program_id(2) * BV + tl.arange(0, BV)
    whole = (d < K)[:, None] & (c < V)[None, :]
    at = x * K * V + d[:, None] * V + c[None, :]
    square = d[:, None] * VP + c[None, :]
    state = tl.load(initial + at, mask=whole, other=0.0)
    for n in range(N):
        chunk = x * N + n
        tl.store(states + (chunk + x) * KP * VP + square, state.to(states.dtype.element_ty))
        b, _, row, inside = locate(chunk, N, T, H, C)
        _, _, after, carry = decay_weights(
            g, gates, segments, size, chunk, b, n, row, inside, d, T, H, K, C, DIAGONAL, False, RUNS
        )
        keys = load_rows(k, row, inside, d, K)
        keys = (keys.to(tl.float32) * after).to(keys.dtype)
        values = load_rows(v, row, inside, c, V)
        state = tl.dot(tl.trans(keys), values, state * carry[:, None], input_precision=PRECISION)
    tl.store(states + (x * (N + 1) + N) * KP * VP + square, state.to(states.dtype.element_ty))
    tl.store(final + at, state, mask=whole)


@triton.jit
def chunk_scores(
    q, k, gates, segments, scores, scale, size, program, b, n, row, inside, T, K,
    C: tl.constexpr, BK: tl.constexpr, DIAGONAL: tl.constexpr, RUNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scale tril(M^{qk}) of a chunk in the operands' dtype; loaded from ``scores`` under a diagonal decay."""
    i = tl.arange(0, C)
    if DIAGONAL:
        inner = tl.load(scores + program * C * C + i[:, None] * C + i[None, :])
    else:
        pairs = tl.zeros([C, C], tl.float32)
        for start in range(0, K, BK):
            d = start + tl.arange(0, BK)
            keys = tl.trans(load_rows(k, row, inside, d, K))
            pairs = tl.dot(load_rows(q, row, inside, d, K), keys, pairs, input_precision=PRECISION)
        seen = i[:, None] >= i[None, :]
        if RUNS:
            seen &= same_run(segments, b, n, T, C)
        weights = pair_weights(gates, size, program, 0, C) * scale
        inner = tl.where(seen, pairs * weights, 0.0).to(q.dtype.element_ty)
    return inner


@triton.jit
def outputs(
    q, k, v, g, gates, segments, scores, states, o, scale, size, N, T, H, K, V,
    C: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DIAGONAL: tl.constexpr, RUNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk and one block of V."""
    program = tl.program_id(0).to(tl.int64)
    b, n, row, inside = locate(program, N, T, H, C)
    c = tl.program_id(1) * BV + tl.arange(0, BV)
    states += (program + program // N) * KP * VP
    out = tl.zeros([C, BV], tl.float32)
    for start in range(0, K, BK):
        d = start + tl.arange(0, BK)
        upto, _, _, _ = decay_weights(
            g, gates, segments, size, program, b, n, row, inside, d, T, H, K, C, DIAGONAL, False, RUNS
        )
        queries = load_rows(q, row, inside, d, K)
        queries = (queries.to(tl.float32) * upto * scale).to(queries.dtype)
        state = tl.load(states + d[:, None] * VP + c[None, :])
        out = tl.dot(queries, state, out, input_precision=PRECISION)
    inner = chunk_scores(
        q, k, gates, segments, scores, scale, size, program, b, n, row, inside, T, K,
        C, BK, DIAGONAL, RUNS, PRECISION,
    )  # fmt: skip
    out = tl.dot(inner, load_rows(v, row, inside, c, V), out, input_precision=PRECISION)
    mask = inside[:, None] & (c < V)[None, :]
    tl.store(o + row[:, None] * V + c[None, :], out.to(o.dtype.element_ty), mask=mask)


SIZES = {"C": 64, "KP": 128, "VP": 128, "PRECISION": "ieee", "RUNS": True, "DIAGONAL": False}
CASES = {
    "bf16_64": SIZES | {"KP": 64, "VP": 64},
    "bf16_128": SIZES,
    "bf16_128_diagonal": SIZES | {"DIAGONAL": True},
}
INTS = "N T H K V"

STATES_FORWARD = Kernel(
    "scan_plain_states_forward",
    states_forward,
    (
        Tile({"BK": 64, "BV": 64}, 8, 2, NVIDIA),
        Tile({"BK": 32, "BV": 32}, 4, 2),
        Tile({"BK": 16, "BV": 32}, 4, 2),
        Tile({"BK": 64, "BV": 64}, 4, 2, ("gfx942",)),
    ),
    CASES,
    types("k v states", "g gates initial final", INTS),
)
OUTPUTS = Kernel(
    "scan_plain_outputs",
    outputs,
    (Tile({"BK": 64, "BV": 64}, 8, 2), Tile({"BK": 64, "BV": 64}, 4, 2), Tile({"BK": 16, "BV": 32}, 4, 2)),
    CASES,
    types("q k v scores states o", "g gates", INTS),
)
KERNELS: list[Kernel] = [STATES_FORWARD, OUTPUTS]

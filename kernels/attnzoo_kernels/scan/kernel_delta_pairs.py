"""Pairs of tokens inside a chunk under one decay per token and head, and the inverse of their triangle.

Buffers are chunk-major, ``(B*H*N, C, ·)`` for N chunks of C tokens; a program number counts B*H*N. Widths are
padded to KP and VP, and every row of a buffer is written, with zeros beyond T. Two classes share the kernels:

    delta   probe p = beta k, column e = k          rank-1  probe p = -a, columns e and k
            (I + tril(M^{pe}, -1)) y = z - R S,  z = beta v (delta) or -tril(M^{pk}, -1) v (rank-1)

The rank-1 probe reads the state before its own token's decay: `before` in what follows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo_kernels.launch import Kernel, Tile

LOG2_E = tl.constexpr(1.4426950408889634)
MIN_LOG_DECAY = tl.constexpr(-1000.0)


@triton.jit
def locate(program, N, T, H, C: tl.constexpr):
    """Batch, chunk, and per token of the chunk: its row in a (B,T,H,·) tensor and whether it exists."""
    x, n = program // N, program % N
    t = n * C + tl.arange(0, C)
    return x // H, n, (x // H * T + t) * H + x % H, t < T


@triton.jit
def load_rows(x, row, inside, d, D):
    """(rows, columns d) of a (rows, D) matrix, zero outside."""
    return tl.load(x + row[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def load_probe(a, beta, row, inside, d, D, RANK_ONE: tl.constexpr):
    """p in fp32: -a, or beta k with k in a's place."""
    x = load_rows(a, row, inside, d, D).to(tl.float32)
    return -x if RANK_ONE else x * tl.load(beta + row, mask=inside, other=0.0)[:, None]


@triton.jit
def load_logs(g, row, inside, d, D):
    """Diagonal log2 decays, zero outside."""
    return tl.maximum(load_rows(g, row, inside, d, D).to(tl.float32), MIN_LOG_DECAY) * LOG2_E


@triton.jit
def pair_weights(gates, size, program, FROM: tl.constexpr, C: tl.constexpr):
    """exp(G_r - G_j) of a chunk, above the diagonal too: mask it. FROM = 2: the rows' G is that of `before`.

    gates (4, B*H*N, C): G in log2 as a sum of two fp32 numbers, and G before the own decay.
    """
    i = tl.arange(0, C)
    column = gates + program * C + i
    row = column + FROM * size
    high = tl.load(row)[:, None] - tl.load(column)[None, :]
    low = tl.load(row + size)[:, None] - tl.load(column + size)[None, :]
    return tl.exp2(tl.minimum(high + low, 0.0))


@triton.jit
def same_run(segments, b, n, T, C: tl.constexpr):
    run = tl.load(segments + b * T + tl.minimum(n * C + tl.arange(0, C), T - 1))
    return run[:, None] == run[None, :]


@triton.jit
def pairs(
    q, k, e, a, beta, gates, segments, lower, scores, lower_k, scores_k, scale, size, N, T, H, K,
    C: tl.constexpr, BK: tl.constexpr, RANK_ONE: tl.constexpr, RUNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """lower = tril(M^{pe}, -1), scores = scale tril(M^{qe}); with k in e's place for rank-1's second pair."""
    program = tl.program_id(0).to(tl.int64)
    b, n, row, inside = locate(program, N, T, H, C)
    pe = tl.zeros([C, C], tl.float32)
    qe = tl.zeros([C, C], tl.float32)
    pk = tl.zeros([C, C], tl.float32)
    qk = tl.zeros([C, C], tl.float32)
    for start in range(0, K, BK):
        d = start + tl.arange(0, BK)
        queries = load_rows(q, row, inside, d, K)
        probes = load_probe(a, beta, row, inside, d, K, RANK_ONE).to(queries.dtype)
        columns = tl.trans(load_rows(e, row, inside, d, K))
        pe = tl.dot(probes, columns, pe, input_precision=PRECISION)
        qe = tl.dot(queries, columns, qe, input_precision=PRECISION)
        if RANK_ONE:
            columns = tl.trans(load_rows(k, row, inside, d, K))
            pk = tl.dot(probes, columns, pk, input_precision=PRECISION)
            qk = tl.dot(queries, columns, qk, input_precision=PRECISION)
    i = tl.arange(0, C)
    seen = i[:, None] >= i[None, :]
    if RUNS:
        seen &= same_run(segments, b, n, T, C)
    strict = seen & (i[:, None] != i[None, :])
    weights = pair_weights(gates, size, program, 0, C)
    at = program * C * C + i[:, None] * C + i[None, :]
    tl.store(scores + at, tl.where(seen, qe * weights * scale, 0.0).to(scores.dtype.element_ty))
    if RANK_ONE:
        tl.store(scores_k + at, tl.where(seen, qk * weights * scale, 0.0).to(scores_k.dtype.element_ty))
        weights = pair_weights(gates, size, program, 2, C)
        tl.store(lower_k + at, tl.where(strict, pk * weights, 0.0).to(lower_k.dtype.element_ty))
    tl.store(lower + at, tl.where(strict, pe * weights, 0.0))


@triton.jit
def _inverse_16(block):
    """(I + block)^-1 for a strictly lower triangular 16 x 16 block, row by row."""
    i = tl.arange(0, 16)
    out = tl.where(i[:, None] == i[None, :], 1.0, 0.0)
    for r in range(1, 16):
        row = tl.sum(tl.where(i[:, None] == r, block, 0.0), axis=0)
        change = tl.sum(row[:, None] * out, axis=0)
        out = tl.where(i[:, None] == r, out - change[None, :], out)
    return out


@triton.jit
def _block(x, r: tl.constexpr, c: tl.constexpr, C: tl.constexpr):
    i = tl.arange(0, 16)
    return x + (r * 16 + i)[:, None] * C + c * 16 + i[None, :]


@triton.jit
def _dot(x, y):
    return tl.dot(x, y, input_precision="ieee")


@triton.jit
def inverse(lower, out, C: tl.constexpr):
    """(I + lower)^-1 by blocks of 16: X_rc = -X_rr sum_{c <= m < r} L_rm X_mc, in fp32."""
    program = tl.program_id(0).to(tl.int64)
    lower += program * C * C
    out += program * C * C
    ty = out.dtype.element_ty
    x00 = _inverse_16(tl.load(_block(lower, 0, 0, C)))
    tl.store(_block(out, 0, 0, C), x00.to(ty))
    none = tl.zeros([16, 16], ty)
    if C > 16:
        x11 = _inverse_16(tl.load(_block(lower, 1, 1, C)))
        x10 = -_dot(x11, _dot(tl.load(_block(lower, 1, 0, C)), x00))
        tl.store(_block(out, 1, 1, C), x11.to(ty))
        tl.store(_block(out, 1, 0, C), x10.to(ty))
        tl.store(_block(out, 0, 1, C), none)
    if C > 32:
        l21, l31 = tl.load(_block(lower, 2, 1, C)), tl.load(_block(lower, 3, 1, C))
        l32 = tl.load(_block(lower, 3, 2, C))
        x22 = _inverse_16(tl.load(_block(lower, 2, 2, C)))
        x33 = _inverse_16(tl.load(_block(lower, 3, 3, C)))
        x32 = -_dot(x33, _dot(l32, x22))
        x21 = -_dot(x22, _dot(l21, x11))
        x31 = -_dot(x33, _dot(l31, x11) + _dot(l32, x21))
        x20 = -_dot(x22, _dot(tl.load(_block(lower, 2, 0, C)), x00) + _dot(l21, x10))
        x30 = -_dot(x33, _dot(tl.load(_block(lower, 3, 0, C)), x00) + _dot(l31, x10) + _dot(l32, x20))
        tl.store(_block(out, 2, 2, C), x22.to(ty))
        tl.store(_block(out, 3, 3, C), x33.to(ty))
        tl.store(_block(out, 3, 2, C), x32.to(ty))
        tl.store(_block(out, 2, 1, C), x21.to(ty))
        tl.store(_block(out, 3, 1, C), x31.to(ty))
        tl.store(_block(out, 2, 0, C), x20.to(ty))
        tl.store(_block(out, 3, 0, C), x30.to(ty))
        tl.store(_block(out, 0, 2, C), none)
        tl.store(_block(out, 0, 3, C), none)
        tl.store(_block(out, 1, 2, C), none)
        tl.store(_block(out, 1, 3, C), none)
        tl.store(_block(out, 2, 3, C), none)


def types(halves: str, fp32: str, ints: str = "N T H K") -> dict[str, str]:
    """Argument types of a bf16 case: names of bf16 and fp32 pointers and of integers, split at spaces."""
    found = dict.fromkeys(halves.split(), "*bf16") | dict.fromkeys(fp32.split(), "*fp32")
    return found | dict.fromkeys(ints.split(), "i32") | {"segments": "*i64", "scale": "fp32", "size": "i64"}


FLAGS = {"RANK_ONE": False, "RUNS": True, "PRECISION": "ieee"}

PAIRS = Kernel(
    "scan_delta_pairs",
    pairs,
    (Tile({"BK": 64}, 8, 2), Tile({"BK": 32}, 4, 3, ("sm_100", "gfx942"))),
    {"bf16": {"C": 64} | FLAGS, "bf16_rank_one": {"C": 64} | FLAGS | {"RANK_ONE": True}},
    types("q k e a scores lower_k scores_k", "beta gates lower"),
)
INVERSE = Kernel(
    "scan_delta_inverse",
    inverse,
    (Tile({}, 2, 1), Tile({}, 1, 1, ("gfx942",))),
    {"bf16": {"C": 64}},
    {"lower": "*fp32", "out": "*bf16"},
)
KERNELS: list[Kernel] = [PAIRS, INVERSE]

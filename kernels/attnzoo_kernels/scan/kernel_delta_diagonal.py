"""Pairs of tokens inside a chunk under a diagonal decay, and their gradients, by blocks of 16 tokens.

Between two blocks the decay splits at the start of the row's block: from the column to there, and from there
to the row; both sums are made by adding log decays, so no exponent is positive and nothing cancels. Inside a
block the decay of every pair is the running sum between its tokens. Names are those of `kernel_delta_pairs`;
without PROBES only the pairs of q are made, which is all that the plain classes need.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnzoo_kernels.launch import Kernel, Tile
from attnzoo_kernels.scan.kernel_delta_pairs import (
    FLAGS,
    LOG2_E,
    MIN_LOG_DECAY,
    load_logs,
    load_probe,
    load_rows,
    types,
)


@triton.jit
def _rows(program, block, N, T, H, C: tl.constexpr):
    """Rows of a block of 16 tokens in (B,T,H,·) tensors, and which exist."""
    x, n = program // N, program % N
    t = n * C + block * 16 + tl.arange(0, 16)
    return (x // H * T + t) * H + x % H, t < T


@triton.jit
def _upto(g, row, inside, d, H, K, BEFORE: tl.constexpr):
    """exp of the decay from the block's start to each of its tokens; BEFORE leaves out the token's own."""
    if BEFORE:
        i = tl.arange(0, 16)
        return tl.exp2(tl.cumsum(load_logs(g, row - H, inside & (i > 0), d, K), 0))
    return tl.exp2(tl.cumsum(load_logs(g, row, inside, d, K), 0))


@triton.jit
def _after(g, row, inside, d, H, K):
    """Log2 decay from after each token to the block's end."""
    follows = tl.arange(0, 16) + 1 < tl.sum(inside.to(tl.int32), 0)
    return tl.cumsum(load_logs(g, row + H, follows, d, K), 0, reverse=True)


@triton.jit
def _total(g, row, inside, d, K):
    return tl.sum(load_logs(g, row, inside, d, K), 0)


@triton.jit
def _one(x, at, exists, d, K):
    return tl.load(x + at * K + d, mask=d < tl.where(exists, K, 0), other=0.0).to(tl.float32)


@triton.jit
def _one_probe(a, beta, at, exists, d, K, RANK_ONE: tl.constexpr):
    x = _one(a, at, exists, d, K)
    return -x if RANK_ONE else x * tl.load(beta + at, mask=exists, other=0.0)


@triton.jit
def _inside_block(
    q, k, e, a, beta, g, row, inside, d, H, K,
    BK: tl.constexpr, RANK_ONE: tl.constexpr, PROBES: tl.constexpr,
):  # fmt: skip
    """The four products of a block with itself over one block of K; the diagonal counts for q only."""
    i = tl.arange(0, 16)
    pe = tl.zeros([16, 16], tl.float32)
    qe = tl.zeros([16, 16], tl.float32)
    pk = tl.zeros([16, 16], tl.float32)
    qk = tl.zeros([16, 16], tl.float32)
    columns = load_rows(e, row, inside, d, K).to(tl.float32)
    keys = load_rows(k, row, inside, d, K).to(tl.float32)
    first, exist = tl.sum(tl.where(i == 0, row, 0), 0), tl.sum(inside.to(tl.int32), 0)
    between = tl.zeros([16, BK], tl.float32)
    for r in range(16):
        at, exists = first + r * H, r < exist
        query = _one(q, at, exists, d, K)
        if PROBES:
            probe = _one_probe(a, beta, at, exists, d, K, RANK_ONE)
        before = tl.exp2(between)
        logs = tl.maximum(_one(g, at, exists, d, K), MIN_LOG_DECAY) * LOG2_E
        between = tl.where((i < r)[:, None], between + logs[None, :], between)
        upto = tl.exp2(between)
        if not RANK_ONE:
            before = upto
        own, here = (i == r)[:, None], (i <= r)[None, :]
        score = tl.sum(columns * upto * query[None, :], 1)
        qe = tl.where(own & here, score[None, :], qe)
        if PROBES:
            score = tl.sum(columns * before * probe[None, :], 1)
            pe = tl.where(own & here, score[None, :], pe)
        if RANK_ONE:
            qk = tl.where(own & here, tl.sum(keys * upto * query[None, :], 1)[None, :], qk)
            pk = tl.where(own & here, tl.sum(keys * before * probe[None, :], 1)[None, :], pk)
    return pe, qe, pk, qk


@triton.jit
def _same_runs(segments, program, r, c, N, T, H, C: tl.constexpr):
    i = tl.arange(0, 16)
    x, n = program // N, program % N
    segments += x // H * T
    rows = tl.load(segments + tl.minimum(n * C + r * 16 + i, T - 1))
    columns = tl.load(segments + tl.minimum(n * C + c * 16 + i, T - 1))
    return rows[:, None] == columns[None, :]


@triton.jit
def pairs_diagonal(
    q, k, e, a, beta, g, segments, lower, scores, lower_k, scores_k, scale, N, T, H, K,
    C: tl.constexpr, BK: tl.constexpr, RANK_ONE: tl.constexpr, PROBES: tl.constexpr, RUNS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of 16 x 16 of a chunk's matrices; blocks above the diagonal are set to zero."""
    program, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    r, c = part // (C // 16), part % (C // 16)
    i = tl.arange(0, 16)
    pe = tl.zeros([16, 16], tl.float32)
    qe = tl.zeros([16, 16], tl.float32)
    pk = tl.zeros([16, 16], tl.float32)
    qk = tl.zeros([16, 16], tl.float32)
    row, inside = _rows(program, r, N, T, H, C)
    if r >= c:
        for start in range(0, K, BK):
            d = start + tl.arange(0, BK)
            if r == c:
                pe_d, qe_d, pk_d, qk_d = _inside_block(
                    q, k, e, a, beta, g, row, inside, d, H, K, BK, RANK_ONE, PROBES
                )
                pe, qe, pk, qk = pe + pe_d, qe + qe_d, pk + pk_d, qk + qk_d
            else:
                at, exist = _rows(program, c, N, T, H, C)
                between = tl.zeros([BK], tl.float32)
                for m in range(c + 1, r):
                    middle, full = _rows(program, m, N, T, H, C)
                    between += _total(g, middle, full, d, K)
                ahead = tl.exp2(_after(g, at, exist, d, H, K) + between[None, :])
                upto = _upto(g, row, inside, d, H, K, False)
                ty = q.dtype.element_ty
                queries = (load_rows(q, row, inside, d, K).to(tl.float32) * upto).to(ty)
                columns = tl.trans((load_rows(e, at, exist, d, K).to(tl.float32) * ahead).to(ty))
                if PROBES:
                    before = _upto(g, row, inside, d, H, K, True) if RANK_ONE else upto
                    probes = (load_probe(a, beta, row, inside, d, K, RANK_ONE) * before).to(ty)
                    pe = tl.dot(probes, columns, pe, input_precision=PRECISION)
                qe = tl.dot(queries, columns, qe, input_precision=PRECISION)
                if RANK_ONE:
                    columns = tl.trans((load_rows(k, at, exist, d, K).to(tl.float32) * ahead).to(ty))
                    pk = tl.dot(probes, columns, pk, input_precision=PRECISION)
                    qk = tl.dot(queries, columns, qk, input_precision=PRECISION)
    seen = (r * 16 + i)[:, None] >= (c * 16 + i)[None, :]
    if RUNS:
        seen &= _same_runs(segments, program, r, c, N, T, H, C)
    strict = seen & ((r * 16 + i)[:, None] != (c * 16 + i)[None, :])
    out = program * C * C + (r * 16 + i)[:, None] * C + c * 16 + i[None, :]
    if PROBES:
        tl.store(lower + out, tl.where(strict, pe, 0.0))
    tl.store(scores + out, tl.where(seen, qe * scale, 0.0).to(scores.dtype.element_ty))
    if RANK_ONE:
        tl.store(lower_k + out, tl.where(strict, pk, 0.0).to(lower_k.dtype.element_ty))
        tl.store(scores_k + out, tl.where(seen, qk * scale, 0.0).to(scores_k.dtype.element_ty))


@triton.jit
def _load_pair(x, segments, program, r, c, N, T, H, C: tl.constexpr, RUNS: tl.constexpr):
    i = tl.arange(0, 16)
    block = tl.load(x + program * C * C + (r * 16 + i)[:, None] * C + c * 16 + i[None, :])
    if RUNS:
        same = _same_runs(segments, program, r, c, N, T, H, C)
        block = tl.where(same, block.to(tl.float32), 0.0).to(block.dtype)
    return block


@triton.jit
def _one_row(block, r):
    i = tl.arange(0, 16)
    return tl.sum(tl.where(i[:, None] == r, block.to(tl.float32), 0.0), 0)


@triton.jit
def _gradients_inside(
    dq, dp, de, dk, q, k, e, a, beta, g, ds, dl, dsk, dlk, row, inside, d, scale, H, K,
    BK: tl.constexpr, RANK_ONE: tl.constexpr, PROBES: tl.constexpr,
):  # fmt: skip
    """Adds what the pairs within the block give; ds, dl, dsk, dlk are zero above the diagonal."""
    i = tl.arange(0, 16)
    columns = load_rows(e, row, inside, d, K).to(tl.float32)
    keys = load_rows(k, row, inside, d, K).to(tl.float32)
    first, exist = tl.sum(tl.where(i == 0, row, 0), 0), tl.sum(inside.to(tl.int32), 0)
    between = tl.zeros([16, BK], tl.float32)
    for r in range(16):
        at, exists = first + r * H, r < exist
        query = _one(q, at, exists, d, K)
        if PROBES:
            probe = _one_probe(a, beta, at, exists, d, K, RANK_ONE)
        before = tl.exp2(between)
        logs = tl.maximum(_one(g, at, exists, d, K), MIN_LOG_DECAY) * LOG2_E
        between = tl.where((i < r)[:, None], between + logs[None, :], between)
        upto = tl.exp2(between)
        if not RANK_ONE:
            before = upto
        own = (i == r)[:, None]
        score = _one_row(ds, r)[:, None] * upto
        query_sum = tl.sum(score * columns, 0)
        de += score * query[None, :] * scale
        if PROBES:
            inner = _one_row(dl, r)[:, None] * before
            probe_sum = tl.sum(inner * columns, 0)
            de += inner * probe[None, :]
        if RANK_ONE:
            score, inner = _one_row(dsk, r)[:, None] * upto, _one_row(dlk, r)[:, None] * before
            query_sum += tl.sum(score * keys, 0)
            probe_sum += tl.sum(inner * keys, 0)
            dk += score * query[None, :] * scale + inner * probe[None, :]
        dq = tl.where(own, dq + query_sum[None, :], dq)
        if PROBES:
            dp = tl.where(own, dp + probe_sum[None, :], dp)
    return dq, dp, de, dk


@triton.jit
def pairs_diagonal_backward(
    q, k, e, a, beta, g, segments, dlower, dscores, dlower_k, dscores_k, inner, scale, size, N, T, H, K,
    C: tl.constexpr, KP: tl.constexpr, BK: tl.constexpr, RANK_ONE: tl.constexpr, PROBES: tl.constexpr,
    RUNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients (4, B*H*N, C, KP) of q, p, e, k for one block of 16 tokens and one of K.

    Those of e and k take q times the scale of the scores; q's is that of the scaled query.
    """
    program, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.program_id(2) * BK + tl.arange(0, BK)
    i = tl.arange(0, 16)
    row, inside = _rows(program, block, N, T, H, C)
    ty = q.dtype.element_ty
    dq = tl.zeros([16, BK], tl.float32)
    dp = tl.zeros([16, BK], tl.float32)
    de = tl.zeros([16, BK], tl.float32)
    dk = tl.zeros([16, BK], tl.float32)
    between = tl.zeros([BK], tl.float32)
    for m in range(block):  # as rows, over the columns of earlier blocks, the nearest first
        c = block - 1 - m
        at, exist = _rows(program, c, N, T, H, C)
        ahead = tl.exp2(_after(g, at, exist, d, H, K) + between[None, :])
        between += _total(g, at, exist, d, K)
        columns = (load_rows(e, at, exist, d, K).to(tl.float32) * ahead).to(ty)
        ds = _load_pair(dscores, segments, program, block, c, N, T, H, C, RUNS)
        dq = tl.dot(ds, columns, dq, input_precision=PRECISION)
        if PROBES:
            dl = _load_pair(dlower, segments, program, block, c, N, T, H, C, RUNS)
            dp = tl.dot(dl, columns, dp, input_precision=PRECISION)
        if RANK_ONE:
            columns = (load_rows(k, at, exist, d, K).to(tl.float32) * ahead).to(ty)
            ds = _load_pair(dscores_k, segments, program, block, c, N, T, H, C, RUNS)
            dl = _load_pair(dlower_k, segments, program, block, c, N, T, H, C, RUNS)
            dq = tl.dot(ds, columns, dq, input_precision=PRECISION)
            dp = tl.dot(dl, columns, dp, input_precision=PRECISION)
    dq = dq * _upto(g, row, inside, d, H, K, False)
    if PROBES:
        dp = dp * _upto(g, row, inside, d, H, K, RANK_ONE)
    between = tl.zeros([BK], tl.float32)
    for r in range(block + 1, C // 16):  # as columns, over the rows of later blocks, the nearest first
        at, exist = _rows(program, r, N, T, H, C)
        gap = tl.exp2(between)[None, :]
        between += _total(g, at, exist, d, K)
        upto = _upto(g, at, exist, d, H, K, False) * gap
        queries = (load_rows(q, at, exist, d, K).to(tl.float32) * upto * scale).to(ty)
        ds = tl.trans(_load_pair(dscores, segments, program, r, block, N, T, H, C, RUNS))
        de = tl.dot(ds, queries, de, input_precision=PRECISION)
        if PROBES:
            before = _upto(g, at, exist, d, H, K, True) * gap if RANK_ONE else upto
            probes = (load_probe(a, beta, at, exist, d, K, RANK_ONE) * before).to(ty)
            dl = tl.trans(_load_pair(dlower, segments, program, r, block, N, T, H, C, RUNS))
            de = tl.dot(dl, probes, de, input_precision=PRECISION)
        if RANK_ONE:
            ds = tl.trans(_load_pair(dscores_k, segments, program, r, block, N, T, H, C, RUNS))
            dl = tl.trans(_load_pair(dlower_k, segments, program, r, block, N, T, H, C, RUNS))
            dk = tl.dot(ds, queries, dk, input_precision=PRECISION)
            dk = tl.dot(dl, probes, dk, input_precision=PRECISION)
    ahead = tl.exp2(_after(g, row, inside, d, H, K))
    de, dk = de * ahead, dk * ahead
    ds = _load_pair(dscores, segments, program, block, block, N, T, H, C, RUNS)
    dl = ds
    if PROBES:
        dl = _load_pair(dlower, segments, program, block, block, N, T, H, C, RUNS)
    dsk, dlk = ds, dl
    if RANK_ONE:
        dsk = _load_pair(dscores_k, segments, program, block, block, N, T, H, C, RUNS)
        dlk = _load_pair(dlower_k, segments, program, block, block, N, T, H, C, RUNS)
    dq, dp, de, dk = _gradients_inside(
        dq, dp, de, dk, q, k, e, a, beta, g, ds, dl, dsk, dlk, row, inside, d, scale, H, K, BK,
        RANK_ONE, PROBES,
    )  # fmt: skip
    out = inner + (program * C + block * 16 + i)[:, None] * KP + d[None, :]
    tl.store(out, dq)
    if PROBES:
        tl.store(out + size * KP, dp)
    tl.store(out + 2 * size * KP, de)
    if RANK_ONE:
        tl.store(out + 3 * size * KP, dk)


_GATED = FLAGS | {"C": 64, "PROBES": True}
_CASES = {
    "bf16": _GATED,
    "bf16_rank_one": _GATED | {"RANK_ONE": True},
    "bf16_plain": _GATED | {"PROBES": False},
}

PAIRS_DIAGONAL = Kernel(
    "scan_delta_pairs_diagonal",
    pairs_diagonal,
    (Tile({"BK": 16}, 2, 1), Tile({"BK": 16}, 1, 1), Tile({"BK": 64}, 2, 1, ("gfx942",))),
    _CASES,
    types("q k e a scores lower_k scores_k", "beta g lower"),
)
PAIRS_DIAGONAL_BACKWARD = Kernel(
    "scan_delta_pairs_diagonal_backward",
    pairs_diagonal_backward,
    (Tile({"BK": 32}, 2, 1), Tile({"BK": 16}, 1, 1), Tile({"BK": 64}, 4, 1, ("gfx942",))),
    {name: case | {"KP": 128} for name, case in _CASES.items()},
    types("q k e a dlower dscores dlower_k dscores_k", "beta g inner"),
)
KERNELS: list[Kernel] = [PAIRS_DIAGONAL, PAIRS_DIAGONAL_BACKWARD]

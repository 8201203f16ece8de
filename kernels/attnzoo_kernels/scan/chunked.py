"""The scan by chunks: matrix products inside a chunk, one state handed from chunk to chunk.

With G the sum of log decays from the start of a chunk, S the state that enters it, rows r and columns j:

    M^{xy}_{rj} = sum_d x_{r,d} y_{j,d} exp(G_{r,d} - G_{j,d}), zero for j > r
    plain   o = (q e^G) S + M^{qk} v,   S' = e^{G_C} S + (k e^{G_C-G})^T v
    delta   (I + tril(beta M^{kk}, -1)) y = beta (v - (k e^G) S), then as plain with y in place of v
    rank-1  (I - tril(M^{ae}, -1)) y = tril(M^{ak}, -1) v + (a e^{G-g}) S, where the rows of a use G - g: they
            read the state before the token's own decay;
            then as plain, and o += M^{qe} y, S' += (e e^{G_C-G})^T y

The triangular matrices are inverted for all chunks at once and applied when the state is known: that is less
work than solving for K-wide right-hand sides in advance.
G_r enters only as exp(G_r) on row operands, exp(-G_j) on column operands and exp(G_C) on S'. So the weights
are constants for autograd, and G receives +-x * dx from every operand x (decay.Gate) and S' * dS' (states).
exp2 of a difference <= 0 is the only exponential.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnzoo_kernels.scan.decay import (
    Decay,
    DiagonalDecay,
    Grid,
    Runs,
    ScalarDecay,
    diagonal_chunk,
    split_gates,
)
from attnzoo_kernels.scan.states import Accumulate, Correct


def scan_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    e: Tensor | None,
    a: Tensor | None,
    scale: float,
    state: Tensor,
    segments: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Arguments as validated by `api.scan`, `state` (B,H,K,V) sets the working precision.

    Returns o (B,T,H,V) in v's dtype and the last state.
    """
    diagonal = a is not None or (g is not None and g.dim() == 4)
    grid = Grid.of(q.shape[1], diagonal_chunk(chunk_size, k.shape[-1]) if diagonal else chunk_size)
    runs = None if segments is None else Runs.of(segments, grid)
    if a is not None:
        g = _as_diagonal(g, k)
    dtype, out_dtype, initial = state.dtype, v.dtype, state.flatten(0, 1)
    gates = None if g is None else split_gates(g, grid, dtype)
    q, k, v = (grid.split(x, dtype) for x in (q, k, v))
    decay = DiagonalDecay(gates, runs, k, a is not None) if diagonal else ScalarDecay(gates, runs, k)

    q = decay.row(q if scale == 1 else q * scale)
    if a is not None:
        o, final = _rank_one(q, k, v, grid.split(e, dtype), grid.split(a, dtype), decay, initial)
    elif beta is not None:
        o, final = _delta(q, k, v, grid.split(beta.unsqueeze(-1), dtype), decay, initial)
    else:
        o, final = _plain(q, k, v, decay, initial)
    return grid.join(o, out_dtype), final.view_as(state)


def _as_diagonal(g: Tensor | None, k: Tensor) -> Tensor:
    if g is None:
        return torch.zeros_like(k)
    return (g if g.dim() == 4 else g[..., None]).expand(k.shape)


def _plain(q: Tensor, k: Tensor, v: Tensor, decay: Decay, initial: Tensor) -> tuple[Tensor, Tensor]:
    k = decay.column(k)
    ((scores,),) = decay.products([q], [k])
    writes = decay.write(k).mT @ v
    states, final = Accumulate.apply(initial, writes.flatten(1, 2), decay.carry, decay.totals)
    return _read(decay.read(q), states, (scores, v)), final


def _delta(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Decay, initial: Tensor
) -> tuple[Tensor, Tensor]:
    k_row, k = decay.row(k * beta), decay.column(k)
    (overlap,), (scores,) = decay.products([k_row, q], [k])
    operands = (overlap, v * beta, decay.read(k_row), decay.write(k))
    operands = (x.flatten(1, 2) for x in operands)
    y, states, final = Correct.apply(initial, *operands, None, decay.carry, decay.totals)
    return _read(decay.read(q), states, (scores, y.view_as(v))), final


def _rank_one(
    q: Tensor, k: Tensor, v: Tensor, e: Tensor, a: Tensor, decay: DiagonalDecay, initial: Tensor
) -> tuple[Tensor, Tensor]:
    a = decay.row_before(-a)  # the sign makes the system I + tril(M), as in delta
    k, e = decay.column(k), decay.column(e)
    (a_e, a_k), (q_e, q_k) = decay.products([a, q], [e, k], before=1)
    operands = (a_e, a_k.tril(-1) @ -v, decay.read_before(a), decay.write(e), decay.write(k).mT @ v)
    operands = (x.flatten(1, 2) for x in operands)
    y, states, final = Correct.apply(initial, *operands, decay.carry, decay.totals)
    return _read(decay.read(q), states, (q_k, v), (q_e, y.view_as(v))), final


def _read(q: Tensor, states: Tensor, *inside: tuple[Tensor, Tensor]) -> Tensor:
    """q S plus the sum of scores @ values over the pairs `inside`."""
    out = torch.bmm(q.flatten(0, 2), states.flatten(0, 1))
    for scores, values in inside:
        out = torch.baddbmm(out, scores.flatten(0, 2), values.flatten(0, 2))
    return out.view_as(inside[0][1])

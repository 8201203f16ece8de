"""Matrix-product FLOPs of the scan, as the method needs them and as the chunked form executes them."""

from __future__ import annotations

from typing import NamedTuple

from attnzoo_kernels.scan.decay import Grid

KINDS = ("scalar", "diagonal", "delta", "delta_diagonal", "rank_one")


class ScanFlops(NamedTuple):
    """FLOPs (2 per multiply-add) of one sequence, all heads, forward."""

    method: int
    executed: int


def scan_flops(kind: str, T: int, H: int, K: int, V: int, chunk_size: int = 64) -> ScanFlops:
    """Count the matrix products of `scan` on one sequence of T tokens and H heads, forward.

    `executed` is what form="chunked" runs, as torch's FlopCounterMode sees it: whole C x C products, a padded last
    chunk, and for the delta and rank-1 kinds the inverse of a unit lower triangle by merged blocks. `method` counts
    the pairs j <= r inside a chunk only (j < r where the method needs no more), the triangular system by
    substitution, no padding; both count reading and writing the state once per token. T = 1 takes one recurrent step,
    which has no pairs. Element-wise work (gates, weights, state decay) is in neither, nor are documents: boundaries
    mask pairs that are counted here.

    Args:
        kind: "scalar" (no, constant or scalar gate), "diagonal", "delta" (gate as in scalar), "delta_diagonal",
            "rank_one" (any gate).
        T, H, K, V: tokens, heads, key width, value width.
        chunk_size: as in `scan`: T is cut into ceil(T / chunk_size) chunks of equal size.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: needs one of {', '.join(KINDS)}, got {kind!r}")
    passes = 4 if kind == "rank_one" else 3 if kind.startswith("delta") else 2  # state products of 2 K V per token
    state = 2 * passes * K * V
    if T == 1:
        return ScanFlops(H * state, H * state)
    grid = Grid.of(T, chunk_size)
    tail = T - (grid.count - 1) * grid.size
    method = (grid.count - 1) * _visible(kind, grid.size, K + V) + _visible(kind, tail, K + V) + T * state
    executed = grid.count * (_products(kind, grid.size, K, V) + grid.size * state)
    return ScanFlops(H * method, H * executed)


def _visible(kind: str, C: int, width: int) -> int:
    """Pairs of one chunk, 2 * width FLOPs each (a score over K and its use on V)."""
    pairs, strict = C * (C + 1) // 2, C * (C - 1) // 2
    groups = {"scalar": pairs, "diagonal": pairs, "rank_one": 2 * (pairs + strict)}
    return 2 * width * groups.get(kind, pairs + strict)


def _products(kind: str, C: int, K: int, V: int) -> int:
    """Products of one chunk that do not touch the state."""
    P = 1 << (C - 1).bit_length()  # halving and merging work on a power of two
    square, halved = 2 * C * C * K, P * (P - 1) * K  # one score matrix under a scalar and under a diagonal decay
    inverse = 2 * P * (P * P - 4) // 3 if P > 1 else 0  # two products per pair of blocks of 2, 4, ... P/2 rows
    use = 2 * C * C * V
    return {
        "scalar": square + use,
        "diagonal": halved + use,
        "delta": 2 * square + inverse + 2 * use,
        "delta_diagonal": 2 * halved + inverse + 2 * use,
        "rank_one": 4 * halved + inverse + 4 * use,
    }[kind]

"""Matrix-product FLOPs of the scan, as the method needs them and as the chunked form executes them."""

from __future__ import annotations

from typing import NamedTuple

from attnzoo_kernels.scan.decay import Grid, diagonal_chunk

KINDS = ("scalar", "diagonal", "delta", "delta_diagonal", "rank_one")


class ScanFlops(NamedTuple):
    """FLOPs (2 per multiply-add) of one sequence, all heads, forward."""

    method: int
    executed: int


def scan_flops(
    kind: str, T: int, H: int, K: int, V: int, chunk_size: int = 64, groups: int | None = None
) -> ScanFlops:
    """Count the matrix products of `scan` on one sequence of T tokens and H heads, forward.

    `executed` is what form="chunked" runs, as torch's FlopCounterMode sees it: whole C x C products, a padded
    last chunk, and for the delta and rank-1 kinds the inverse of a unit lower triangle by merged blocks.
    Under a diagonal gate only the pairs j < r are multiplied, a token's own score is element-wise. `method`
    counts the pairs j <= r inside a chunk (j < r where the method needs no more, as there), the triangular
    system by substitution and no padding. Both count the products with the state. T = 1 takes one recurrent
    step, which has no pairs. Element-wise work (gates, weights, state decay) is in neither, and document
    boundaries are ignored: they mask pairs that are counted here.

    Args:
        kind: "scalar" (no, constant or scalar gate), "diagonal", "delta" (no, constant or scalar gate),
            "delta_diagonal", "rank_one" (any gate).
        T, H, K, V: tokens, heads, key width, value width.
        chunk_size: as in `scan`: T is cut into ceil(T / chunk_size) chunks of equal size, which under a
            diagonal gate are no longer than `diagonal_chunk` says.
        groups: heads whose q and k differ, where the others repeat them. A gate per token weighs scores only
            after they are made, so `method` makes them once per group; `scan` makes them for each head.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: needs one of {', '.join(KINDS)}, got {kind!r}")
    if groups is not None and kind not in ("scalar", "delta"):
        raise ValueError(f"groups: scores of kind {kind!r} hold the gates of their head, got {groups}")
    passes = {"rank_one": 4, "scalar": 2, "diagonal": 2}.get(kind, 3)  # products of a token with the state
    state = 2 * passes * K * V
    if T == 1:
        return ScanFlops(H * state, H * state)
    if kind not in ("scalar", "delta"):
        chunk_size = diagonal_chunk(chunk_size, K)
    grid = Grid.of(T, chunk_size)
    tail = T - (grid.count - 1) * grid.size
    widths = (groups or H) * K, H * V
    method = (grid.count - 1) * _visible(kind, grid.size, *widths) + _visible(kind, tail, *widths)
    method += T * H * state
    executed = grid.count * (_products(kind, grid.size, K, V) + grid.size * state)
    return ScanFlops(method, H * executed)


def _visible(kind: str, C: int, K: int, V: int) -> int:
    """FLOPs of the visible pairs of one chunk: each makes a score over K and uses it on V."""
    pairs, strict = C * (C + 1) // 2, C * (C - 1) // 2
    used = {"scalar": pairs, "diagonal": pairs, "rank_one": 2 * (pairs + strict)}.get(kind, pairs + strict)
    # under a gate per channel a token's own score is element-wise
    scored = {"diagonal": strict, "delta_diagonal": 2 * strict, "rank_one": 4 * strict}.get(kind, used)
    return 2 * (K * scored + V * used)


def _products(kind: str, C: int, K: int, V: int) -> int:
    """FLOPs of the products of one chunk that do not touch the state."""
    P = 1 << (C - 1).bit_length()  # blocks are doubled up to a power of two
    use = 2 * C * C * V
    scalar, diagonal = 2 * C * C * K + use, P * (P - 1) * K + use
    inverse = 2 * P * (P * P - 4) // 3 if P > 1 else 0  # two products per pair of blocks of 2, 4 ... P/2 rows
    return {
        "scalar": scalar,
        "diagonal": diagonal,
        "delta": 2 * scalar + inverse,
        "delta_diagonal": 2 * diagonal + inverse,
        "rank_one": 4 * diagonal + inverse,
    }[kind]

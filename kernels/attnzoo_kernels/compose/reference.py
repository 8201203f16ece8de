"""Attention with scores and weights mixed across heads, in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo_kernels.rows import by_rows
from attnzoo_kernels.span import Span


class Mix(NamedTuple):
    """How one vector a of H heads is mixed, for the pair of query t and key s.

        a'_h = a_h + sum_h' static[h',h] a_h' + sum_i w2_h,i (w1_i . a) + g_h a_h

    The last two terms once by the maps of the query and once by those of the key; what is None does nothing.

    Args:
        static: (H,H).
        query: (B, 2 I + 1, T, H), key: (B, 2 I + 1, S, H): rows w1 (I of them), w2 (I), g (1); I may be 0,
            and differ between the two.
    """

    static: Tensor | None = None
    query: Tensor | None = None
    key: Tensor | None = None


def working(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_of(maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """w1 (B,I,n,H), w2 (B,I,n,H) and g (B,n,H)."""
    rank = maps.shape[1] // 2
    return maps[:, :rank], maps[:, rank:-1], maps[:, -1]


def matrix(mix: Mix | None, H: int, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor | None:
    """All that does not depend on the key, as (B,t,H,H) or (1,1,H,H) with a' = matrix a; None = identity."""
    if mix is None or (mix.static is None and mix.query is None):
        return None
    given = mix.query if mix.static is None else mix.static
    square = torch.eye(H, dtype=dtype, device=given.device)[None, None]
    if mix.static is not None:
        square = square + mix.static.to(dtype).mT
    if mix.query is None:
        return square
    w1, w2, g = rows_of(mix.query[:, :, rows].to(dtype))
    return square + w2.permute(0, 2, 3, 1) @ w1.permute(0, 2, 1, 3) + torch.diag_embed(g)


def mix_heads(a: Tensor, square: Tensor | None, key: Tensor | None) -> Tensor:
    """``a (B,H,t,s)`` mixed by ``square (B,t,H,H)`` and the maps ``key (B, 2 I + 1, s, H)``."""
    out = a if square is None else (square @ a.transpose(1, 2)).transpose(1, 2)
    if key is None:
        return out
    w1, w2, g = rows_of(key)
    mixed = (a.permute(0, 3, 2, 1) @ w1.permute(0, 2, 3, 1)) @ w2.permute(0, 2, 1, 3)
    return torch.addcmul(out, a, g.mT[:, :, None]) + mixed.permute(0, 3, 2, 1)


def compose_reference(
    q: Tensor, k: Tensor, v: Tensor, span: Span, pre: Mix | None, post: Mix | None, scale: float
) -> Tensor:
    """As the public function; products in the operands' dtype, mixing and softmax in fp32 (fp64 for fp64).

    Scores of a chunk of query rows exist at once; from 2048 queries on, the backward makes them again.
    """
    (H, T), S, dtype = q.shape[1:3], k.shape[2], working(q.dtype)

    def run(rows: slice) -> tuple[Tensor]:
        cols = slice(0, S) if torch.compiler.is_compiling() else span.cols(S, rows)

        def mixed(a: Tensor, mix: Mix | None) -> Tensor:
            key = None if mix is None or mix.key is None else mix.key[:, :, cols].to(dtype)
            return mix_heads(a, matrix(mix, H, dtype, rows), key)

        hidden = ~span.visible(S, rows, cols)
        s = (q[:, :, rows] @ k[:, :, cols].mT).to(dtype) * scale
        # Hidden scores may be NaN, which the maps' gradients would multiply by 0.
        s = mixed(s.masked_fill(hidden, 0.0), pre).masked_fill(hidden, -torch.inf)
        p = mixed(s.softmax(-1).masked_fill(hidden, 0.0), post).masked_fill(hidden, 0.0)
        return (p.to(v.dtype) @ v[:, :, cols],)

    with torch.autocast(q.device.type, enabled=False):
        return by_rows(run, T, S)[0]

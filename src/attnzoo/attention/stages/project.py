"""Projections from the stream to queries, keys and values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.score import Early
from attnzoo.attention.site import Site
from attnzoo.attention.slots import Slot
from attnzoo.cost import Work
from attnzoo.ops.fused import split_linear
from attnzoo.parallel.tensor import Part, Share


class QKV(Early, Stage):
    """Queries, keys and values by one fused matrix ``[W_q | W_k | W_v]``, heads contiguous inside each.

    Args:
        num_heads, num_kv_heads: query heads H and key/value heads G; head h reads group ``h // (H / G)``.
        head_dim, v_head_dim: widths of q and k heads, and of v heads.
        stores: whether k and v rows are cached (a recurrent mixer keeps a state instead).

    Attributes:
        plain_queries: queries are x W_q and their tables are fixed, so that a layer with another layer's keys
            needs no more than that.
    """

    plain_queries = True

    def __init__(
        self,
        site: Site,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        v_head_dim: int,
        bias: bool = False,
        stores: bool = True,
        num_v_heads: int | None = None,
    ) -> None:
        super().__init__()
        self.heads = (num_heads, num_kv_heads, num_v_heads or num_kv_heads)
        self.widths = (head_dim, head_dim, v_head_dim)
        self.sizes = [h * d for h, d in zip(self.heads, self.widths, strict=True)]
        self.dim, self.stores = dim, stores
        self.qkv_proj = site.weights.linear("qkv", dim, sum(self.sizes), bias, parts=self.sizes)

    def qkv(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """x ``(B, T, D)`` -> q ``(B, H, T, d)``, k ``(B, G, T, d)``, v ``(B, G, T, d_v)``."""
        parts = split_linear(self.qkv_proj, x, self.sizes)
        return tuple(
            z.unflatten(-1, (h, d)).transpose(1, 2)
            for z, h, d in zip(parts, self.heads, self.widths, strict=True)
        )

    def split(self, share: Share) -> None:
        share.rows(self.qkv_proj, *zip(self.heads, self.widths, strict=True))
        self.heads = tuple(share.count(n) for n in self.heads)
        self.sizes = [n * d for n, d in zip(self.heads, self.widths, strict=True)]

    def memory(self) -> dict[str, Slot]:
        if not self.stores:
            return {}
        return {
            "k": Slot("rows", (self.heads[1], self.widths[1])),
            "v": Slot("rows", (self.heads[2], self.widths[2])),
        }

    def work(self, length: int) -> Iterable[Work]:
        yield Work("projections", "W_q", 2 * length * self.dim * self.sizes[0], per_head=True)
        yield Work("projections", "W_k, W_v", 2 * length * self.dim * sum(self.sizes[1:]))


class MappedQKV(QKV):
    """`QKV` whose query heads read key and value heads by tables, the buffers ``k_map`` and ``v_map``
    ``(H,)``.

    Args:
        k_map, v_map: the tables; default consecutive runs, ``floor(h G / H)``.
    """

    def __init__(
        self,
        *args: Any,
        k_map: Sequence[int] | None = None,
        v_map: Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        H, G_k, G_v = self.heads
        given = ((k_map, G_k), (v_map, G_v))
        self.tables = [consecutive(H, G) if table is None else list(table) for table, G in given]
        for name, table in zip(("k_map", "v_map"), self.tables, strict=True):
            self.register_buffer(name, torch.tensor(table))

        # where ranks share heads: this one's query heads, its first key head, its first value head
        self.mine: tuple[slice, int, int] | None = None

    def maps(self) -> tuple[Tensor, Tensor]:
        if self.mine is None:
            return self.k_map, self.v_map
        heads, first_k, first_v = self.mine
        return self.k_map[heads] - first_k, self.v_map[heads] - first_v

    def split(self, share: Share) -> None:
        """Key and value heads go with the query heads that read them; where ranks would have different ones,
        every rank has all."""
        tables = zip(self.tables, self.heads[1:], strict=True)
        cut = (True, *(_nests(share, table, G) for table, G in tables))
        shapes = zip(self.heads, self.widths, cut, strict=True)
        share.rows(self.qkv_proj, *((n, d) if own else (1, n * d) for n, d, own in shapes))
        parts = [share.part(n) if own else Part(0, n) for n, own in zip(self.heads, cut, strict=True)]
        self.mine = (parts[0].rows, *(part.first for part in parts[1:]))
        self.heads = tuple(part.count for part in parts)
        self.sizes = [n * d for n, d in zip(self.heads, self.widths, strict=True)]


def _nests(share: Share, table: Sequence[int], heads: int) -> bool:
    """Whether every rank's queries read no others than its part of ``heads``."""
    if heads % share.ranks and share.ranks % heads:
        return False
    every = [replace(share, rank=rank) for rank in range(share.ranks)]
    return all(set(table[s.part(len(table)).rows]) <= set(s.part(heads).each) for s in every)


def largest_divisor(count: int, limit: int) -> int:
    """Of ``count``, at most ``limit`` (and at least 1)."""
    return max(n for n in range(1, max(1, limit) + 1) if count % n == 0)


def consecutive(num_heads: int, groups: int) -> list[int]:
    """The group of each head where consecutive heads share: ``floor(h G / H)``."""
    return [h * groups // num_heads for h in range(num_heads)]

"""Projections from the stream to queries, keys and values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
        for name, table, G in (("k_map", k_map, G_k), ("v_map", v_map, G_v)):
            self.register_buffer(name, torch.tensor(consecutive(H, G) if table is None else list(table)))

    def maps(self) -> tuple[Tensor, Tensor]:
        return self.k_map, self.v_map


def largest_divisor(count: int, limit: int) -> int:
    """Of ``count``, at most ``limit`` (and at least 1)."""
    return max(n for n in range(1, max(1, limit) + 1) if count % n == 0)


def consecutive(num_heads: int, groups: int) -> list[int]:
    """The group of each head where consecutive heads share: ``floor(h G / H)``."""
    return [h * groups // num_heads for h in range(num_heads)]

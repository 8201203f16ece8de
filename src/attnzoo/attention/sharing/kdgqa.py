"""Key-driven GQA: key heads of larger norm serve more query heads.

Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention, arXiv 2408.08454.

    gqa with a_g query heads for key/value head g: the first a_0 read head 0, the next a_1 head 1 ..
    n_g = ||k_g||_F over the positions and channels of a sequence, its mean over the sequences of a step
    key (kdgqa):  n^ = (n - min n) / (max n - min n),  a = round(H n^ / sum n^);  while sum a > H the largest
                  a_g loses one, while sum a < H the smallest gains one
    diff (dgqa):  u = |c - n|;   ema (dgqa):  u = 0.9 n + 0.1 c;   a = round(H u / sum u)
                  with c from the refresh before

Causal form, ours (the paper is about images): n of the current batch would show later tokens and other
sequences to the map, so the map is a buffer that changes only between optimiser steps, every ``window_size``
of them, and stands still in eval mode and in the cache's life. It is saved with the weights.
Cached: k (after RoPE) and v, 2 G d per token. Our choice: no group gets fewer than ``min_per_group`` heads
(with none its keys get no gradient and stay smallest); sums that rounding leaves off are mended where it
rounded furthest (the released code draws groups at random); n is a mean over sequences, not a sum, which
changes no allocation and keeps c comparable when the batch size changes; c becomes n ("diff") or u ("ema").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft, set_heads
from attnzoo.attention.stages.project import MappedQKV, consecutive
from attnzoo.attention.timeline import Timeline
from attnzoo.cards import Claim
from attnzoo.registry import Card, register

Kind = Literal["key", "diff", "ema"]


class AllocatedKV(MappedQKV):
    """`MappedQKV` whose tables follow the norms of the keys; ``alloc`` ``(G,)``: query heads per group, ``c``
    ``(G,)``: the statistic of the last refresh.

    Args:
        draft: gives H, G and the widths. kind: rule. every: optimiser steps between refreshes. least: query
            heads that each group keeps.
    """

    plain_queries = False

    unsplit = "which heads read which keys changes in training, across ranks"

    def __init__(self, draft: Draft, kind: str, every: int, least: int) -> None:
        H, G = draft.num_heads, draft.num_kv_heads
        sizes = (H, G, draft.head_dim, draft.v_head_dim)
        super().__init__(draft.site, draft.dim, *sizes, draft.host["qkv_bias"])
        self.kind, self.every, self.least = kind, every, least
        self.register_buffer("alloc", torch.tensor(uniform(H, G)))
        self.register_buffer("c", torch.zeros(G))

    def qkv(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """As `QKV.qkv`; in training it reports the norms of the keys."""
        q, k, v = super().qkv(x, call)
        if self.training and call.collects:
            call.step("key_norms", key_norms(k.detach(), call.line))
            call.stat("kv_allocation", self.alloc.clone())
        return q, k, v

    def on_step(self, step: int, stats: Mapping[str, Tensor], generator: torch.Generator) -> None:
        n = stats.get("key_norms")
        if n is None or not self.training or step % self.every:
            return
        n, H = n.double().cpu(), self.heads[0]
        if not bool(n.isfinite().all()):
            return
        if self.kind == "key":
            alloc, kept = by_norm(n, H), n
        else:
            u = statistic(n, self.c.double().cpu(), self.kind)
            alloc, kept = by_share(u, H), u if self.kind == "ema" else n
        self.c.copy_(kept)
        self.allocate(at_least(alloc, self.least))

    def allocate(self, alloc: list[int]) -> None:
        """Sets how many query heads each group serves."""
        assert sum(alloc) == self.heads[0] and len(alloc) == self.heads[1]
        self.alloc.copy_(torch.tensor(alloc))
        groups = torch.arange(len(alloc)).repeat_interleave(torch.tensor(alloc))
        self.k_map.copy_(groups)
        self.v_map.copy_(groups)


def key_norms(k: Tensor, line: Timeline) -> Tensor:
    """``(G,)`` Frobenius norm of each head of ``k`` ``(B, G, T, d)``, padding left out, mean over rows."""
    wide = line.blank(k.transpose(1, 2)).to(torch.float64 if k.dtype == torch.float64 else torch.float32)
    return wide.square().sum((1, 3)).sqrt().mean(0)


def statistic(n: Tensor, c: Tensor, kind: str) -> Tensor:
    """What dgqa allocates by: how much the norms changed, or their moving average."""
    return (c - n).abs() if kind == "diff" else 0.9 * n + 0.1 * c


def uniform(H: int, G: int) -> list[int]:
    """Heads per group of plain gqa."""
    groups = consecutive(H, G)
    return [groups.count(g) for g in range(G)]


def by_norm(n: Tensor, H: int) -> list[int]:
    """kdgqa's allocation: shares of the norms between the smallest, which gets 0, and the largest."""
    spread = n - n.min()
    if not bool(spread.any()):
        return uniform(H, len(n))
    alloc = [round(H * share) for share in (spread / spread.sum()).tolist()]
    return _mended(alloc, H, lambda a, g: -a[g], lambda a, g: a[g])


def by_share(u: Tensor, H: int) -> list[int]:
    """dgqa's allocation: shares of ``u``."""
    if not bool(u.any()):
        return uniform(H, len(u))
    due = [H * share for share in (u / u.sum()).tolist()]
    # the group that rounding took most from gains, the one it gave most to loses
    lack = lambda a, g: a[g] - due[g]  # noqa: E731
    return _mended([round(x) for x in due], H, lambda a, g: -lack(a, g), lack)


def _mended(alloc: list[int], H: int, loses: Callable, gains: Callable) -> list[int]:
    """``alloc`` with sum H: the group of the smallest ``loses`` or ``gains`` gives or takes one at a time."""
    while sum(alloc) > H:
        alloc[min((g for g in range(len(alloc)) if alloc[g]), key=lambda g: loses(alloc, g))] -= 1
    while sum(alloc) < H:
        alloc[min(range(len(alloc)), key=lambda g: gains(alloc, g))] += 1
    return alloc


def at_least(alloc: list[int], least: int) -> list[int]:
    """``alloc`` with at least ``least`` heads per group, taken from the largest group one at a time."""
    alloc = list(alloc)
    for g in range(len(alloc)):
        while alloc[g] < least:
            alloc[alloc.index(max(alloc))] -= 1
            alloc[g] += 1
    return alloc


def _recipe(draft: Draft, kind: str, every: int, least: int) -> None:
    draft.check_unbuilt()
    H = draft.num_heads
    if draft.host["num_kv_heads"] is None:
        set_heads(draft, min(H, max(2, H // 4)), draft.host["head_dim"])
    if every < 1:
        raise ValueError(f"window_size: must be at least 1 optimiser step, got {every}")
    if least < 0:
        raise ValueError(f"min_per_group: must be at least 0, got {least}")

    def complete(done: Draft) -> None:
        H, G = done.num_heads, done.num_kv_heads
        if G < 2 <= H:
            raise ValueError(f"num_kv_heads: there is nothing to distribute below 2 groups, got {G}; use mqa")
        if least * G > H:
            raise ValueError(
                f"min_per_group: {G} groups must fit num_heads={H}, got {least}; lower it or num_kv_heads"
            )
        if done.shapes()["v"][0] != G:
            raise ValueError(
                f"num_v_heads: keys and values are allocated together, got {done.shapes()['v'][0]} value and "
                f"{G} key heads; leave {done.current} out"
            )
        done.put("project", AllocatedKV(done, kind, every, least))

    draft.last(complete)


_SHARED = {
    "paper": "Beyond Uniform Query Distribution: Key-Driven Grouped Query Attention",
    "arxiv": "2408.08454",
    "family": "sharing",
    "cached": "k, v: 2 G d per token",
    "adapted": "The paper shares query heads out by the key norms of the batch itself, later tokens and "
    "other sequences included; here by those of past optimiser steps, and not at all in evaluation.",
    "small": {"num_kv_heads": 3},
}


@register(
    Card(
        name="kdgqa",
        title="Key-distributed GQA",
        summary="Key heads of larger norm serve more query heads, by the norms of the step before.",
        claims=(Claim("mixed against gqa; no language result", where="ViT-L uptrained on small image sets"),),
        **_SHARED,
    ),
)
def kdgqa(draft: Draft, *, alloc_kind: Kind = "key", window_size: int = 1, min_per_group: int = 1) -> None:
    """Sets the projection; ``num_kv_heads`` G needs no ratio to H, default H / 4 and at least 2.

    Args:
        alloc_kind: rule, see the module. window_size: optimiser steps between refreshes, at least 1.
        min_per_group: query heads that each group keeps, 0 (the paper) .. H / G.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: gqa while the allocation is uniform, where training starts.
    """
    _recipe(draft, alloc_kind, window_size, min_per_group)


@register(
    Card(
        name="dgqa",
        title="Dynamic key-distributed GQA",
        summary="Key heads whose norm grew, or was large for a while, serve more query heads.",
        claims=(
            Claim(
                "up to +8 % accuracy over gqa; no language result",
                where="ViT-L uptrained on small image sets",
            ),
        ),
        **_SHARED,
    ),
)
def dgqa(draft: Draft, *, alloc_kind: Kind = "ema", window_size: int = 300, min_per_group: int = 1) -> None:
    """Sets the projection; see `kdgqa`, which differs in the defaults.

    Args:
        alloc_kind: rule, see the module. window_size: optimiser steps between refreshes, at least 1.
        min_per_group: query heads that each group keeps, 0 (the paper) .. H / G.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: gqa while the allocation is uniform, where training starts.
    """
    _recipe(draft, alloc_kind, window_size, min_per_group)

"""Head sharing: a head uses the projection blocks of a similar head of another layer, not its activations.

Head-wise Shareable Attention for Large Language Models, arXiv 2402.11819.

    (W_q, W_k, W_v, W_o) of head (l, h)  =  those of root(l, h)
    root(l, h) = (l, h) where the table has no entry for it, else root(table(l, h))
    then multi-head (or grouped) attention as in the host

Cached: as the host; only parameters are shared. The released code replaces a head by the original blocks of
its source, also where the source itself is replaced; here chains end at a root, which the optimiser sees
once. Our choice: a table of pairs for training from scratch (head h of layer 2m + 1 uses head h of layer 2m,
for a fraction of the heads, lowest first, in whole key groups); a bias stays the layer's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from attnzoo.attention.crosslayer.provider import Bank, provide
from attnzoo.attention.draft import Draft
from attnzoo.cards import Claim
from attnzoo.registry import Card, register

Head = tuple[int, int]  # (layer, head)


def pairs(depth: int, heads: int, count: int) -> list[tuple[Head, Head]]:
    """The first ``count`` heads of every odd layer use those of the layer before it."""
    return [((layer, h), (layer - 1, h)) for layer in range(1, depth, 2) for h in range(min(count, heads))]


def resolve(table: Sequence[Any], depth: int, heads: int) -> dict[Head, Head]:
    """The root of every head.

    Args:
        table: ``((layer, head), (source layer, source head))`` entries.

    Raises:
        ValueError: an entry is malformed, repeated or out of range, reads a later layer, or closes a cycle.
    """
    source: dict[Head, Head] = {}
    for entry in table:
        try:
            target, origin = (tuple(int(i) for i in head) for head in entry)
            fits = all(0 <= layer < depth and 0 <= h < heads for layer, h in (target, origin))
        except (TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError(
                f"share_table: an entry is ((layer, head), (layer, head)) with layers below {depth} and "
                f"heads below {heads}, got {entry!r}"
            )
        if target in source:
            raise ValueError(f"share_table: {target} has sources {source[target]} and {origin}; keep one")
        if origin[0] > target[0]:
            raise ValueError(f"share_table: {target} reads {origin} of a later layer; turn the entry round")
        source[target] = origin
    roots = {}
    for head in ((layer, h) for layer in range(depth) for h in range(heads)):
        root, seen = head, {head}
        while source.get(root, root) != root:
            root = source[root]
            if root in seen:
                raise ValueError(f"share_table: {sorted(seen)} share in a cycle; leave one of them its own")
            seen.add(root)
        roots[head] = root
    return roots


def group_roots(roots: dict[Head, Head], size: int) -> dict[Head, Head]:
    """The root of every group of ``size`` consecutive heads, which share one key head.

    Raises:
        ValueError: the heads of a group have roots in several groups.
    """
    grouped: dict[Head, set[Head]] = {}
    for (layer, h), (root_layer, root) in roots.items():
        grouped.setdefault((layer, h // size), set()).add((root_layer, root // size))
    for (layer, group), found in grouped.items():
        if len(found) > 1:
            raise ValueError(
                f"share_table: layer {layer} shares only a part of key group {group} ({size} heads), or from "
                f"several groups {sorted(found)}; share whole groups, or leave k and v out of share_parts"
            )
    return {target: found.pop() for target, found in grouped.items()}


class Blocks(nn.Module):
    """The blocks ``(n, width, D)`` of a layer's own heads, of one of q, k, v, o."""

    def __init__(self, count: int, width: int, dim: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, width, dim) * std)


class Assembled(nn.Module):
    """A layer's matrix from blocks of several layers.

    Args:
        banks: the layers' blocks. rows: which block each head takes, counted through the banks.
        outward: the blocks map heads to the stream (W_o).
    """

    def __init__(self, banks: Sequence[Blocks], rows: Sequence[int], outward: bool) -> None:
        super().__init__()
        self.banks, self.rows, self.outward = nn.ModuleList(banks), list(rows), outward

    def forward(self) -> Tensor:
        weight = torch.cat([bank.weight for bank in self.banks])[self.rows].flatten(0, 1)
        return weight.T if self.outward else weight


class HeadBank:
    """Makes the matrices of one layer.

    Args:
        draft: its head counts are read when the first matrix is made. table: as `resolve` takes it; None = by
            pairs. rate: share of the heads that pairs share. parts: which of q, k, v, o are shared.
    """

    def __init__(self, draft: Draft, table: Sequence[Any] | None, rate: float, parts: str) -> None:
        self.draft, self.table, self.rate, self.parts = draft, table, rate, parts

    def heads(self, matrix: str) -> int:
        """How many blocks a matrix has."""
        return self.draft.o_heads if matrix == "o" else self.draft.shapes()[matrix][0]

    @cached_property
    def roots(self) -> dict[str, dict[Head, Head]]:
        """The root of every block, by matrix."""
        H, depth = self.draft.num_heads, self.draft.site.depth
        counts = {matrix: self.heads(matrix) for matrix in self.parts}
        for matrix, count in counts.items():
            if H % count:
                raise ValueError(
                    f"share_parts: {matrix!r} has {count} heads, which {H} query heads do not share evenly; "
                    "leave it out"
                )
        table, fewest = self.table, min(counts.values())
        if table is None:
            groups = int(self.rate * fewest + 0.5)
            table = pairs(depth, H, groups * (H // fewest))
        roots = resolve(table, depth, H)
        return {matrix: group_roots(roots, H // count) for matrix, count in counts.items()}

    def __call__(self, matrix: str, d_in: int, d_out: int, std: float) -> Assembled:
        site, outward, roots = self.draft.site, matrix == "o", self.roots[matrix]
        count, dim, size = self.heads(matrix), *((d_out, d_in) if outward else (d_in, d_out))
        wanted = [roots[site.layer, h] for h in range(count)]
        own = {layer: [h for h in range(count) if roots[layer, h] == (layer, h)] for layer, _ in wanted}
        banks = {}
        for layer, heads in sorted(own.items()):
            shape = (len(heads), size // count, dim)
            banks[layer] = site.shared(f"headshare.{matrix}.{layer}", partial(Blocks, *shape, std))
            if banks[layer].weight.shape != shape:
                raise ValueError(
                    f"layout: layer {site.layer} shares blocks {shape} of {matrix!r} with layer {layer}, "
                    f"which has {tuple(banks[layer].weight.shape)}; make their shapes and tables equal"
                )
        order = [(layer, h) for layer in banks for h in own[layer]]
        return Assembled(list(banks.values()), [order.index(head) for head in wanted], outward)


@register(
    Card(
        name="headshare",
        title="Head-wise shareable attention",
        paper="Head-wise Shareable Attention for Large Language Models",
        arxiv="2402.11819",
        family="crosslayer",
        summary="Heads of different layers share their projection blocks, by a table.",
        cached="as the host",
        claims=(Claim("most reasoning ability is kept", where="30 % of LLaMA2-7B's heads shared"),),
        small={"share_rate": 0.5},
        layers=3,
    ),
    frames=("score", "recurrent"),
)
def headshare(
    draft: Draft,
    *,
    share_rate: float = 0.3,
    pattern: Literal["pairs"] = "pairs",
    share_table: tuple[Any, ...] | None = None,
    share_parts: str = "qkvo",
) -> None:
    """Makes the projections' weights from blocks per head.

    Args:
        share_rate: share of a layer's heads that the pattern shares, in [0, 1], rounded to whole key groups.
        pattern: the table where none is given; see the module.
        share_table: ``((layer, head), (source layer, source head))`` entries; sources lie in the same or an
            earlier layer.
        share_parts: some of the letters q, k, v, o.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: its host (mha) with an empty table.
    """
    if not 0 <= share_rate <= 1:
        raise ValueError(f"share_rate: must be in [0, 1], got {share_rate}")
    if not share_parts or set(share_parts) - set("qkvo") or len(set(share_parts)) < len(share_parts):
        raise ValueError(f"share_parts: must be some of q, k, v, o, each once, got {share_parts!r}")
    provide(draft, Bank(HeadBank(draft, share_table, share_rate, share_parts), share_parts))

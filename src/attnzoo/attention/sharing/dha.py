"""Decoupled heads: key heads and value heads are shared by different, arbitrary groups of query heads.

DHA: Learning Decoupled-Head Attention from Transformer Checkpoints via Adaptive Heads Fusion,
arXiv 2406.06567.

    o_h = attend(q_h, k_kappa(h), v_nu(h)),  G_k and G_v heads and tables kappa, nu per layer;  RoPE as usual
    fusion=true, inside a group of m key (or value) heads:  W~_i = sum_j w_ij W_j,  w (m x m) = I at the start
    L_f = 1/m^2 sum_(i,i') mean((W~_i - W~_i')^2),  mean over the layer's groups of both kinds
    loss + l1 (L_f - t) + l2 (L_f - t)^2,   t = L_f,0 (1 - n / N) after n steps
    l1 <- l1 + eta (L_f - t),  l2 <- l2 + eta (L_f - t)^2                                  once per step

A mixer with fusion=true has all H key and value heads of an mha checkpoint; once L_f is near 0, `collapse`
replaces each group by the mean of its W~_i: the state of the plain dha.
Cached: k (after RoPE) and v, (G_k + G_v) d per token; 2 H d while fusing. Our choice: consecutive tables and
a quarter of the heads by default; biases are fused like a further input; l1 = l2 = 0 at the start; L_f,0 is
the loss of the first optimiser step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention.base import Mixer
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.site import flag
from attnzoo.attention.stages.project import QKV, MappedQKV, consecutive
from attnzoo.cards import Claim
from attnzoo.registry import Card, register

Table = tuple[int, ...]


class FusedKV(QKV):
    """`QKV` of H key and value heads whose weights mix inside the groups that tables name.

    Args:
        tables: group of each key head, and of each value head. steps: N, until t is 0; rate: eta.
    """

    unsplit = "it mixes the weights of key heads by tables, across ranks"

    def __init__(self, draft: Draft, tables: tuple[Table, Table], steps: int, rate: float) -> None:
        H = draft.num_heads
        super().__init__(
            draft.site, draft.dim, H, H, draft.head_dim, draft.v_head_dim, draft.host["qkv_bias"]
        )
        self.tables, self.steps, self.rate = tables, steps, rate
        self.inputs = draft.dim + (self.qkv_proj.bias is not None)
        self.groups = [[table.count(g) for g in range(max(table) + 1)] for table in tables]
        for side, table, groups in zip("kv", tables, self.groups, strict=True):
            start = torch.cat([torch.eye(m).flatten() for m in groups])
            self.register_parameter(f"omega_{side}", flag(nn.Parameter(start), decay=False, reinit=False))
            # heads by group, and where each head stands among them
            order = torch.tensor(table).argsort(stable=True)
            self.register_buffer(f"order_{side}", order, persistent=False)
            self.register_buffer(f"place_{side}", order.argsort(), persistent=False)
        for name in ("l1", "l2", "first_loss"):
            self.register_buffer(name, torch.zeros(()))
        self.register_buffer("fused_steps", torch.zeros((), dtype=torch.long))

    @property
    def target(self) -> Tensor:
        """t."""
        return self.first_loss * (1 - self.fused_steps / self.steps).clamp(min=0)

    def qkv(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """As `QKV.qkv`; reports the fusion loss."""
        fused = {side: self._fused(side) for side in "kv"}
        if call.collects:
            loss = fusion_loss(fused["k"] + fused["v"])
            gap = loss - self.target
            call.aux("dha/fusion", self.l1 * gap + self.l2 * gap.square(), 1.0)
            call.step("dha/fusion", loss)
            call.stat("dha/fusion_loss", loss)
        parts = [self._own_queries()]
        for side in "kv":
            rows = torch.cat(fused[side]).index_select(0, getattr(self, f"place_{side}"))
            parts.append(self._whole(rows))
        heads = (F.linear(x, *part).unflatten(-1, (self.heads[0], -1)).transpose(1, 2) for part in parts)
        return tuple(heads)

    def _own_queries(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the queries."""
        n, bias = self.sizes[0], self.qkv_proj.bias
        return self.qkv_proj.weight[:n], None if bias is None else bias[:n]

    def _fused(self, side: str) -> list[Tensor]:
        """W~ of each group, ``(m, d * inputs)``; a bias counts as a further input."""
        i = "qkv".index(side)
        rows = slice(sum(self.sizes[:i]), sum(self.sizes[: i + 1]))
        blocks = self.qkv_proj.weight[rows]
        if self.qkv_proj.bias is not None:
            blocks = torch.cat([blocks, self.qkv_proj.bias[rows, None]], dim=1)
        blocks = blocks.unflatten(0, (self.heads[i], -1)).flatten(1)
        blocks = blocks.index_select(0, getattr(self, f"order_{side}"))
        groups = self.groups["kv".index(side)]
        omega = getattr(self, f"omega_{side}").split([m * m for m in groups])
        return [w.view(m, m) @ z for m, w, z in zip(groups, omega, blocks.split(groups), strict=True)]

    def _whole(self, blocks: Tensor) -> tuple[Tensor, Tensor | None]:
        """Heads ``(n, d * inputs)`` as weight ``(n d, D)`` and bias."""
        rows = blocks.reshape(-1, self.inputs)
        return rows[:, : self.dim], rows[:, self.dim] if self.inputs > self.dim else None

    def on_step(self, step: int, stats: Mapping[str, Tensor], generator: torch.Generator) -> None:
        loss = stats.get("dha/fusion")
        if loss is None or not self.training:
            return
        loss = loss.to(self.first_loss)
        if self.fused_steps == 0:
            self.first_loss.copy_(loss)
        gap = loss - self.target
        self.l1 += self.rate * gap
        self.l2 += self.rate * gap.square()
        self.fused_steps += 1

    @torch.no_grad()
    def collapse(self) -> dict[str, Tensor]:
        """The state of the `MappedQKV` that has one head per group, the mean of the group's."""
        means = [torch.stack([z.mean(0) for z in self._fused(side)]) for side in "kv"]
        weights, biases = zip(self._own_queries(), *map(self._whole, means), strict=True)
        state = {"qkv_proj.weight": torch.cat(weights)}
        if self.qkv_proj.bias is not None:
            state["qkv_proj.bias"] = torch.cat(biases)
        for name, table in zip(("k_map", "v_map"), self.tables, strict=True):
            state[name] = torch.tensor(table, device=self.order_k.device)
        return state

    def weight_flops(self) -> int:
        """Of the mixing of weights, per forward."""
        squares = (sum(m * m for m in groups) for groups in self.groups)
        return sum(2 * n * d * self.inputs for n, d in zip(squares, self.widths[1:], strict=True))


def fusion_loss(groups: list[Tensor]) -> Tensor:
    """L_f; inside a group, the mean over pairs of squared differences is twice the variance."""
    return torch.stack([2 * (z - z.mean(0)).square().mean() for z in groups]).mean()


def collapse(mixer: Mixer) -> dict[str, Tensor]:
    """The state dict of ``create("dha", ...)`` with the same tables and without fusion."""
    rest = {name: t for name, t in mixer.state_dict().items() if not name.startswith("project.")}
    return {f"project.{name}": t for name, t in mixer.project.collapse().items()} | rest


@register(
    Card(
        name="dha",
        title="Decoupled-head attention",
        paper="DHA: Learning Decoupled-Head Attention from Transformer Checkpoints via Adaptive Heads Fusion",
        arxiv="2406.06567",
        family="sharing",
        summary="Key heads and value heads are shared by different groups of query heads, by tables.",
        cached="k, v: (G_k + G_v) d per token",
        claims=(
            Claim(
                "25 % of the heads keep 97.6 % of the quality", where="after 0.25 % of the pretraining tokens"
            ),
            Claim("75 % less cache", "cache_bytes", "lower", "mha", "25 % of the heads"),
        ),
        small={"num_key_heads": 3, "num_value_heads": 2, "key_map": (2, 0, 1, 0), "value_map": (1, 0, 0, 1)},
    ),
    fixed={"num_kv_heads": "keys and values have counts of their own, num_key_heads and num_value_heads"},
)
def dha(
    draft: Draft,
    *,
    num_key_heads: int | Table | None = None,
    num_value_heads: int | Table | None = None,
    key_map: Table | tuple[Table, ...] | None = None,
    value_map: Table | tuple[Table, ...] | None = None,
    fusion: bool = False,
    fusion_steps: int = 1000,
    fusion_rate: float = 1000.0,
) -> None:
    """Sets the projection.

    Args:
        num_key_heads, num_value_heads: G_k, G_v in 1..H, or one count for each layer; default H / 4, or what
            the table has.
        key_map, value_map: the head that each query head reads, or one table for each layer; default
            consecutive runs.
        fusion: trains all H heads of each kind towards one per group.
        fusion_steps: N, optimiser steps until the target is 0. fusion_rate: eta of the multipliers.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: gqa with consecutive tables and G_k = G_v, mha where both are H; mha in fusion at w = I; in
        fusion with zero loss, the dha that `collapse` gives.
    """
    draft.check_unbuilt()
    H = draft.num_heads
    tables = (
        _table(draft, "key", num_key_heads, key_map),
        _table(draft, "value", num_value_heads, value_map),
    )
    if fusion_steps < 1:
        raise ValueError(f"fusion_steps: must be at least 1, got {fusion_steps}")
    if fusion_rate < 0:
        raise ValueError(f"fusion_rate: must be at least 0, got {fusion_rate}")
    G_k, G_v = (H, H) if fusion else (max(table) + 1 for table in tables)
    draft.num_kv_heads, draft.num_v_heads = G_k, G_v

    def complete(done: Draft) -> None:
        if (done.num_heads, done.num_kv_heads, done.num_v_heads) != (H, G_k, G_v):
            raise ValueError(
                f"num_kv_heads: the tables are for {H} query heads, {G_k} key and {G_v} value heads, got "
                f"{done.num_heads} and {done.num_kv_heads} by add; leave one out"
            )
        if fusion:
            done.put("project", FusedKV(done, tables, fusion_steps, fusion_rate))
            return
        sizes = (done.dim, H, G_k, done.head_dim, done.v_head_dim, done.host["qkv_bias"])
        maps = dict(zip(("k_map", "v_map"), tables, strict=True))
        done.put("project", MappedQKV(done.site, *sizes, num_v_heads=G_v, **maps))

    draft.last(complete)


def _table(draft: Draft, side: str, count: int | Table | None, given: tuple | None) -> Table:
    """The checked table of this layer."""
    H, field, counts = draft.num_heads, f"{side}_map", f"num_{side}_heads"
    given = _of_layer(draft, field, given, bool(given) and isinstance(given[0], tuple))
    count = _of_layer(draft, counts, count, isinstance(count, tuple))
    if count is None:
        count = max(1, H // 4) if given is None else max(given, default=0) + 1
    if not 1 <= count <= H:
        raise ValueError(f"{counts}: must be in 1..num_heads={H}, got {count}")
    table = tuple(consecutive(H, count)) if given is None else given
    if len(table) != H:
        raise ValueError(f"{field}: needs one head for each of num_heads={H}, got {len(table)}")
    if set(table) != set(range(count)):
        raise ValueError(
            f"{field}: must use each of the {counts}={count} heads and no other, got {list(table)}"
        )
    return table


def _of_layer(draft: Draft, field: str, value: int | tuple | None, listed: bool) -> int | Table | None:
    site = draft.site
    if not listed:
        return value
    if len(value) != site.depth:
        raise ValueError(
            f"{field}: a list needs an entry for each of num_layers={site.depth}, got {len(value)}"
        )
    return value[site.layer]

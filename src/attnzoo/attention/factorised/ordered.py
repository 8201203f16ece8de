"""Ordered factors of the scores, and ranks that change between optimiser steps only; see `dynamic_rank`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.score import Late
from attnzoo.attention.slots import Slot
from attnzoo.cost import Work


class OrderedFactors(Late, Stage):
    """Late projection whose content channels can be cut, beside a rotary slice that cannot.

    Args:
        heads: H and G; widths: d, d_r, d_v; top: channels of q and k that are ever read.
    """

    unsplit = "one rank for all heads comes from the weights of all"

    def __init__(self, draft: Draft, heads: tuple[int, int], widths: tuple[int, int, int], top: int) -> None:
        super().__init__()
        (H, G), (d, d_r, d_v), bias = heads, widths, draft.host["qkv_bias"]
        self.dim, self.heads, self.widths, self.top = draft.dim, heads, widths, top
        self.turned = ("k_rope",) if d_r else ()
        self.a_proj = draft.linear("q", draft.dim, H * d, bias)
        self.b_proj = draft.linear("k", draft.dim, G * d, bias)
        self.v_proj = draft.linear("v", draft.dim, G * d_v, bias)
        self.rope_proj = draft.linear("rope", draft.dim, (H + 1) * d_r) if d_r else None

    def rows(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """q ``(B, H, T, top)``, its rotary part ``(B, H, T, d_r)``, and the rows to cache."""
        (H, G), (d, d_r, d_v) = self.heads, self.widths
        q = self.a_proj(x).unflatten(-1, (H, d)).transpose(1, 2)[..., : self.top]
        k = self.b_proj(x).unflatten(-1, (G, d)).transpose(1, 2)[..., : self.top]
        rows = {"k": k, "v": self.v_proj(x).unflatten(-1, (G, d_v)).transpose(1, 2)}
        if not d_r:
            return q, None, rows
        turned = self.rope_proj(x).unflatten(-1, (H + 1, d_r)).transpose(1, 2)
        return q, turned[:, :H], rows | {"k_rope": turned[:, H:]}

    def keys(self, rows: dict[str, Tensor], call: Call) -> tuple[Tensor, Tensor]:
        return rows["k"], rows["v"]

    def join(self, q: Tensor, q_rot: Tensor, k: Tensor, rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries and keys with their rotary slices appended."""
        turned = rows["k_rope"].expand(-1, k.shape[1], -1, -1)
        return torch.cat([q, q_rot], dim=-1), torch.cat([k, turned], dim=-1)

    def memory(self) -> dict[str, Slot]:
        G, (_, d_r, d_v) = self.heads[1], self.widths
        rows = {"k": Slot("rows", (G, self.top)), "v": Slot("rows", (G, d_v))}
        return rows | ({"k_rope": Slot("rows", (1, d_r))} if d_r else {})

    def work(self, length: int) -> Iterable[Work]:
        (H, G), (d, d_r, d_v), per = self.heads, self.widths, 2 * length * self.dim
        yield Work("projections", "A", per * H * d, per_head=True)
        yield Work("projections", "B, W_v", per * G * (d + d_v))
        if d_r:
            yield Work("projections", "rotary slice", per * (H + 1) * d_r)

    @torch.no_grad()
    def order(self) -> Tensor:
        """Puts the channels in the order of the singular values of A_g B_g^T; returns those, ``(G, d)``.

        No score over all channels changes: A and B get the left and the right singular vectors, each with
        the root of the values.
        """
        (H, G), d = self.heads, self.widths[0]
        a = self.a_proj.weight.double().view(G, H // G, d, self.dim).transpose(2, 3).flatten(1, 2)
        b = self.b_proj.weight.double().view(G, d, self.dim).mT
        if self.a_proj.bias is not None:  # one more row of the matrices, times an input of 1
            a = torch.cat([a, self.a_proj.bias.double().view(G, H // G, d)], dim=1)
            b = torch.cat([b, self.b_proj.bias.double().view(G, 1, d)], dim=1)
        (q_a, r_a), (q_b, r_b) = torch.linalg.qr(a), torch.linalg.qr(b)
        left, sigma, right = torch.linalg.svd(r_a @ r_b.mT, full_matrices=False)
        root = sigma.sqrt()[:, None]
        new_a, new_b = torch.zeros_like(a), torch.zeros_like(b)
        n = sigma.shape[1]  # below d where d exceeds D
        new_a[..., :n], new_b[..., :n] = q_a @ left * root, q_b @ right.mT * root
        rows = H // G * self.dim
        weight = new_a[:, :rows].unflatten(1, (H // G, self.dim)).transpose(2, 3).reshape(H * d, self.dim)
        self.a_proj.weight.copy_(weight)
        self.b_proj.weight.copy_(new_b[:, : self.dim].mT.reshape(G * d, self.dim))
        if self.a_proj.bias is not None:
            self.a_proj.bias.copy_(new_a[:, rows:].reshape(-1))
            self.b_proj.bias.copy_(new_b[:, self.dim :].reshape(-1))
        values = sigma.new_zeros(G, d)
        values[:, :n] = sigma
        return values


class SharedRank(Stage):
    """Cuts queries and keys to one rank, which changes between optimiser steps only.

    Args:
        project: whose factors it orders; policy: "fixed", "nested" or "energy"; ranks: ascending.
        tau, refresh: of the energy policy.
    """

    rank = 60

    unsplit = "one rank for all heads comes from the weights of all"

    def __init__(
        self, project: OrderedFactors, policy: str, ranks: tuple[int, ...], tau: float, refresh: int
    ) -> None:
        super().__init__()
        self.owner, self.policy, self.ranks = (project,), policy, ranks
        self.tau, self.refresh, self.chosen = tau, refresh, ranks[-1]
        # saved, and read back into a plain number, which needs no copy from the device in every forward
        self.register_buffer("kept_rank", torch.tensor(ranks[-1]))
        self.register_load_state_dict_post_hook(SharedRank._read_back)

    def _read_back(self, keys: object) -> None:
        if not self.kept_rank.is_meta:
            self.chosen = int(self.kept_rank)

    def now(self) -> int:
        """The rank of a forward in the module's present mode."""
        return self.ranks[-1] if self.policy == "nested" and not self.training else self.chosen

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        r = self.now()
        return (q, k, v) if r == q.shape[-1] else (q[..., :r], k[..., :r], v)

    def dropped(self) -> int:
        """Channels of q and k that scores do not see."""
        return self.ranks[-1] - self.now()

    def on_step(self, step: int, stats: Mapping[str, Tensor], generator: torch.Generator) -> None:
        if self.policy == "nested":
            self.chosen = self.ranks[int(torch.randint(len(self.ranks), (1,), generator=generator))]
        elif self.policy == "energy" and (step == 1 or step % self.refresh == 0):
            self.chosen = energy_rank(self.owner[0].order(), self.ranks, self.tau)
        self.kept_rank.fill_(self.chosen)


def energy_rank(sigma: Tensor, ranks: tuple[int, ...], tau: float) -> int:
    """The smallest of ``ranks`` that keeps the share ``tau`` of the energy of every row, else the largest."""
    energy = sigma.square()
    kept = energy.cumsum(1) / energy.sum(1, keepdim=True).clamp(min=1e-300)
    return next((r for r in ranks if bool((kept[:, r - 1] >= tau).all())), ranks[-1])


def default_ranks(width: int) -> tuple[int, ...]:
    """A quarter of ``width`` to all of it in steps of an eighth: 16, 24, ..., 64 of 64."""
    return tuple(sorted({max(1, width * i // 8) for i in range(2, 9)}))


def check_ranks(ranks: tuple[int, ...], width: int) -> None:
    if not ranks or list(ranks) != sorted(set(ranks)) or ranks[0] < 1 or ranks[-1] > width:
        raise ValueError(
            f"ranks: must be ascending numbers in 1..head_dim={width}, at least one, got {list(ranks)}"
        )

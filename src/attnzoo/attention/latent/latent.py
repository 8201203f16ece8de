"""The projection that latent attentions share: queries, a cached latent, a cached rotary key, up-maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.score import Late
from attnzoo.attention.site import flag
from attnzoo.attention.slots import Slot
from attnzoo.cost import Work
from attnzoo.ops.attention import Keys
from attnzoo.ops.fused import rms_norm
from attnzoo.parallel.tensor import Share

# what the frame offers and a latent cannot take -> reason
FIXED = {
    "num_kv_heads": "all heads share one latent; set kv_lora_rank for a smaller cache",
    "head_dim": "widths are set by qk_nope_head_dim, qk_rope_head_dim and v_head_dim",
}


class Latent(Late, Stage):
    """Late projection from rows ``latent`` (parts, d_c / parts) and ``k_rope`` (rotary heads, d_r).

    A part of the latent serves consecutive heads; how it does is `keys` where k and v are materialised and
    `per_head` where the up-maps are absorbed. The frame's ``qkv_bias`` is that of the maps from x; the
    up-maps have none, so that they can be absorbed.

    Args:
        widths: d_n, d_r, d_v; rank: d_c; q_rank: r_q, 0 = queries straight from x; norm: RMSNorm on the
            latents.
        parts: latent heads. kv_heads: heads that k and v are made for (default: one per query head).
        rope_heads: rotary keys; 1 = one that all heads share.
    """

    def __init__(
        self,
        draft: Draft,
        widths: tuple[int, int, int],
        rank: int,
        q_rank: int,
        norm: bool,
        eps: float,
        *,
        parts: int = 1,
        kv_heads: int | None = None,
        rope_heads: int = 1,
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.widths, self.eps = draft.dim, draft.num_heads, widths, eps
        self.rank, self.q_rank, self.parts, self.rope_heads = rank, q_rank, parts, rope_heads
        self.kv_heads = kv_heads or self.heads
        d_n, d_r, _ = widths
        self.turned = ("k_rope",) if d_r else ()
        q_in, bias = q_rank or draft.dim, draft.host["qkv_bias"]
        if q_rank:
            self.q_down = draft.linear("q_down", draft.dim, q_rank, bias)
            self.q_gain = flag(nn.Parameter(torch.ones(q_rank)), decay=False) if norm else None
        self.q_up = draft.linear("q_up", q_in, self.heads * (d_n + d_r), bias and not q_rank)
        self.kv_down = draft.linear("kv_down", draft.dim, rank + rope_heads * d_r, bias)
        self.kv_gain = flag(nn.Parameter(torch.ones(rank)), decay=False) if norm else None
        self.kv_up = self.make_up(draft)

    @property
    def width(self) -> int:
        """Of one part of the latent."""
        return self.rank // self.parts

    def make_up(self, draft: Draft) -> nn.Module:
        """W_ukv: each head's rows read the part that serves it."""
        return draft.linear("kv_up", self.width, self.kv_heads * (self.widths[0] + self.widths[2]))

    def rows(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """q ``(B, H, T, d_n)``, its rotary part ``(B, H, T, d_r)``, and the rows to cache."""
        d_n, d_r, _ = self.widths
        c_q = self.normed(self.q_down(x), "q") if self.q_rank else x
        q, q_rot = (
            self.q_up(c_q).unflatten(-1, (self.heads, d_n + d_r)).transpose(1, 2).split([d_n, d_r], dim=-1)
        )
        c, k_rot = self.kv_down(x).split([self.rank, self.rope_heads * d_r], dim=-1)
        rows = {"latent": self.latents(c, call)}
        if self.turned:
            rows["k_rope"] = k_rot.unflatten(-1, (self.rope_heads, d_r)).transpose(1, 2)
        return q, q_rot, rows

    def normed(self, z: Tensor, side: str) -> Tensor:
        gain = getattr(self, f"{side}_gain")
        return z if gain is None else rms_norm(z, gain, self.eps)

    def latents(self, c: Tensor, call: Call) -> Tensor:
        """What is cached of the projected latents ``(B, T, d_c)``: ``(B, parts, T, d_c / parts)``."""
        return self.normed(c, "kv").unflatten(-1, (self.parts, self.width)).transpose(1, 2)

    def keys(self, rows: dict[str, Tensor], call: Call) -> tuple[Tensor, Tensor]:
        """Materialised content keys ``(B, G, S, d_n)`` and values ``(B, G, S, d_v)``."""
        d_n, _, d_v = self.widths
        if self.parts == 1:
            both = self.kv_up(rows["latent"][:, 0]).unflatten(-1, (-1, d_n + d_v)).transpose(1, 2)
        else:
            up = self.per_head().unflatten(0, (self.parts, -1)).flatten(1, 2)  # (parts, heads * n, width)
            both = torch.einsum("bpsc,pnc->bpsn", rows["latent"], up)
            both = both.unflatten(-1, (-1, d_n + d_v)).transpose(2, 3).flatten(1, 2)
        return both.split([d_n, d_v], dim=-1)

    def per_head(self) -> Tensor:
        """W_ukv as ``(G, d_n + d_v, d_c / parts)``, the heads of a part side by side."""
        return self.kv_up.weight.unflatten(0, (self.kv_heads, -1))

    def spread(self, q: Tensor, q_rot: Tensor) -> tuple[Tensor, Tensor]:
        """The queries of every head that has scores."""
        return q, q_rot

    def join(self, q: Tensor, q_rot: Tensor, k: Tensor, rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries and keys with their rotary slices appended."""
        k_rot = rows["k_rope"].expand(-1, k.shape[1], -1, -1)
        return torch.cat(self.spread(q, q_rot), dim=-1), torch.cat([k, k_rot], dim=-1)

    def absorbs(self, new: int, keys: int) -> bool:
        d_n, d_r, d_v = self.widths
        if new == keys:
            return False
        scored, pairs = max(self.heads, self.kv_heads), new * keys
        up = self.width * (d_n + d_v)
        materialised = keys * self.kv_heads * up + pairs * scored * (d_n + d_r + d_v)
        return new * scored * up + pairs * scored * (2 * self.width + d_r) < materialised

    def absorbed(self, q: Tensor, q_rot: Tensor, rows: dict[str, Tensor], turn: Callable):
        """The queries in latent space, one key head per part whose value is the latent itself, and the way
        back.
        """
        d_n, _, d_v = self.widths
        q, q_rot = self.spread(q, q_rot)
        up = self.per_head()
        if up.shape[0] < q.shape[1]:
            up = up.repeat_interleave(q.shape[1] // up.shape[0], dim=0)
        up_k, up_v = up.split([d_n, d_v], dim=1)
        c = rows["latent"]
        q = q @ up_k.to(q.dtype)
        if self.widths[1]:
            q = torch.cat([q, q_rot], dim=-1)
        keys = Keys(c, c, rest=rows["k_rope"] if self.widths[1] else None)
        return q, keys, lambda z: torch.einsum("bthc,hvc->bthv", z, up_v.to(z.dtype))

    def split(self, share: Share) -> None:
        """Heads with their up-maps; a latent goes with those it serves, one for all to every rank."""
        d_n, d_r, d_v = self.widths
        if self.q_rank:
            share.keep(self.q_down)
        share.rows(self.q_up, (self.heads, d_n + d_r))
        share.rows(self.kv_down, (self.parts, self.width), (self.rope_heads, d_r))
        share.rows(self.kv_up, (self.kv_heads, d_n + d_v))
        if self.kv_gain is not None:
            share.cut(self, "kv_gain", (self.parts, self.width))
        self.rank, self.parts = self.width * share.count(self.parts), share.count(self.parts)
        self.heads, self.kv_heads, self.rope_heads = (
            share.count(n) for n in (self.heads, self.kv_heads, self.rope_heads)
        )
        share.keep(self)

    def memory(self) -> dict[str, Slot]:
        rows = {"latent": Slot("rows", (self.parts, self.width))}
        return rows | ({"k_rope": Slot("rows", (self.rope_heads, self.widths[1]))} if self.turned else {})

    def work(self, length: int) -> Iterable[Work]:
        d_n, d_r, d_v = self.widths
        per = 2 * length
        if self.q_rank:
            yield Work("projections", "W_dq", per * self.dim * self.q_rank)
        yield Work(
            "projections", "W_uq", per * (self.q_rank or self.dim) * self.heads * (d_n + d_r), per_head=True
        )
        yield Work("projections", "W_dkv", per * self.dim * (self.rank + self.rope_heads * d_r))
        yield Work("projections", "W_ukv", per * self.width * self.kv_heads * (d_n + d_v))


class Sizes(NamedTuple):
    """widths: d_n, d_r, d_v; width: D / H, from which defaults follow; rank: d_c by default."""

    widths: tuple[int, int, int]
    width: int
    rank: int


def sizes(draft: Draft, d_n: int | None, d_r: int | None, d_v: int | None, q_rank: int) -> Sizes:
    """Widths of the heads, checked, and the default rank min(4, H) D / H.

    Raises:
        ValueError: a width or the query rank is out of range, or rotary channels contradict ``pos``.
    """
    width = draft.head_dim
    d_n = width if d_n is None else d_n
    d_v = width if d_v is None else d_v
    for name, value in (("qk_nope_head_dim", d_n), ("v_head_dim", d_v)):
        if value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value}")
    if q_rank < 0:
        raise ValueError(f"q_lora_rank: must be at least 0 (0 = none), got {q_rank}")
    return Sizes((d_n, rotary_width(draft, d_r), d_v), width, min(4, draft.num_heads) * width)


def rotary_width(draft: Draft, d_r: int | None) -> int:
    """Channels of the shared rotary key, by default half a head and even.

    Raises:
        ValueError: they contradict ``pos``.
    """
    pos = draft.host["pos"]
    if d_r is None:
        d_r = max(2, draft.head_dim // 4 * 2) if pos == "rope" else 0
    if (pos == "rope") != (d_r > 0):
        needed = "positive" if pos == "rope" else "0"
        raise ValueError(f"qk_rope_head_dim: must be {needed} with pos={pos}, got {d_r}")
    return d_r


def check_rank(field: str, rank: int, heads: int, widths: tuple[int, int, int], allow_expand: bool) -> None:
    """Raises ValueError where a latent is empty, or no smaller than what ``heads`` heads make of it."""
    full = heads * (widths[0] + widths[2])
    if rank < 1:
        raise ValueError(f"{field}: must be at least 1, got {rank}")
    if rank >= full and not allow_expand:
        raise ValueError(
            f"{field}: {rank} does not compress H (d_n + d_v) = {full}; lower it or set allow_expand=true"
        )


def settle(draft: Draft, widths: tuple[int, int, int], project: Latent) -> None:
    """Sets widths, heads and the projection, and refuses that another variant shares heads on top."""

    def unshared(done: Draft) -> None:
        if done.num_kv_heads != project.kv_heads:
            raise ValueError(
                f"num_kv_heads: {project.kv_heads} key heads come from the latent, "
                f"got {done.num_kv_heads} by add; leave one out"
            )

    draft.last(unshared)
    draft.head_dim, draft.rotary, draft.v_head_dim = widths
    draft.num_kv_heads = project.kv_heads
    draft.put("project", project)

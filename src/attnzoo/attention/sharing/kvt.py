"""Key-value transformer: no query projection, a token's key is its query.

Key-Value Transformer (A. Borji), arXiv 2305.19129.

    k = x W_k,  v = x W_v (H heads)
    kv:      s_ij = k_i . k_j / sqrt(d)
    kv_pos:  s_ij = sum_c a_c (k_i . k_j / sqrt(d) + P_c(i, j)),  P(i, j) = [P_i ; P_j] in R^p,  a in R^p
                  = gamma k_i . k_j / sqrt(d) + a2 . P_j + (the same for all j)
             gamma = sum_c a_c,  a = [a1 ; a2]
    P_j = (sin w_0 j, cos w_0 j, sin w_1 j, ..) in R^(p/2),  w_m = 10000^(-2m / (p/2))

The part of P_i and the bias of the published form cancel in the softmax, so kv_pos is a learned bias of the
key's position and a scale: one more channel, q~ = [gamma k ; 1], k~ = [k ; sqrt(d) a2 . P_j].
Cached: k (after RoPE) and v, 2 H d per token. Our choice: a starts at 1/p (gamma = 1, a random start may
make it negative) and is not decayed; p = 12; scale 1/sqrt(d) where one of the published scripts has
1/sqrt(D). Scores are symmetric, with RoPE too, and tokens start out reading themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.score import Early
from attnzoo.attention.site import Site, flag
from attnzoo.attention.slots import Slot
from attnzoo.attention.stages.position import NoPosition, Rope
from attnzoo.cards import Claim
from attnzoo.cost import Work
from attnzoo.ops.attention import Keys
from attnzoo.ops.fused import split_linear
from attnzoo.parallel.tensor import Share
from attnzoo.registry import Card, register


class KeyAsQuery(Early, Stage):
    """Keys and values by one matrix ``[W_k | W_v]``; queries are the keys.

    Args:
        num_heads: H of all three. head_dim, v_head_dim: widths.
    """

    def __init__(
        self, site: Site, dim: int, num_heads: int, head_dim: int, v_head_dim: int, bias: bool, stores: bool
    ) -> None:
        super().__init__()
        self.dim, self.heads, self.widths, self.stores = dim, num_heads, (head_dim, v_head_dim), stores
        self.sizes = [num_heads * d for d in self.widths]
        self.kv_proj = site.weights.linear("kv", dim, sum(self.sizes), bias, parts=self.sizes)

    def qkv(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """As `QKV.qkv`."""
        parts = split_linear(self.kv_proj, x, self.sizes)
        k, v = (z.unflatten(-1, (self.heads, -1)).transpose(1, 2) for z in parts)
        return k, k, v

    def split(self, share: Share) -> None:
        share.rows(self.kv_proj, *((self.heads, width) for width in self.widths))
        self.heads = share.count(self.heads)
        self.sizes = [self.heads * width for width in self.widths]

    def memory(self) -> dict[str, Slot]:
        if not self.stores:
            return {}
        return {name: Slot("rows", (self.heads, d)) for name, d in zip("kv", self.widths, strict=True)}

    def work(self, length: int) -> Iterable[Work]:
        yield Work("projections", "W_k, W_v", 2 * length * self.dim * sum(self.sizes))


class KeyPositionBias(NoPosition):
    """A scale of each head's scores and a bias by the key's absolute position, on top of ``inner``.

    Args:
        num_heads: H. size: p, a multiple of 4. scale: what scores are multiplied by. inner: what turns
            queries and keys.
    """

    appended = 1

    def __init__(self, num_heads: int, size: int, scale: float, inner: NoPosition) -> None:
        super().__init__()
        self.scale, self.inner, self.rotates = scale, inner, inner.rotates
        self.a = flag(nn.Parameter(torch.full((num_heads, size), 1 / size)), decay=False, reinit=False)

    def members(self) -> Iterable[Stage]:
        return (self, *self.inner.members())

    def split(self, share: Share) -> None:
        share.cut(self, "a", (len(self.a), 1))

    def turn(self, z: Tensor, pos: Tensor, call: Call) -> Tensor:
        return self.inner.turn(z, pos, call)

    def at_read(self, q: Tensor, keys: Keys, call: Call) -> tuple[Tensor, Keys]:
        a = self.a.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
        table = self.table(call.mem.places()).to(a.dtype)  # (B or 1, S, p/2)
        # a product of matrices would cost a batch of equal positions as much as one sequence
        bias = (table[:, None] * a[:, None, a.shape[1] // 2 :]).sum(-1) / self.scale  # (B or 1, H, S)
        q = torch.cat([q * a.sum(1).to(q.dtype)[:, None, None], torch.ones_like(q[..., :1])], dim=-1)
        bias = bias.to(keys.k.dtype).expand(keys.k.shape[0], -1, -1)[..., None]
        return self.inner.at_read(q, keys._replace(k=torch.cat([keys.k, bias], dim=-1)), call)

    def table(self, pos: Tensor) -> Tensor:
        """``(B or 1, S)`` -> ``(B or 1, S, p/2)``, sine and cosine in turn, in fp64."""
        half = self.a.shape[1] // 2
        step = torch.arange(0, half, 2, device=pos.device, dtype=torch.float64) / half
        angle = pos.double()[..., None] * 10000.0**-step
        return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)

    def elementwise(self) -> dict[str, float]:
        return {"key position bias": float(self.a.numel())}


@register(
    Card(
        name="kvt",
        title="Key-value transformer",
        paper="Key-Value Transformer",
        arxiv="2305.19129",
        family="sharing",
        summary="A token's key is its query: no query projection, symmetric scores.",
        cached="k, v: 2 H d per token",
        claims=(
            Claim("sometimes above, sometimes below mha", where="toy, vision and character-level tasks"),
            Claim("25 % fewer attention parameters", "params", "lower", "mha"),
        ),
        small={"kv_variant": "kv_pos"},
    ),
    frames=("score",),
    fixed={"num_kv_heads": "queries are the keys, so heads that share one would be the same head"},
)
def kvt(
    draft: Draft,
    *,
    kv_variant: Literal["kv", "kv_pos"] = "kv",
    pos_dim: int = 12,
) -> None:
    """Sets the projection, and the position stage in kv_pos.

    Args:
        kv_variant: "kv", or "kv_pos" with a learned bias of the key's position.
        pos_dim: p, width of the position code of a pair, a multiple of 4.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: mha with W_q = W_k; kv in kv_pos with a = [1/p .. 1/p ; 0 .. 0] times 2.
    """
    if pos_dim < 4 or pos_dim % 4:
        raise ValueError(f"pos_dim: must be a multiple of 4, sine and cosine of two places, got {pos_dim}")

    def complete(done: Draft) -> None:
        H = done.num_heads
        if done.shapes()["k"][0] != H or done.shapes()["v"][0] != H:
            raise ValueError(
                f"num_kv_heads: queries are the keys, so heads that share one would be the same head, got "
                f"{done.num_kv_heads} by add; leave one out"
            )
        sizes = (done.head_dim, done.v_head_dim)
        done.put("project", KeyAsQuery(done.site, done.dim, H, *sizes, done.host["qkv_bias"], True))
        if kv_variant == "kv_pos":
            rope, theta = done.host["pos"] == "rope", done.host["rope_theta"]
            inner = Rope(done.head_dim, theta) if rope else NoPosition()
            scale = done.scale or done.qk_width**-0.5
            done.put("position", KeyPositionBias(H, pos_dim, scale, inner))

    draft.last(complete)

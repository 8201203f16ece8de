"""Dynamically composable multi-head attention: scores and weights are mixed over heads by tokens' matrices.

Improving Transformers with Dynamically Composable Multi-Head Attention, arXiv 2405.08553.

    u_c = GELU(x W1)_c,  [w1_c ; w2_c] = u_c Q_c,  w1_c <- w1_c / rms_H(w1_c),  g_c = tanh(x W_d)_c
    c in {pre, post} x {query, key};  for the H scores a of one (query i, key j):
    Compose(a) = a (I + W_b) + sum_r (a . w1_i,r) w2_i,r + sum_r (a . w1_j,r) w2_j,r + a * g_i + a * g_j
    p = softmax_j(Compose_pre(s)),  p' = Compose_post(p), 0 where masked,  o_h = sum_j p'_ij,h v_j,h

Cached: k, v and the key side of both compositions in rank form, 2 H d + 2 (2 I + 1) H per token. Our choice:
``zero_init`` starts exactly at the host; with static weights I + W_b is meant in training and decode alike
(the released code disagrees with itself). Gains of qk_norm follow the frame's option, on by default as at
405M.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.score import ScoreStage
from attnzoo.attention.site import flag
from attnzoo.attention.slots import Slot
from attnzoo.cards import Claim
from attnzoo.cost import Work
from attnzoo.ops.attention import Dot, Geo
from attnzoo.registry import Card, register
from attnzoo_kernels.compose import MOST_HEADS, MOST_RANK, Mix, compose
from attnzoo_kernels.span import Span


class Compose(ScoreStage):
    """Score stage that mixes heads before and after the softmax.

    Args:
        rank: I of the per-token maps; hidden: K of the two-layer generator.
        sides: which of "query", "key" generate maps; stages: which of "pre", "post" are composed.
        static: adds a learned H x H matrix to each stage.
    """

    unsplit = "it mixes the scores of all heads"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        scale: float,
        rank: int,
        hidden: int,
        sides: tuple[str, ...],
        stages: tuple[str, ...],
        static: bool,
        zero_init: bool,
        eps: float,
    ) -> None:
        super().__init__()
        H, I, K = num_heads, rank, hidden
        self.dim, self.heads, self.lowrank, self.hidden, self.eps = dim, H, I, K, eps
        self.dot, self.sides, self.composed, self.static = Dot(scale), sides, stages, static
        self.parts = [(stage, side) for stage in stages for side in sides]
        n = len(self.parts)
        if n:
            self.W1 = nn.Parameter(torch.randn(dim, n * K) * math.sqrt(2 / (dim + K)))
            self.Q = nn.Parameter(torch.randn(n, K, 2 * I, H) * 0.02 * math.sqrt(1 / K) / (H + I))
            self.W_d = nn.Parameter(torch.randn(dim, n * H) * 0.005 * math.sqrt(2 / (dim + H)))
            for p in (self.W1, self.Q, self.W_d):
                flag(p, reinit=False)
            if zero_init:
                with torch.no_grad():
                    self.Q[:, :, I:] = 0
                    self.W_d.zero_()
        if static:
            for stage in stages:
                start = torch.zeros(H, H) if zero_init else torch.randn(H, H) * 0.1 * math.sqrt(1 / H)
                self.register_parameter(f"W_b_{stage}", flag(nn.Parameter(start), reinit=False))
        self.maps: dict[tuple[str, str], Tensor] = {}

    def begin(self, call: Call) -> None:
        """Generates the maps of this forward's tokens and appends the key side to the cache."""
        self.maps = {}
        if not self.parts:
            return
        maps = self._generate(call.x)
        for i, (stage, side) in enumerate(self.parts):
            rows = maps[:, :, i].transpose(1, 2)
            self.maps[stage, side] = call.mem.rows(f"compose_{stage}", rows) if side == "key" else rows

    def _generate(self, x: Tensor) -> Tensor:
        """``(B, T, parts, 2 I + 1, H)``: rows w1, w2 and the diagonal g."""
        n, I = len(self.parts), self.lowrank
        u = F.gelu(x @ self.W1).unflatten(-1, (n, self.hidden))
        w = torch.einsum("btck,ckm->btcm", u, self.Q.flatten(2)).unflatten(-1, (2 * I, self.heads))
        w1, w2 = w[..., :I, :], w[..., I:, :]
        wide = w1 if w1.dtype == torch.float64 else w1.float()
        w1 = (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt()).to(w2.dtype)
        g = torch.tanh(x @ self.W_d).unflatten(-1, (n, 1, self.heads))
        return torch.cat([w1, w2, g], dim=-2)

    def forward(self, q: Tensor, geo: Geo) -> Tensor:
        return self._compose("pre", self.dot(q, geo), geo)

    def weights(self, p: Tensor, geo: Geo) -> Tensor:
        """Composed weights, again 0 where masked."""
        return self._compose("post", p, geo).masked_fill(~geo.visible, 0.0)

    def op(self, q: Tensor, k: Tensor, v: Tensor, span: Span, impl: str) -> Tensor:
        """The whole attention without storing all scores, ``(B, H, T, d_v)``."""
        mixes = {name: self._mix(name) if name in self.composed else None for name in ("pre", "post")}
        return compose(q, k, v, span, **mixes, scale=self.dot.scale, impl=impl)

    def refusal(self) -> str | None:
        if self.heads > MOST_HEADS:
            return f"its kernels take up to {MOST_HEADS} heads, got {self.heads}"
        if self.lowrank > MOST_RANK and "key" in self.sides:
            return f"its kernels take key maps up to rank {MOST_RANK}, got {self.lowrank}"
        return None

    def _mix(self, stage: str) -> Mix:
        static = getattr(self, f"W_b_{stage}") if self.static else None
        return Mix(static, self.maps.get((stage, "query")), self.maps.get((stage, "key")))

    def _compose(self, stage: str, a: Tensor, geo: Geo) -> Tensor:
        """``a`` ``(B, H, t, S)`` mixed over H."""
        if stage not in self.composed:
            return a
        maps = self.maps.get((stage, "query"))
        out = self._mix_queries(stage, a, None if maps is None else maps[:, :, geo.rows].to(a.dtype))
        maps = self.maps.get((stage, "key"))
        if maps is None:
            return out
        return self._mix_keys(a, (maps if geo.cols is None else maps[:, :, geo.cols]).to(a.dtype), out)

    def _mix_queries(self, stage: str, a: Tensor, maps: Tensor | None) -> Tensor:
        """``a (I + W_b)`` plus what maps ``(B, 2 I + 1, t, H)`` of the queries do."""
        w1 = w2 = g = None
        if maps is not None:
            w1, w2, g = maps.transpose(1, 2).split([self.lowrank, self.lowrank, 1], dim=2)
        if not self.static:
            out = a if g is None else torch.addcmul(a, a, g.permute(0, 3, 1, 2))
            return out if w1 is None else out + (w2.mT @ (w1 @ a.transpose(1, 2))).transpose(1, 2)
        # identity and diagonal ride on the H x H product: no further pass over the scores
        square = getattr(self, f"W_b_{stage}").to(a.dtype).T + torch.eye(
            self.heads, dtype=a.dtype, device=a.device
        )
        heads = a.transpose(1, 2)
        if w1 is None:
            return (square @ heads).transpose(1, 2)
        heads = heads.contiguous()
        out = (square + g * torch.eye(self.heads, dtype=a.dtype, device=a.device)) @ heads
        return (out + w2.mT @ (w1 @ heads)).transpose(1, 2)

    def _mix_keys(self, a: Tensor, maps: Tensor, out: Tensor) -> Tensor:
        """``out`` plus what maps ``(B, 2 I + 1, S, H)`` of the keys do to ``a``."""
        w1, w2, g = maps.transpose(1, 2).split([self.lowrank, self.lowrank, 1], dim=2)
        mixed = (a.permute(0, 3, 2, 1) @ w1.mT) @ w2
        return torch.addcmul(out, a, g.permute(0, 3, 2, 1)) + mixed.permute(0, 3, 2, 1)

    def memory(self) -> dict[str, Slot]:
        rows = Slot("rows", (2 * self.lowrank + 1, self.heads))
        return {f"compose_{stage}": rows for stage, side in self.parts if side == "key"}

    def work(self, length: int) -> Iterable[Work]:
        H, I, K, n = self.heads, self.lowrank, self.hidden, len(self.parts)
        yield Work("gates", "map generator", 2 * length * n * (self.dim * (K + H) + K * 2 * I * H))

    def pair_flops(self) -> int:
        """FLOPs per pair: two rank-I products per generated side, one H x H product per static stage."""
        return 4 * self.lowrank * self.heads * len(self.parts) + self.static * 2 * self.heads**2 * len(
            self.composed
        )


@register(
    Card(
        name="dcmha",
        title="Dynamically composable multi-head attention",
        paper="Improving Transformers with Dynamically Composable Multi-Head Attention",
        arxiv="2405.08553",
        family="heads",
        summary="Scores and weights are mixed across heads by matrices that query and key tokens generate.",
        cached="k, v and the key side of both compositions: 2 H d + 2 (2 I + 1) H per token",
        claims=(
            Claim("matches 1.7-2.0 x the compute", "val_bpb", "lower", "mha", "405M to 6.9B"),
            "DCPythia-6.9B below Pythia-12B in perplexity",
        ),
    ),
    host={"qk_norm": True},
)
def dcmha(
    draft: Draft,
    *,
    rank: int = 2,
    hidden_mult: int = 2,
    pre_compose: bool = True,
    post_compose: bool = True,
    query_wise: bool = True,
    key_wise: bool = True,
    static_proj: bool = True,
    zero_init: bool = False,
    expand_kv: bool = False,
) -> None:
    """Sets the score stage.

    Args:
        rank: I of the per-token maps. hidden_mult: K = hidden_mult * H * I of their generator.
        pre_compose, post_compose: compose before, after the softmax.
        query_wise, key_wise: which tokens generate maps. static_proj: a learned H x H matrix as well.
        zero_init: start exactly at the host.
        expand_kv: allow num_kv_heads < num_heads, key heads then being read by several query heads.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: the host with zero_init at the start; talking heads without generated maps.
    """
    if rank < 1:
        raise ValueError(f"rank: must be at least 1, got {rank}")
    if hidden_mult < 1:
        raise ValueError(f"hidden_mult: must be at least 1, got {hidden_mult}")
    stages = tuple(s for s, on in (("pre", pre_compose), ("post", post_compose)) if on)
    sides = tuple(s for s, on in (("query", query_wise), ("key", key_wise)) if on)
    if not stages:
        raise ValueError(
            "pre_compose: at least one of pre_compose, post_compose must be true, got false for both"
        )
    if not sides and not static_proj:
        raise ValueError("static_proj: must be true where query_wise and key_wise are false, got false")

    def complete(done: Draft) -> None:
        H = done.score_heads or done.num_heads
        if done.num_kv_heads != H and not expand_kv:
            raise ValueError(
                f"num_kv_heads: scores of all {H} heads are mixed, got {done.num_kv_heads} key heads; "
                "set expand_kv=true to share them"
            )
        scale, eps = done.scale or done.qk_width**-0.5, done.host["norm_eps"]
        hidden = hidden_mult * H * rank
        done.put(
            "score", Compose(done.dim, H, scale, rank, hidden, sides, stages, static_proj, zero_init, eps)
        )

    draft.last(complete)

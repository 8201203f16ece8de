"""Mixture-of-head attention: some heads always on, the rest chosen per token, all weighted.

MoH: Multi-Head Attention as Mixture-of-Head Attention, arXiv 2410.11842.

    pi = softmax(x W_r) over the E routed heads,  S = top-K(pi)
    r_e = K pi_e / sum_S pi  on S, else 0         c = H_s softmax(x W_s) over the H_s shared heads
    (a_1, a_2) = 2 softmax(x W_b)                 gamma = concat(a_1 c, a_2 r)
    y = concat_h(gamma_h o_h) W_o
    balance loss = E sum_e f_e mean(pi_e),  f_e the share of tokens that chose e; K when balanced

Cached: as the host (a later token may choose any head). The equations are the released code's; ``gate_form:
paper`` leaves out the renormalisation and the factors K, H_s, 2. Gradient class: the gate multiplies the
output, the choice itself has none. Our choice: a quarter of the heads is shared by default and three quarters
are active, as many as in MoH-LLaMA3; with K = 1 the renormalised gate would be constant, and only the balance
loss would teach the router.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.cards import Claim
from attnzoo.cost import Work
from attnzoo.parallel.tensor import CannotSplit, Share
from attnzoo.registry import Card, register


class HeadRouter(Stage):
    """Weights the heads' outputs by a per-token gate of which at most ``shared + top`` entries are not 0.

    Args:
        shared: H_s, top: K of the routed ones; router: "linear", or "qnorm", the norm of the queries before
            position, with a straight-through gradient in training.
    """

    rank = 50
    additive = True

    def __init__(
        self, draft: Draft, shared: int, top: int, router: str, form: str, aux_weight: float
    ) -> None:
        super().__init__()
        self.heads, self.shared, self.top = draft.o_heads, shared, top
        self.router, self.form, self.aux_weight = router, form, aux_weight
        self.dim, self.routed = draft.dim, draft.o_heads - shared
        self.own = slice(None)  # heads that this rank has, of those that it routes
        learns = router == "linear"
        sizes = {
            "routed": self.routed if learns and self.routed > 1 else 0,
            "shared": shared if learns and shared > 1 else 0,
            "balance": 2 if learns and shared and self.routed else 0,
        }
        self.sizes = sizes
        self.scores = torch.nn.ModuleDict(
            {name: draft.linear(f"router_{name}", draft.dim, n) for name, n in sizes.items() if n}
        )

    def forward(self, o: Tensor, call: Call) -> Tensor:
        gate = self._linear(call) if self.router == "linear" else self._qnorm(call)
        call.stat("moh/gate", gate)
        return o * gate[..., self.own, None].to(o.dtype)

    def split(self, share: Share) -> None:
        if self.router == "qnorm":
            raise CannotSplit("router=qnorm compares the queries of all heads")
        self.own = share.part(self.heads).rows
        share.keep(self)

    def _softmax(self, name: str, x: Tensor) -> Tensor:
        """``(B, T, n)``; 1 where there is nothing to weigh.

        In fp32 under autocast too: rounded scores would choose other heads, whose outputs are no near ones.
        """
        if name not in self.scores:
            return torch.ones_like(x[..., :1])
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(wide), self.scores[name].weight.to(wide)).softmax(-1)

    def _linear(self, call: Call) -> Tensor:
        """``(B, T, H)``."""
        code, parts = self.form == "code", []
        share = self._softmax("balance", call.x) * (2 if code else 1) if "balance" in self.scores else None
        if self.shared:
            c = self._softmax("shared", call.x)
            c = c * self.shared if code else c
            parts.append(c if share is None else c * share[..., :1])
        if self.routed:
            pi = self._softmax("routed", call.x)
            kept = pi * self._choose(pi, call)
            if code:
                kept = self.top * kept / kept.sum(-1, keepdim=True).clamp(min=1e-9)
            parts.append(kept if share is None else kept * share[..., 1:])
        return torch.cat([p.to(parts[-1].dtype) for p in parts], dim=-1)

    def _qnorm(self, call: Call) -> Tensor:
        norm = call.raw.q[:, self.shared :].norm(dim=-1).transpose(1, 2)
        score = norm if norm.dtype == torch.float64 else norm.float()
        pi = (score / score.std(-1, keepdim=True).clamp(min=1e-9)).softmax(-1)
        hard = self._choose(pi, call)
        routed = hard + pi - pi.detach() if self.training else hard
        return torch.cat([routed.new_ones(*routed.shape[:2], self.shared), routed], dim=-1)

    def _choose(self, pi: Tensor, call: Call) -> Tensor:
        """``(B, T, E)`` with ones at the top K; reports the balance loss."""
        picked = pi.topk(self.top, dim=-1).indices
        hard = torch.zeros_like(pi).scatter(-1, picked, 1.0)
        if call.collects:
            load, mean = call.mean_over_tokens(hard), call.mean_over_tokens(pi)
            call.aux("moh/balance", self.routed * (load * mean).sum(), self.aux_weight)
        return hard

    def active(self) -> float:
        return (self.shared + self.top) / self.heads

    def work(self, length: int) -> Iterable[Work]:
        yield Work("gates", "router", 2 * length * self.dim * sum(self.sizes.values()))


@register(
    Card(
        name="moh",
        title="Mixture-of-head attention",
        paper="MoH: Multi-Head Attention as Mixture-of-Head Attention",
        arxiv="2410.11842",
        family="heads",
        summary="Some heads are always on, the rest are chosen per token; all outputs are weighted.",
        cached="as the host: 2 G d per token",
        claims=(
            Claim("64.0 % over 14 tasks with 75 % of the heads, +2.4", where="MoH-LLaMA3-8B, continued"),
            Claim(
                "matches or beats mha with 50 to 90 % of the heads",
                where="ViT, DiT and language models from scratch",
            ),
        ),
    ),
    frames=("score", "recurrent"),
)
def moh(
    draft: Draft,
    *,
    shared_heads: int | None = None,
    active_heads: int | None = None,
    router: Literal["linear", "qnorm"] = "linear",
    gate_form: Literal["code", "paper"] = "code",
    aux_weight: float = 0.01,
    allow_dead: bool = False,
) -> None:
    """Adds the router.

    Args:
        shared_heads: H_s, heads that are always on; default a quarter.
        active_heads: H_s + K, heads on per token; default three quarters of all.
        router: learned from x, or the parameter-free norm of the queries.
        gate_form: the released code's gate, or the paper's.
        aux_weight: weight that the balance loss asks for.
        allow_dead: lets K = 0 with routed heads left.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: the host with K = E and zero router weights ("code").
    """
    if aux_weight < 0:
        raise ValueError(f"aux_weight: must be at least 0, got {aux_weight}")

    def complete(done: Draft) -> None:
        shared, active = head_counts(done.o_heads, shared_heads, active_heads, router, allow_dead)
        done.put("combine", HeadRouter(done, shared, active - shared, router, gate_form, aux_weight))

    draft.last(complete)
    if router == "qnorm":
        draft.very_last(check_queries)


def check_queries(draft: Draft) -> None:
    """Whether each routed head has one whole query whose norm can be its score."""
    if getattr(draft.slots.get("project"), "late", False) and draft.rotary:
        raise ValueError("router: a latent projection splits its queries, got 'qnorm'; set router=linear")
    if draft.o_heads != draft.num_heads:
        raise ValueError(
            f"router: {draft.o_heads} heads share {draft.num_heads} queries, got 'qnorm'; set router=linear"
        )


def head_counts(
    H: int, shared_heads: int | None, active_heads: int | None, router: str, allow_dead: bool
) -> tuple[int, int]:
    """Shared and active heads of ``H``, checked."""
    shared = max(1, H // 4) if shared_heads is None else shared_heads
    if not 0 <= shared <= H:
        raise ValueError(f"shared_heads: must be in 0..num_heads={H}, got {shared}")
    routed = H - shared
    active = max(min(shared + 1, H), shared, 3 * H // 4) if active_heads is None else active_heads
    if not max(1, shared) <= active <= H:
        raise ValueError(
            f"active_heads: must be in {max(1, shared)}..{H} (it counts the shared heads), got {active}"
        )
    if active == shared and routed and not allow_dead:
        raise ValueError(
            f"active_heads: {active} leaves {routed} routed heads dead; raise it above shared_heads={shared} "
            "or set allow_dead=true"
        )
    if router == "qnorm" and routed < 2:
        raise ValueError(
            f"router: qnorm compares routed heads, got {routed}; leave at least 2 heads unshared"
        )
    return shared, active

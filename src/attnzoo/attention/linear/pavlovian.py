"""Rules of conditioning as linear attention: keys are conditional stimuli, values unconditional ones.

Understanding Transformers through the Lens of Pavlovian Conditioning, arXiv 2508.08289.

    q, k of unit length per head;  eta_h, lambda_h per head;  o_t = S_t^T q_t
    hebb             S_t = S_(t-1) + eta k_t v_t^T
    trace            S_t = lambda S_(t-1) + eta k_t v_t^T
    rescorla_wagner  S_t = S' + eta k_t (v_t - S'^T k_t)^T,  S' = lambda S_(t-1)
    y = concat(RMSNorm_head(o)) W_o

Cached: S (H d d_v) in fp32, whatever the length.
Our choice, since the paper is theory: eta = sigmoid(a) from 0.5 and lambda = sigmoid(l) from 0.99, or
constants; the head norm. Behind that norm eta of hebb and trace is all but invisible; it scales S.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.recurrent import Terms
from attnzoo.attention.site import flag
from attnzoo.attention.stages.combine import HeadNorm
from attnzoo.attention.stages.refine import L2Norm
from attnzoo.parallel.tensor import Share
from attnzoo.registry import Card, register


class Conditioning(Stage):
    """A learning rule with one rate eta and one retention lambda per head.

    Args:
        rule: see the module. eta, lam: (value, whether it is learnt, as the sigmoid of a parameter).
    """

    def __init__(self, heads: int, rule: str, eta: tuple[float, bool], lam: tuple[float, bool]) -> None:
        super().__init__()
        self.heads, self.rule, self.eta, self.lam = heads, rule, eta, lam
        self.kind = "delta" if rule == "rescorla_wagner" else "scalar"
        for name, (value, learnt) in (("a", eta), ("l", lam)):
            if learnt and not (name == "l" and rule == "hebb"):
                start = torch.full((heads,), math.log(value / (1 - value)))
                self.register_parameter(name, flag(nn.Parameter(start), decay=False, reinit=False))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Terms:
        wide = torch.float64 if v.dtype == torch.float64 else torch.float32
        eta = torch.sigmoid(self.a.to(wide)) if self.eta[1] else torch.full_like(v[0, 0, :, 0], self.eta[0])
        g = self._log_retention(wide, v.device)
        if self.rule == "rescorla_wagner":
            return Terms(q, k, v, g=g, beta=eta.to(wide).expand(*v.shape[:2], -1))
        return Terms(q, k, v * eta[:, None].to(v.dtype), g=g)

    def split(self, share: Share) -> None:
        for name in ("a", "l"):
            if hasattr(self, name):
                share.cut(self, name, (self.heads, 1))
        self.heads = share.count(self.heads)

    def _log_retention(self, wide: torch.dtype, device: torch.device) -> Tensor | None:
        """``(H,)`` log lambda; None = 1."""
        if self.rule == "hebb" or self.lam == (1.0, False):
            return None
        if self.lam[1]:
            return F.logsigmoid(self.l.to(wide))
        log = math.log(self.lam[0]) if self.lam[0] else -math.inf
        return torch.full((self.heads,), log, dtype=wide, device=device)


@register(
    Card(
        name="pavlovian",
        title="Conditioning rules",
        paper="Understanding Transformers through the Lens of Pavlovian Conditioning",
        arxiv="2508.08289",
        family="linear",
        summary="A transient associative memory with a chosen learning rule: Hebb, trace, Rescorla-Wagner.",
        cached="the state S (H d d_v): constant in the length",
        claims=("stores O(sqrt(d_k)) associations reliably in the worst case, O(d_k) on average",),
        small={"rule": "rescorla_wagner", "chunk_size": 4},
    ),
    frames=("recurrent",),
)
def pavlovian(
    draft: Draft,
    *,
    rule: Literal["hebb", "trace", "rescorla_wagner"] = "hebb",
    learn_eta: bool = True,
    learn_lambda: bool = True,
    eta: float = 0.5,
    lam: float = 0.99,
) -> None:
    """Sets the rule and the head norm.

    Args:
        rule: see the module. learn_eta, learn_lambda: learn the rate and the retention, else keep them.
        eta: rate at the start: in (0, 1) where learnt, else in [0, 2]. lam: retention at the start: in (0, 1)
            where learnt, else in [0, 1]; hebb has none.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: deltanet without convolutions and with a constant beta (rescorla_wagner, lam=1).
    """
    for name, value, top, learnt in (("eta", eta, 2, learn_eta), ("lam", lam, 1, learn_lambda)):
        if not 0 <= value <= top:
            raise ValueError(f"{name}: must be in [0, {top}], got {value}; beyond it the memory diverges")
        if learnt and not 0 < value < 1:
            field = "learn_eta" if name == "eta" else "learn_lambda"
            raise ValueError(f"{name}: a learnt one is a sigmoid, in (0, 1), got {value}; set {field}=false")
    draft.scale = 1.0
    draft.put("refine", L2Norm())
    draft.put("gates", Conditioning(draft.o_heads, rule, (eta, learn_eta), (lam, learn_lambda)))
    draft.put("combine", HeadNorm(draft.v_head_dim, draft.host["norm_eps"]))

"""Low-rank compact attention: a query is one number per head, taken from the mean of all tokens so far.

Low Rank Factorization for Compact Multi-Head Self-Attention (LAMA), arXiv 1912.00835.

    c_i = mean_(m <= i) x_m,   a_ij,h = tanh((c_i . p_h) (x_j . q_h))
    b_ij,h = a_ij,h / (|a_ij|_2 + eps)                 the norm over heads
    o_i,h = sum_(j <= i) softmax_j(lambda_h b_ij,h) x_j W_v,h,   y = concat_h(o) W_o

Cached: x_j . q_h and v_j, H (1 + d_v) per token, and the sum of x . p_h over the document, H numbers (the
projection of a mean is the mean of projections). No position enters.
Our choice: the causal form (the paper pools one text with the mean of all its tokens); a value projection
where the paper averages the tokens themselves; lambda, without which the weights of a long context differ by
at most e². P and Q start as in the released code.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.score import Early, ScoreStage
from attnzoo.attention.site import flag
from attnzoo.attention.slots import Slot
from attnzoo.attention.stages.running import count, running_sum
from attnzoo.cards import Claim
from attnzoo.cost import Work
from attnzoo.ops.attention import Dot, Geo
from attnzoo.ops.unit_heads import unit_heads
from attnzoo.parallel.tensor import CannotSplit, Share
from attnzoo.registry import Card, register


class ContextVector(Early, Stage):
    """Queries and keys of width 1, the queries from the running mean of x.

    Args:
        mean: queries from the mean of the document so far, else from the token itself.
    """

    def __init__(self, draft: Draft, kv_heads: int, width: int, mean: bool) -> None:
        super().__init__()
        self.dim, self.heads, self.kv_heads = draft.dim, draft.num_heads, kv_heads
        self.width, self.mean = width, mean
        bias = draft.host["qkv_bias"]
        self.p_proj, self.q_proj = (_affinity(draft.dim, n, bias) for n in (self.heads, kv_heads))
        self.v_proj = draft.linear("v", draft.dim, kv_heads * width, bias)

    def qkv(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """``(B, H, T, 1)``, ``(B, G, T, 1)``, ``(B, G, T, d_v)``."""
        q = self.p_proj(x)
        if self.mean:
            wide = q if q.dtype == torch.float64 else q.float()
            q = (running_sum(wide, call, "context") / count(call, wide)[..., None]).to(q.dtype)
        v = self.v_proj(x).unflatten(-1, (self.kv_heads, self.width))
        return q.mT[..., None], self.q_proj(x).mT[..., None], v.transpose(1, 2)

    def split(self, share: Share) -> None:
        share.rows(self.p_proj, (self.heads, 1))
        share.rows(self.q_proj, (self.kv_heads, 1))
        share.rows(self.v_proj, (self.kv_heads, self.width))
        self.heads, self.kv_heads = share.count(self.heads), share.count(self.kv_heads)

    def memory(self) -> dict[str, Slot]:
        rows = {"k": Slot("rows", (self.kv_heads, 1)), "v": Slot("rows", (self.kv_heads, self.width))}
        return rows | ({"context": Slot("state", (self.heads,))} if self.mean else {})

    def work(self, length: int) -> Iterable[Work]:
        per = 2 * length * self.dim
        yield Work("projections", "P", per * self.heads, per_head=True)
        yield Work("projections", "Q, W_v", per * self.kv_heads * (1 + self.width))


class Affinity(ScoreStage):
    """``lambda_h b_ij,h`` of products of two numbers.

    Args:
        squash: tanh; norm: the heads of a pair have unit length together; learned: lambda.
    """

    def __init__(self, heads: int, squash: bool, norm: bool, learned: bool, eps: float) -> None:
        super().__init__()
        self.heads, self.squash, self.norm, self.eps, self.dot = heads, squash, norm, eps, Dot(1.0)
        start = nn.Parameter(torch.zeros(heads)) if learned else None
        self.log_lambda = flag(start, decay=False, reinit=False) if learned else None

    def forward(self, q: Tensor, geo: Geo) -> Tensor:
        a = self.dot(q, geo)
        a = a if a.dtype == torch.float64 else a.float()
        if self.norm:
            gain = a.new_ones(self.heads) if self.log_lambda is None else self.log_lambda.exp().to(a.dtype)
            return unit_heads(a, gain, self.eps, self.squash)
        if self.squash:
            a = a.tanh()
        return a if self.log_lambda is None else a * self.log_lambda.exp().to(a.dtype)[:, None, None]

    def split(self, share: Share) -> None:
        if self.norm:
            raise CannotSplit("the scores of a pair have one length over all heads")
        if self.log_lambda is not None:
            share.cut(self, "log_lambda", (self.heads, 1))
        self.heads = share.count(self.heads)

    def elementwise(self) -> dict[str, float]:
        return {"affinity, per key": (3.0 * self.norm + self.squash + 1) * self.heads}


def _affinity(dim: int, heads: int, bias: bool) -> nn.Linear:
    layer = nn.Linear(dim, heads, bias=bias)  # torch's own start is that of the released code
    flag(layer.weight, reinit=False)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


@register(
    Card(
        name="lama",
        title="Low-rank compact attention",
        paper="Low Rank Factorization for Compact Multi-Head Self-Attention",
        arxiv="1912.00835",
        family="factorised",
        summary="Scores of rank one: a number of the context's mean times a number of each token, per head.",
        cached="one number and a value per head and token: H (1 + d_v)",
        adapted="the paper's context is the mean of all tokens; here the mean of the tokens so far",
        claims=(
            Claim(
                "matches strong pooling baselines with fewer parameters",
                where="three text classification sets",
            ),
        ),
    ),
    host={"pos": "none"},
    fixed={
        "pos": "scores are products of single numbers, which nothing can rotate",
        "rope_theta": "there is no rotary embedding",
        "head_dim": "queries and keys are one number per head; set v_head_dim",
        "qk_norm": "queries and keys are one number per head, whose norm leaves its sign",
    },
)
def lama(
    draft: Draft,
    *,
    v_head_dim: int | None = None,
    activation: Literal["tanh", "none"] = "tanh",
    head_l2norm: bool = True,
    logit_scale: Literal["learned", "fixed1"] = "learned",
    context: Literal["prefix_mean", "self"] = "prefix_mean",
) -> None:
    """Sets projection and score.

    Args:
        v_head_dim: d_v, default D / H. activation, head_l2norm: steps of the score.
        logit_scale: lambda per head, from 1, or fixed at 1. context: what queries are taken from.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: mha with d = 1 and scale lambda with context=self, no activation and no norm; the mean of all
        values so far at lambda = 0.
    """
    width = draft.v_head_dim if v_head_dim is None else v_head_dim
    if width < 1:
        raise ValueError(f"v_head_dim: must be at least 1, got {width}")
    draft.head_dim, draft.v_head_dim = 1, width

    def complete(done: Draft) -> None:
        # variants that choose head counts set widths with them
        done.head_dim, done.v_head_dim, done.scale = 1, width, 1.0
        done.put("project", ContextVector(done, done.num_kv_heads, width, context == "prefix_mean"))
        learned, eps = logit_scale == "learned", done.host["norm_eps"]
        done.put("score", Affinity(done.num_heads, activation == "tanh", head_l2norm, learned, eps))

    draft.last(complete)

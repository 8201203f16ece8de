"""FAST: the exponential by its Taylor polynomial, whose moments of the keys make a linear-time state.

FAST: Factorizable Attention for Speeding up Transformers, arXiv 2402.07901.

    s_tj = q^_t . k^_j / nu;   f_p(s) = sum_(l <= p) s^l / l!,  p = order
    norm=token:  q^ = LayerNorm(q) without gain, nu = sqrt(d);    norm=unit:  q^ = q / |q|, nu = 1
    o_t = sum_(j <= t) f_p(s_tj) v_j / sum_(j <= t) f_p(s_tj)

Cached: moments of the keys, H F (d_v + 1) numbers in fp32, F = 1 + d + d (d + 1) / 2 at order 2.
mode=quadratic caches keys and values, whatever their width.
Our choice: both norms, since the released one divides by the largest norm in the sequence, which sees the
future; order 1 needs unit norms (1 + s would be negative); q and k are min(D / H, 64) wide unless head_dim
says otherwise. Short sequences take the quadratic form anyway, where it is cheaper.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.linear.based import Taylor
from attnzoo.attention.linear.linear import plain_sum
from attnzoo.attention.site import Site
from attnzoo.attention.stages.refine import L2Norm
from attnzoo.cards import Claim
from attnzoo.ops.taylor import polynomial
from attnzoo.registry import Card, register

EPS = 1e-12  # denominators are at least t / 2 at order 2; at order 1 all weights may vanish
WIDEST = 64


class TokenNorm(Stage):
    """Queries and keys with mean 0 and variance 1 over the head, without gains."""

    rank = 40
    alike = True

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        return self._norm(q), self._norm(k), v

    def _norm(self, z: Tensor) -> Tensor:
        wide = z if z.dtype == torch.float64 else z.float()
        return F.layer_norm(wide, z.shape[-1:], eps=self.eps).to(z.dtype)


class Polynomial(Stage):
    """Normalise stage: weights f_p(s) over their sum."""

    alike = True

    def __init__(self, order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, s: Tensor, visible: Tensor) -> Tensor:
        s = s if s.dtype == torch.float64 else s.float()
        p = polynomial(s, self.order) * visible
        return p / (p.sum(-1, keepdim=True) + EPS)


def _frame(site: Site, mode: str = "auto", **_: object) -> str:
    return "score" if mode == "quadratic" else "recurrent"


@register(
    Card(
        name="fast_factorizable",
        title="FAST: factorizable attention",
        paper="FAST: Factorizable Attention for Speeding up Transformers",
        arxiv="2402.07901",
        family="linear",
        summary="The exponential replaced by its Taylor polynomial: a full attention matrix in linear time.",
        cached="moments of the keys, H (1 + d + d (d + 1) / 2) (d_v + 1) numbers: constant in the length",
        adapted="the released code divides by the largest norm of the sequence; here each token has its own",
        claims=(
            "linear cost with an all-to-all attention matrix",
            Claim("accuracy as softmax", where="long-range tasks"),
        ),
        small={"head_dim": 2, "chunk_size": 4, "order": 1, "norm": "unit"},
    ),
    frames=("recurrent", "score"),
    host={"pos": "none", "norm_eps": 1e-5},
    choose=_frame,
)
def fast_factorizable(
    draft: Draft,
    *,
    order: Literal[1, 2] = 2,
    norm: Literal["token", "unit"] = "token",
    symmetric: bool = True,
    mode: Literal["auto", "quadratic"] = "auto",
) -> None:
    """Sets the norm and the weights.

    Args:
        order: p of the polynomial; 1 needs norm=unit. norm: see the module.
        symmetric: keep products of two entries once, else twice.
        mode: auto keeps moments, for head_dim up to 64 at order 2; quadratic keeps keys and values, which is
            also what it comes to on top of a variant that does.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: mha up to O(s^3) where scores are small; based on the same q and k, at order 2 without norm.
    """
    if order == 1 and norm == "token":
        raise ValueError("norm: order=1 needs unit norms, else 1 + s is negative, got token; set norm=unit")
    moments = mode == "auto" and "scan" in draft.frame.slots
    if moments and order == 2:
        if draft.host["head_dim"] is None:
            draft.head_dim = min(draft.head_dim, WIDEST)
        if draft.head_dim > WIDEST:
            raise ValueError(
                f"head_dim: moments of order 2 take at most {WIDEST}, got {draft.head_dim}; "
                "set mode=quadratic"
            )
    draft.put("refine", L2Norm() if norm == "unit" else TokenNorm(draft.host["norm_eps"]))

    def complete(done: Draft) -> None:
        done.scale = scale = 1.0 if norm == "unit" else done.qk_width**-0.5
        if not moments:
            done.put("normalise", Polynomial(order))
            return
        plain_sum(done)
        shape = (done.o_heads, done.head_dim, done.v_head_dim)
        done.put("scan", Taylor(shape, order, scale, EPS, done.host["chunk_size"], symmetric))

    draft.last(complete)

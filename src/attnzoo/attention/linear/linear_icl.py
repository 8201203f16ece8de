"""The linear self-attention of in-context-learning theory: no feature map, no normaliser, a prefix mean.

One Step of Gradient Descent is Provably the Optimal In-Context Learner with One Layer of Linear
Self-Attention, arXiv 2307.03576.

    o_t = (1 / n_t) sum_(j <= t) (q_t . k_j) v_j,   y = concat(o) W_o
    icl_norm: mean n_t = t, none n_t = 1, const n_t = icl_count

Cached: S (H d d_v) in fp32, whatever the length; the count is the token's place in its document.
With W_K^T W_Q = diag(I, 0) and W_O W_V = eta e e^T on the label slot, a query after n examples reads out one
step of gradient descent on linear regression from zero weights (icl_norm=const, icl_count=n: the query's own
label slot is empty; with a prefix mean the step is eta n / (n + 1)).
Scores are signed and unbounded: the output projection starts small, as everywhere here.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.stages.running import count
from attnzoo.cards import Claim
from attnzoo.registry import Card, register


class Divide(Stage):
    """``o / n``: n the tokens of the document so far, or a constant."""

    rank = 10
    alike = True

    def __init__(self, constant: int | None = None) -> None:
        super().__init__()
        self.constant = constant

    def forward(self, o: Tensor, call: Call) -> Tensor:
        # a count is no whole number in bf16 beyond 256
        wide = o if o.element_size() > 2 else o.float()
        n = self.constant or count(call, wide)[..., None, None]
        return (wide / n).to(o.dtype)

    def elementwise(self) -> dict[str, float]:
        return {"prefix mean": 1.0}


@register(
    Card(
        name="linear_icl",
        title="Linear self-attention of ICL theory",
        paper="One Step of Gradient Descent is Provably the Optimal In-Context Learner with One Layer of "
        "Linear Self-Attention",
        arxiv="2307.03576",
        family="linear",
        summary="No feature map, no normaliser: the mean over the prefix of (q . k) v.",
        cached="the state S (H d d_v): constant in the length",
        claims=(
            Claim(
                "the loss is least where a layer does one (preconditioned) step of gradient descent; "
                "a probe of in-context learning, not a language model",
                where="random linear regressions",
            ),
        ),
        small={"chunk_size": 4},
    ),
    frames=("recurrent",),
)  # fmt: skip
def linear_icl(
    draft: Draft, *, icl_norm: Literal["mean", "none", "const"] = "mean", icl_count: int | None = None
) -> None:
    """Sets the scale and what divides the sum.

    Args:
        icl_norm: divide by the tokens so far, by nothing, or by icl_count.
        icl_count: n of icl_norm=const, at least 1 (default max_seq_len).

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: one step of gradient descent on linear regression, see the module; linear in v and in q.
    """
    if icl_count is not None and icl_norm != "const":
        raise ValueError(f"icl_count: is n of icl_norm=const, got {icl_count} with icl_norm={icl_norm}")
    if icl_count is not None and icl_count < 1:
        raise ValueError(f"icl_count: must be at least 1, got {icl_count}")
    draft.scale = 1.0
    if icl_norm != "none":
        draft.put("combine", Divide((icl_count or draft.site.max_len) if icl_norm == "const" else None))

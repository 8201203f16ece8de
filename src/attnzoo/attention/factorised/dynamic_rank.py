"""Low-rank attention with a rank policy: how many channels of q . k are read is chosen as it trains or runs.

Dynamic Rank Reinforcement Learning for Adaptive Low-Rank Multi-Head Self-Attention in Large Language Models
(DR-RL), arXiv 2512.15973.

    q_h = x A_h, k_g = x B_g (d wide, ordered channels),  v_g = x W_v;  q^r_h, k^r (one head) rotary, d_r wide
    s_ij,h = (sum_(c < r) q_c k_c + q^r . k^r) / sqrt(d + d_r)         the scale does not depend on r
    fixed   r = the largest of ranks
    nested  r from ranks at random, per layer and optimiser step, in training; the largest in evaluation
    energy  the smallest of ranks with sum_(c <= r) sigma_c² >= tau sum sigma_c², sigma of every A_g B_g^T
    rl      a network chooses the rank of a segment from the segment before it; see `rank_policy`

Cached: k up to the largest rank and v, and the rotated k^r. The first segment has the largest rank.
Our choice: nearly everything. The released code decomposes q and k over the whole sequence, future included,
and multiplies full widths; here the factors are the weights'. Under energy and rl every ``refresh`` steps put
the channels in the order of the singular values, which changes no score of full rank (the optimiser's moments
stay in the old order until they have decayed). Query heads of a group are decomposed together.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.factorised.ordered import OrderedFactors, SharedRank, check_ranks, default_ranks
from attnzoo.attention.factorised.rank_policy import SegmentRank
from attnzoo.attention.latent.latent import rotary_width
from attnzoo.attention.score import Single
from attnzoo.cards import Claim
from attnzoo.ops.attention import Keys
from attnzoo.registry import Card, register


class RankedRead(Single):
    """The plain read, which in training also reads all channels to reward the policy.

    Args:
        policy: gives the actions. weight: of its loss.
    """

    unsplit = "one policy measures all heads"

    def __init__(self, policy: SegmentRank, weight: float) -> None:
        super().__init__()
        self.owner, self.weight = (policy,), weight

    def forward(self, q: Tensor, keys: Keys, attend, call: Call) -> Tensor:
        o = attend(q, keys)
        if "rank policy" in call.notes:
            (log_p, change, decided), top = call.notes["rank policy"], self.owner[0].ranks[-1]
            with torch.no_grad():
                all_q = torch.cat([call.notes["all channels"], q[..., top:]], dim=-1)
                whole = attend(all_q, keys)
                alike = F.cosine_similarity(*(z.transpose(1, 2).flatten(2).float() for z in (whole, o)), -1)
                per_key = 2.0 * q.shape[1] * call.notes["ranks"]
                flops = self.owner[0].length * per_key * (call.line.order + 1)
                reward = alike - 0.05e-9 * flops - 0.1 * change
                share = call.mean_over_tokens(decided.float()).clamp(min=1e-9)
                mean = call.mean_over_tokens(torch.where(decided, reward, 0.0)) / share
                reward = torch.where(decided, reward - mean, 0.0)
            loss = -call.mean_over_tokens(torch.where(decided, log_p, 0.0) * reward) / share
            call.aux("dynamic_rank/policy", loss, self.weight)
        return o


@register(
    Card(
        name="dynamic_rank",
        title="Low-rank attention with a rank policy",
        paper="Dynamic Rank Reinforcement Learning for Adaptive Low-Rank Multi-Head Self-Attention in LLMs",
        arxiv="2512.15973",
        family="factorised",
        summary="Queries and keys have ordered channels, and a policy says how many of them are read.",
        cached="k, v and one rotary key: 2 G d + d_r per token",
        adapted="the released code factors the whole sequence; here the segment before sets the rank",
        claims=(
            Claim(
                "about 40 % fewer FLOPs",
                "train_flops",
                "lower",
                "mha",
                "beyond 4096 tokens, not shown by the code",
            ),
            Claim("equal perplexity", "val_bpb", "equal", "mha", "beyond 4096 tokens, not shown by the code"),
        ),
        small={"rank_policy": "rl", "segment_len": 4},
    ),
)
def dynamic_rank(
    draft: Draft,
    *,
    ranks: tuple[int, ...] | None = None,
    rank_policy: Literal["fixed", "nested", "energy", "rl"] = "nested",
    qk_rope_head_dim: int | None = None,
    segment_len: int = 128,
    energy_tau: float = 0.95,
    refresh: int = 100,
    safety: float = 0.5,
    policy_weight: float = 0.1,
) -> None:
    """Sets the projection and the policy.

    Args:
        ranks: to choose from, ascending, each in 1..d; default d / 4 to d in steps of d / 8.
        rank_policy: see the module. qk_rope_head_dim: d_r, even; default half of d; 0 with pos=none.
        segment_len: tokens that share a rank ("rl"), at least 1.
        energy_tau: share of the energy to keep ("energy"), in 0..1.
        refresh: steps between decompositions of the weights ("energy", "rl").
        safety: largest change of A B^T between segments, as a share of its norm ("rl").
        policy_weight: of the policy's loss ("rl").

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: attention with plain and rotary channels where the rank is d; each policy with one rank to the
        fixed one.
    """
    H, d, d_r = draft.num_heads, draft.head_dim, rotary_width(draft, qk_rope_head_dim)
    ranks = default_ranks(d) if ranks is None else ranks
    check_ranks(ranks, d)
    for name, value in (("segment_len", segment_len), ("refresh", refresh)):
        if value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value}")
    for name, value in (("energy_tau", energy_tau), ("safety", safety)):
        if not 0 < value <= 1:
            raise ValueError(f"{name}: must be above 0 and at most 1, got {value}")
    draft.scale, draft.head_dim, draft.rotary = (d + d_r) ** -0.5, ranks[-1], d_r

    def complete(done: Draft) -> None:
        G, d_v = done.num_kv_heads, done.v_head_dim
        if (done.num_heads, done.head_dim) != (H, ranks[-1]):
            done.head_dim, done.rotary, done.scale = ranks[-1], d_r, (d + d_r) ** -0.5
        project = OrderedFactors(done, (done.num_heads, G), (d, d_r, d_v), ranks[-1])
        done.put("project", project)
        if rank_policy in ("energy", "rl") and not isinstance(project.a_proj, nn.Linear):
            raise ValueError(
                f"rank_policy: {rank_policy!r} decomposes matrices of its own layer, got "
                f"{type(project.a_proj).__name__} for them; set rank_policy=nested or fixed"
            )
        if rank_policy == "rl":
            policy = SegmentRank(project, ranks, segment_len, refresh, safety, done.site.max_len)
            done.put("refine", policy)
            done.put("read", RankedRead(policy, policy_weight))
        else:
            done.put("refine", SharedRank(project, rank_policy, ranks, energy_tau, refresh))

    draft.last(complete)
    if rank_policy in ("energy", "rl"):
        draft.very_last(lambda done: _check_measured(done, rank_policy))


def _check_measured(done: Draft, policy: str) -> None:
    """What the policy decomposes must be what scores are made of."""
    others = [type(s).__name__ for s in done.slots["refine"] if s.rank != SharedRank.rank]
    others += ["QKNorm"] if done.host["qk_norm"] else []
    if others:
        raise ValueError(
            f"rank_policy: {policy!r} measures A B^T, which is not what is read after "
            f"{' and '.join(others)}, got {policy!r}; set rank_policy=nested or fixed"
        )

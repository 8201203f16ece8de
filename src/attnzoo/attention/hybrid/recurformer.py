"""RecurFormer: heads that look at nearby tokens only become recurrent heads inside the same layer.

RecurFormer: Not All Transformer Heads Need Self-Attention, arXiv 2410.12850.

    o_h = softmax attention with RoPE                                    h not in R
    o_R = core(x), |R| heads of d channels                               Mamba-1 (paper) or Mamba-2
    y   = concat_h(o) W_o                                                heads in their order

Cached: k (rotated) and v of the other heads, 2 G_rest d per token; the core's state and convolution tail. Our
choice: from scratch R is the last rho H heads (rounded down, so that one head stays attention), and the
default core is Mamba-2 with |R| heads of width d and one group, without an output projection of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from attnzoo.attention.base import Mixer
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.hybrid.selective import default_rank, state_space
from attnzoo.attention.own import Parallel
from attnzoo.cards import Claim
from attnzoo.registry import Card, branch, register


class ByHead(Parallel):
    """Branches whose heads take given places.

    Args:
        places: the head that each head of the branches, one branch after the other, is.
    """

    unsplit = "its heads are of two kinds, which do not divide alike"

    def __init__(self, branches: Sequence[Mixer], places: Sequence[int]) -> None:
        super().__init__(branches)
        self.order = [list(places).index(h) for h in range(len(places))]

    def forward(self, call: Call) -> Tensor:
        o = super().forward(call)
        return o if self.order == sorted(self.order) else o[:, :, self.order]


def recurrent_set(H: int, G: int, fraction: float, heads: tuple[int, ...] | None) -> list[int]:
    """R, in order.

    Raises:
        ValueError: out of range, repeated, or only a part of a key group.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"recurrent_fraction: must be in [0, 1], got {fraction}")
    # 1e-9: 0.3 * 10 is 3
    chosen = list(range(H - int(fraction * H + 1e-9), H)) if heads is None else sorted(heads)
    name, value = ("recurrent_fraction", fraction) if heads is None else ("recurrent_heads", list(heads))
    if len(set(chosen)) < len(chosen) or any(not 0 <= h < H for h in chosen):
        raise ValueError(f"recurrent_heads: must be heads below num_heads={H}, each once, got {value}")
    size = H // G
    if any(chosen.count(h) != chosen.count(h // size * size) for h in range(H)):
        raise ValueError(
            f"{name}: must make whole key groups of {size} heads recurrent, got {value} (heads {chosen}); "
            "change it or num_kv_heads"
        )
    return chosen


@register(
    Card(
        name="recurformer",
        title="RecurFormer",
        paper="RecurFormer: Not All Transformer Heads Need Self-Attention",
        arxiv="2410.12850",
        family="hybrid",
        summary="Some heads of every layer are recurrent, the rest stay attention.",
        cached="k, v of the attention heads; the recurrent heads' state and convolution tail",
        claims=(
            Claim("as good as the original model", where="HashHop, converted"),
            Claim("the cache shrinks with the share of heads", "cache_bytes", "lower", "mha"),
        ),
        small={"recurrent_fraction": 0.5, "state_size": 8, "core": "mamba1"},
    ),
    frames=("own",),
    branches=("score",),
)
def recurformer(
    draft: Draft,
    *,
    num_kv_heads: int | None = None,
    recurrent_fraction: float = 0.5,
    recurrent_heads: tuple[int, ...] | None = None,
    core: Literal["mamba2", "mamba1"] = "mamba2",
    state_size: int | None = None,
    dt_rank: int | None = None,
    conv_kernel: int = 4,
    window: int | None = None,
    n_sink: int = 0,
    pos: Literal["rope", "none"] = "rope",
    rope_theta: float = 10000.0,
    qk_norm: bool = False,
    qkv_bias: bool = False,
) -> None:
    """Sets the attention branch and the recurrent branch.

    Args:
        num_kv_heads: key heads before any are replaced, divides num_heads; default num_heads.
        recurrent_fraction: rho in [0, 1]. recurrent_heads: R itself, instead.
        core: of the recurrent heads. state_size: N, default 64 (mamba1: 16). conv_kernel: taps.
        dt_rank: of mamba1, default D / 16, up.
        window, n_sink, pos, rope_theta, qk_norm, qkv_bias: of the attention heads.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: mha (gqa) with recurrent_fraction = 0; the core and W_o with 1.
    """
    H, d = draft.num_heads, draft.head_dim
    G = H if num_kv_heads is None else num_kv_heads
    if not 1 <= G <= H or H % G:
        raise ValueError(f"num_kv_heads: must divide num_heads={H}, got {G}")
    chosen = recurrent_set(H, G, recurrent_fraction, recurrent_heads)
    rest = [h for h in range(H) if h not in chosen]
    N = {"mamba1": 16, "mamba2": 64}[core] if state_size is None else state_size
    rank = default_rank(draft.dim) if dt_rank is None else dt_rank
    eps, branches = draft.host["norm_eps"], []
    if rest:
        attention = branch(
            draft,
            "score",
            lambda inner: None,
            len(rest),
            head_dim=d,
            num_kv_heads=len(rest) * G // H,
            window=window,
            n_sink=n_sink,
            pos=pos,
            rope_theta=rope_theta,
            qk_norm=qk_norm,
            qkv_bias=qkv_bias,
            norm_eps=eps,
        )
        branches.append(attention)
    if chosen:
        sizes = (len(chosen), d, N, rank, conv_kernel)
        branches.append(state_space(draft, core, *sizes, eps, normed=False, beside=bool(rest)))
    draft.put("core", ByHead(branches, rest + chosen))

"""Hymba: attention heads and state space heads read the same input, and their normed outputs are averaged.

Hymba: A Hybrid-head Architecture for Small Language Models, arXiv 2411.13676.

    q, k (d wide), v (d_v = 2 d wide) = x W;  RoPE;  o_attn: keys in a window of w, and the first M (meta)
    o_ssm: Mamba-1 of inner width D_i = H d_v, RMSNorm on dt, B and C  (`attnzoo.attention.hybrid.selective`)
    y = 1/2 (RMSNorm_1(o_attn) + RMSNorm_2(o_ssm)) W_out                      norms over all D_i channels
    global layers have no window; consecutive window layers share keys and values, those of the group's first

Cached: k (rotated) and v of the last w tokens and the first M, none in layers that borrow; h (D_i N) and the
convolution's tail. Meta tokens are learned inputs before every document: ``create_model(prefix_tokens=M,
num_meta_tokens=M)``. Our choice: w counts the token itself (the released code's test is <= W, w = W + 1).
Global layers by default are the first, the middle and the last; the windows between them share in pairs, the
first of an odd run in three, which is the released model at 32 layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from attnzoo.attention.crosslayer.borrow import share_keys
from attnzoo.attention.draft import Draft
from attnzoo.attention.hybrid.selective import default_rank, state_space
from attnzoo.attention.own import Parallel
from attnzoo.attention.stages.combine import FullNorm
from attnzoo.attention.stages.project import largest_divisor
from attnzoo.cards import Claim
from attnzoo.registry import Card, branch, register


class Mean(Parallel):
    """The mean of the branches' outputs."""

    unsplit = "it is the mean of branches with heads of several kinds"

    def forward(self, call):
        outs = [branch.heads(call) for branch in self.branches]
        return sum(outs[1:], outs[0]) / len(outs)


def middle_and_ends(depth: int) -> tuple[int, ...]:
    """The global layers where none are given."""
    return tuple(sorted({0, max(0, depth // 2 - 1), depth - 1}))


def runs(depth: int, global_layers: Sequence[int]) -> list[list[int]]:
    """The groups of window layers that share keys where none are given."""
    groups, run = [], []
    for layer in (*range(depth), None):
        if layer is not None and layer not in global_layers:
            run.append(layer)
            continue
        first = 3 if len(run) % 2 and len(run) > 1 else 2
        cuts = [0, *range(first, len(run), 2), len(run)] if run else []
        groups += [run[a:b] for a, b in pairwise(cuts) if b - a > 1]
        run = []
    return groups


def check_groups(groups: Sequence[Sequence[int]], global_layers: Sequence[int], depth: int) -> None:
    """Raises ValueError where groups are no disjoint runs of window layers."""
    seen: set[int] = set()
    for group in groups:
        run = list(range(group[0], group[0] + len(group))) if len(group) else []
        if not run or list(group) != run or run[0] < 0 or run[-1] >= depth or seen & set(run):
            raise ValueError(
                f"kv_share_groups: must be runs of consecutive layers below {depth}, no layer twice, got "
                f"{list(group)}"
            )
        if set(run) & set(global_layers):
            raise ValueError(
                f"kv_share_groups: a global layer reads all keys, its neighbours keep a window, got "
                f"{list(group)} with global_layers={list(global_layers)}"
            )
        seen |= set(run)


@register(
    Card(
        name="hymba",
        title="Hymba",
        paper="Hymba: A Hybrid-head Architecture for Small Language Models",
        arxiv="2411.13676",
        family="hybrid",
        summary="Attention heads and state space heads side by side on one input, normed and averaged.",
        cached="k, v of a window and of the meta tokens, none in layers that borrow; scan state and tail",
        claims=(
            Claim("ahead of public models below 2B", where="1.5B"),
            Claim("+1.32 % on average over Llama-3.2-3B, whose cache is 11.67 x as large", where="1.5B"),
        ),
        small={"window": 5, "num_meta_tokens": 2, "global_layers": (), "state_size": 4},
        layers=3,
    ),
    frames=("own",),
    branches=("score",),
)
def hymba(
    draft: Draft,
    *,
    num_kv_heads: int | None = None,
    window: int = 1024,
    num_meta_tokens: int = 0,
    global_layers: tuple[int, ...] | None = None,
    kv_share_groups: tuple[tuple[int, ...], ...] | None = None,
    v_expand: int = 2,
    ssm_core: Literal["mamba1", "mamba2"] = "mamba1",
    state_size: int = 16,
    dt_rank: int | None = None,
    conv_kernel: int = 4,
    pos: Literal["rope", "none"] = "rope",
    rope_theta: float = 10000.0,
    qk_norm: bool = False,
    qkv_bias: bool = False,
) -> None:
    """Sets the two branches and their mean.

    Args:
        num_kv_heads: divides num_heads; default the largest divisor up to num_heads / 4.
        window: keys that a window layer sees, itself included, at least 1.
        num_meta_tokens: M, first tokens of a document that window layers always see; see the module.
        global_layers: layers without a window. kv_share_groups: runs of window layers that share keys.
        v_expand: D_i / D, at least 1.
        ssm_core: state space branch. state_size: N. dt_rank: of mamba1, default D / 16, up.
        conv_kernel: taps.
        pos, rope_theta, qk_norm, qkv_bias: of the attention branch.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: half of one normed branch where the other's norm has no gain; its attention branch is gqa at
        windows >= T.
    """
    layer, depth, H = draft.site.layer, draft.site.depth, draft.num_heads
    for name, value in (("num_meta_tokens", num_meta_tokens + 1), ("v_expand", v_expand), ("window", window)):
        if value < 1:
            least = int(name != "num_meta_tokens")
            raise ValueError(f"{name}: must be at least {least}, got {value - 1 + least}")
    everywhere = middle_and_ends(depth) if global_layers is None else global_layers
    if any(not 0 <= i < depth for i in everywhere):
        raise ValueError(f"global_layers: must be layers below num_layers={depth}, got {list(everywhere)}")
    groups = runs(depth, everywhere) if kv_share_groups is None else kv_share_groups
    check_groups(groups, everywhere, depth)
    source = next((group[0] for group in groups if layer in group), layer)
    width, eps = v_expand * draft.head_dim, draft.host["norm_eps"]
    bounded = layer not in everywhere
    draft.v_head_dim = width
    added = [name for name, *_ in draft.within]

    def attention(inner: Draft) -> None:
        inner.v_head_dim = width
        share_keys(inner, source)
        inner.very_last(norm)

    def norm(inner: Draft) -> None:
        if (inner.o_heads, inner.v_head_dim) != (H, width):
            raise ValueError(
                f"add: two branches of {H} heads, {width} wide, are averaged, got {inner.o_heads} heads, "
                f"{inner.v_head_dim} wide, with {' and '.join(added)}; leave that out"
            )
        inner.put("combine", FullNorm(H, width, eps))

    if num_kv_heads is None:
        num_kv_heads = largest_divisor(H, H // 4)
    heads = branch(
        draft,
        "score",
        attention,
        num_kv_heads=num_kv_heads,
        window=window if bounded else None,
        n_sink=num_meta_tokens if bounded else 0,
        pos=pos,
        rope_theta=rope_theta,
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
        norm_eps=eps,
    )
    rank = default_rank(draft.dim) if dt_rank is None else dt_rank
    ssm = state_space(draft, ssm_core, H, width, state_size, rank, conv_kernel, eps, normed=True)
    draft.put("core", Mean([heads, ssm]))

"""DiffQKV: few key heads, more value heads, and parameters spent on the queries, which are cached nowhere.

Sigma: Differential Rescaling of Query, Key and Value for Efficient Language Models, arXiv 2501.13629.

    q0 = x W_q (H d),  q = (silu(q0 W_gate) * (q0 W_up)) W_down        augmented; q = q0 with aug_dim = 0
    k  = x W_k (G_k heads),  v = x W_v (G_v heads),  RoPE on q and k
    o_h = attend(q_h, k_g, v_g'),  g = floor(h G_k / H),  g' = floor(h G_v / H),  y = concat_h(o) W_o
    key_dim: k = (x W_k) U with W_k to G_k heads of d_k < d and U (d_k x d) the same for all heads

Cached: k (after RoPE) and v, (G_k + G_v) d per token; with key_dim the small keys, (G_k d_k + G_v d), which
are widened and rotated at read. Our choice: U is linear (the paper says a feed-forward layer); by default
G_k is up to H / 8 and G_v up to H / 2, the released model's ratios.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.score import Late
from attnzoo.attention.slots import Slot
from attnzoo.attention.stages.project import QKV
from attnzoo.cards import Claim
from attnzoo.cost import Work
from attnzoo.ops.fused import split_linear, swiglu
from attnzoo.parallel.tensor import Share
from attnzoo.registry import Card, register


class Augment(nn.Module):
    """A SwiGLU on the projected queries, over all heads at once.

    Args:
        width: H d. hidden: inner width.
    """

    def __init__(self, draft: Draft, width: int, hidden: int) -> None:
        super().__init__()
        self.width, self.halves = width, [hidden, hidden]
        self.share: Share | None = None
        self.up = draft.site.weights.linear("q_aug_up", width, 2 * hidden, parts=self.halves)
        self.down = draft.linear("q_aug_down", hidden, width)

    def forward(self, q: Tensor) -> Tensor:
        """``(B, H, T, d)`` -> ``(B, H, T, d)``."""
        flat = q.transpose(1, 2).flatten(2)
        if self.share is None:
            halves = split_linear(self.up, flat, self.halves)
        else:
            halves = self.share.total(self.up(flat)).split(self.halves, dim=-1)
        z = self.down(swiglu(*halves))
        return z.unflatten(-1, (q.shape[1], q.shape[3])).transpose(1, 2)

    def split(self, share: Share, heads: int) -> None:
        """Every rank has all inner channels, and its heads on both sides."""
        d = self.width // heads
        share.columns(self.up, heads, d)
        share.rows(self.down, (heads, d))
        self.width, self.share = share.count(heads) * d, share

    def work(self, length: int) -> Iterable[Work]:
        per = 2 * length * self.width * self.halves[0]
        yield Work("projections", "W_gate, W_up of q", 2 * per)
        yield Work("projections", "W_down of q", per)


class AugmentedQ(QKV):
    """`QKV` whose queries go through an `Augment`."""

    plain_queries = False

    def __init__(self, draft: Draft, hidden: int) -> None:
        H, G, v_heads = draft.num_heads, draft.num_kv_heads, draft.num_v_heads
        sizes = (H, G, draft.head_dim, draft.v_head_dim)
        super().__init__(draft.site, draft.dim, *sizes, draft.host["qkv_bias"], num_v_heads=v_heads)
        self.augment = Augment(draft, H * draft.head_dim, hidden)

    def qkv(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        """As `QKV.qkv`."""
        q, k, v = super().qkv(x, call)
        return self.augment(q), k, v

    def split(self, share: Share) -> None:
        self.augment.split(share, self.heads[0])
        super().split(share)

    def work(self, length: int) -> Iterable[Work]:
        # all heads feed the augmentation, so none of them can rest
        yield from (item._replace(per_head=False) for item in super().work(length))
        yield from self.augment.work(length)


class SmallKeys(Late, Stage):
    """Late projection from rows ``k_small`` (G_k, d_k) and ``v`` (G_v, d).

    Args:
        key_dim: d_k. hidden: inner width of the augmentation, 0 = none.
    """

    def __init__(self, draft: Draft, key_dim: int, hidden: int) -> None:
        super().__init__()
        self.heads = (draft.num_heads, draft.num_kv_heads, draft.num_v_heads)
        self.widths = (draft.head_dim, key_dim, draft.v_head_dim)
        self.sizes = [h * d for h, d in zip(self.heads, self.widths, strict=True)]
        self.dim = draft.dim
        bias = draft.host["qkv_bias"]
        self.qkv_proj = draft.site.weights.linear("qkv", draft.dim, sum(self.sizes), bias, parts=self.sizes)
        self.k_up = draft.linear("k_up", key_dim, draft.head_dim)
        self.augment = Augment(draft, self.sizes[0], hidden) if hidden else None

    def rows(self, x: Tensor, call: Call) -> tuple[Tensor, None, dict[str, Tensor]]:
        """q ``(B, H, T, d)`` and the rows to cache."""
        parts = split_linear(self.qkv_proj, x, self.sizes)
        q, k, v = (z.unflatten(-1, (h, -1)).transpose(1, 2) for z, h in zip(parts, self.heads, strict=True))
        return q if self.augment is None else self.augment(q), None, {"k_small": k, "v": v}

    def keys(self, rows: dict[str, Tensor], call: Call) -> tuple[Tensor, Tensor]:
        """Keys ``(B, G_k, S, d)`` before RoPE, and values."""
        return self.k_up(rows["k_small"]), rows["v"]

    def split(self, share: Share) -> None:
        if self.augment is not None:
            self.augment.split(share, self.heads[0])
        share.rows(self.qkv_proj, *zip(self.heads, self.widths, strict=True))
        share.keep(self.k_up)
        self.heads = tuple(share.count(n) for n in self.heads)
        self.sizes = [n * d for n, d in zip(self.heads, self.widths, strict=True)]

    def memory(self) -> dict[str, Slot]:
        return {name: Slot("rows", (self.heads[i], self.widths[i])) for i, name in ((1, "k_small"), (2, "v"))}

    def work(self, length: int) -> Iterable[Work]:
        per = 2 * length
        yield Work("projections", "W_q", per * self.dim * self.sizes[0], per_head=self.augment is None)
        yield Work("projections", "W_k, W_v", per * self.dim * sum(self.sizes[1:]))
        yield Work("projections", "U", per * self.sizes[1] * self.widths[0])
        if self.augment is not None:
            yield from self.augment.work(length)


@register(
    Card(
        name="diffqkv",
        title="DiffQKV attention",
        paper="Sigma: Differential Rescaling of Query, Key and Value for Efficient Language Models",
        arxiv="2501.13629",
        family="sharing",
        summary="Fewer key heads than value heads, and queries widened by a SwiGLU of their own.",
        cached="k, v: (G_k + G_v) d per token; with key_dim G_k d_k + G_v d",
        claims=(
            Claim(
                "mha 52.40, half the value heads 51.74, half the keys' 52.83",
                where="1B, 100B tokens, mean of 9 tasks",
            ),
            Claim(
                "gqa-16 52.14 -> 53.38 with augmented queries; the same parameters in the MLP 53.26",
                where="1B, 100B tokens, mean of 9 tasks",
            ),
            Claim(
                "up to 33 % faster decoding",
                "decode_ms",
                "lower",
                "gqa",
                "long contexts, 4 key and 16 value heads against 16 of both",
            ),
        ),
        small={"num_key_heads": 1, "num_value_heads": 2, "key_dim": 3},
    ),
    fixed={"num_kv_heads": "keys and values have counts of their own, num_key_heads and num_value_heads"},
)
def diffqkv(
    draft: Draft,
    *,
    num_key_heads: int | None = None,
    num_value_heads: int | None = None,
    aug_dim: int | None = None,
    key_dim: int | None = None,
) -> None:
    """Sets the projection.

    Args:
        num_key_heads, num_value_heads: G_k, G_v; both divide H, and one divides the other.
        aug_dim: inner width of the queries' SwiGLU; default 1.5 D, 0 = none.
        key_dim: d_k in 1..d-1, width of the cached keys; default d, cached after RoPE.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: gqa with aug_dim=0 and G_k = G_v, mha where both are H; the same with key heads repeated.
    """
    draft.check_unbuilt()
    H, width = draft.num_heads, draft.head_dim
    G_k = num_key_heads or _largest(H, max(1, H // 8), num_value_heads or 1)
    G_v = num_value_heads or _largest(H, max(G_k, H // 2), G_k)
    for name, G in (("num_key_heads", num_key_heads), ("num_value_heads", num_value_heads)):
        if G is not None and (G < 1 or H % G):
            raise ValueError(f"{name}: must divide num_heads={H}, got {G}")
    if max(G_k, G_v) % min(G_k, G_v):
        raise ValueError(
            f"num_key_heads: must divide num_value_heads={G_v} or be a multiple of it, got {G_k}"
        )
    hidden = 3 * draft.dim // 2 if aug_dim is None else aug_dim
    if hidden < 0:
        raise ValueError(f"aug_dim: must be at least 0 (0 = none), got {hidden}")
    if key_dim is not None and not 1 <= key_dim < width:
        raise ValueError(f"key_dim: must be in 1..head_dim-1={width - 1}, got {key_dim}; leave it out for d")
    draft.num_kv_heads, draft.num_v_heads = G_k, G_v

    def complete(done: Draft) -> None:
        if (done.num_kv_heads, done.num_v_heads) != (G_k, G_v):
            raise ValueError(
                f"num_kv_heads: keys and values have {G_k} and {G_v} heads here, got {done.num_kv_heads} by "
                "add; leave one out"
            )
        if key_dim is not None:
            done.put("project", SmallKeys(done, key_dim, hidden))
        elif hidden:
            done.put("project", AugmentedQ(done, hidden))

    draft.last(complete)


def _largest(H: int, limit: int, fits: int) -> int:
    """The largest divisor of ``H`` up to ``limit`` that divides ``fits`` or is a multiple of it."""
    return max(g for g in range(1, limit + 1) if H % g == 0 and (g % fits == 0 or fits % g == 0))

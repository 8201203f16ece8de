"""Sparse query attention: fewer query heads at the head width of the full model, so fewer scores.

Sparse Query Attention (SQA): A Computationally Efficient Attention Mechanism with Query Heads Reduction,
arXiv 2510.01817.

    d = D / H,  q = x W_q (H_q heads),  k, v = x W_k, x W_v (G heads),  RoPE on q and k
    G <= H_q: o_h = attend(q_h, k_g, v_g),  g = floor(h G / H_q),   y = concat_h(o) W_o,  W_o (H_q d) x D
    G >  H_q: o_j = attend(q_(j mod H_q), k_j, v_j) for each of the G key heads,  W_o (G d) x D

Named settings, in parts of H (H_q, G):  sqa (1/2, 1/4)   ssqa (1/2, 1/2)   xsqa (1/4, 1/4)   xsmqa (1/4, one)
rsqa (1/4, 1/2).
Cached: k (after RoPE) and v, 2 G d per token. Our choice: without a setting H_q is half of H, rounded down
and at least 1, and G the largest divisor of H_q up to its half; the paper leaves sqa's G < H_q and rsqa's
G > H_q open, and we take a quarter and a half of H.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import Tensor

from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.stages.project import QKV, largest_divisor
from attnzoo.cards import Claim
from attnzoo.cost import Work
from attnzoo.parallel.tensor import CannotSplit, Share
from attnzoo.registry import Card, register

# query and key heads as divisors of H; 0 = one head
SETTINGS = {"sqa": (2, 4), "ssqa": (2, 2), "xsqa": (4, 4), "xsmqa": (4, 0), "rsqa": (4, 2)}


class TiledQueries(QKV):
    """`QKV` of few query heads, repeated in order until there is one for each key head."""

    plain_queries = False

    def __init__(self, tiles: int, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.tiles = tiles

    def qkv(self, x: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().qkv(x, call)
        return q.repeat(1, self.tiles, 1, 1), k, v

    def split(self, share: Share) -> None:
        """Query heads go with the key heads that they are repeated for."""
        queries, *others = self.heads
        keys = share.count(others[0])  # of a rank
        if keys % queries and queries % keys:
            raise CannotSplit(f"{queries} query heads do not repeat in whole for {keys} key heads per rank")
        kept = min(queries, keys)
        first = [share.piece(others[0], rank)[0] * keys for rank in range(share.ranks)]
        of = tuple(head % queries // kept for head in first)
        d, *widths = self.widths
        share.rows(self.qkv_proj, (queries, d, of), *zip(others, widths, strict=True))
        self.heads, self.tiles = (kept, keys, share.count(others[1])), keys // kept
        self.sizes = [n * d for n, d in zip(self.heads, self.widths, strict=True)]

    def work(self, length: int) -> Iterable[Work]:
        # every query is read by several heads, so a router that rests some of them saves none
        for item in super().work(length):
            yield item._replace(per_head=False)


@register(
    Card(
        name="sqa",
        title="Sparse query attention",
        paper="Sparse Query Attention (SQA): A Computationally Efficient Attention Mechanism "
        "with Query Heads Reduction",
        arxiv="2510.01817",
        family="sharing",
        summary="Fewer query heads of the full model's width: scores cost H_q / H.",
        cached="k, v: 2 G d per token",
        claims=(
            Claim("loss 1.227, mha 1.198", "val_bpb", "higher", "mha", "12M dense, 16 heads, D = 256"),
            Claim("loss 1.227, gqa 1.218", "val_bpb", "higher", "gqa", "12M dense, 16 heads, D = 256"),
            Claim("loss 1.227, mqa 1.250", "val_bpb", "lower", "mqa", "12M dense, 16 heads, D = 256"),
            Claim("loss of ssqa 1.220, of xsqa 1.243", where="12M dense, 16 heads, D = 256"),
            Claim(".199 s per step, mha .373", "tokens_per_second", "higher", "mha", "12M dense, 32k tokens"),
            Claim(".199 s per step, gqa .364", "tokens_per_second", "higher", "gqa", "12M dense, 32k tokens"),
        ),
        small={"num_query_heads": 2, "num_kv_heads": 4},
    ),
    frames=("score", "recurrent"),
)
def sqa(
    draft: Draft,
    *,
    setting: Literal["sqa", "ssqa", "xsqa", "xsmqa", "rsqa"] | None = None,
    num_query_heads: int | None = None,
) -> None:
    """Sets the head counts; ``num_heads`` H only says how wide a head is.

    Args:
        setting: a named pair of head counts; ``num_query_heads`` and ``num_kv_heads`` override its parts.
        num_query_heads: H_q in 1..H; must divide G = num_kv_heads or be divided by it.

    Shape: (B, T, D) -> (B, T, D).
    Reduces to: gqa with H_q = H; gqa of H_q heads with head_dim = D / H; a narrower mha with H_q = G.
    """
    draft.check_unbuilt()
    H, given = draft.num_heads, draft.host["num_kv_heads"]
    if setting is not None:
        H_q, G = _parts(setting, H)
    else:
        H_q = max(1, H // 2)
        G = None
    H_q = H_q if num_query_heads is None else num_query_heads
    if not 1 <= H_q <= H:
        raise ValueError(f"num_query_heads: must be in 1..num_heads={H}, got {H_q}")
    G = given or G or largest_divisor(H_q, H_q // 2)
    if H_q % G and G % H_q:
        raise ValueError(
            f"num_query_heads: must divide num_kv_heads={G} or be a multiple of it, got {H_q}; change one"
        )
    draft.num_heads = draft.o_heads = max(H_q, G)
    draft.num_kv_heads = G
    if H_q < G:
        draft.last(lambda done: _tile(done, H_q))


def _parts(setting: str, H: int) -> tuple[int, int]:
    """Query and key heads of a named setting."""
    H_q, G = (H // part if part else 1 for part in SETTINGS[setting])
    if any(part and H % part for part in SETTINGS[setting]):
        raise ValueError(
            f"setting: {setting!r} takes a part 1/{max(SETTINGS[setting])} of the heads, which num_heads={H} "
            "does not have; set num_query_heads and num_kv_heads"
        )
    return H_q, G


def _tile(done: Draft, H_q: int) -> None:
    width = done.project_width or done.head_dim
    tiles, stores, bias = done.num_kv_heads // H_q, "read" in done.frame.slots, done.host["qkv_bias"]
    args = (done.site, done.dim, H_q, done.num_kv_heads, width, done.v_head_dim, bias, stores)
    done.put("project", TiledQueries(tiles, *args, num_v_heads=done.shapes()["v"][0]))

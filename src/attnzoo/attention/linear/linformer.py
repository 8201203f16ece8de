"""Linformer: keys and values projected along the sequence to k slots, in two forms that see no future.

Linformer: Self-Attention with Linear Complexity, arXiv 2006.04768. Bidirectional, as published:

    K~ = E^T K,  V~ = F^T V,   o_i = softmax_m(q_i . K~_m / sqrt(d)) V~          E, F: T_max x k, all heads

Every slot mixes all positions, so that masking slots cannot make it causal. Our choice, two causal forms:

    prefix:  K~^(i) = sum_(j <= i) E_j k_j^T,  V~^(i) = sum_(j <= i) F_j v_j^T,  o_i as above: the last row is
             the published one. Two scans with a softmax between them.
    blocks:  each finished block of B tokens is r = k B / T_max landmarks E_B^T K, F_B^T V; a query reads, in
             one softmax, the landmarks of finished blocks and its own block's past.

Cached: prefix K~, V~ (2 H k d) in fp32; blocks r landmarks per finished block, the last B keys and values.
E, F are indexed by place in the document, which T_max = max_seq_len bounds in the prefix form. Its early
positions see nearly empty slots; a first token to start from helps. With E one-hot at k = T it is mha over
zero-padded future keys, which score 0: not causal mha.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from attnzoo.attention.base import Choices, Stage
from attnzoo.attention.call import Call
from attnzoo.attention.draft import Draft
from attnzoo.attention.implementation import choose_scan
from attnzoo.attention.linear.linear import plain_sum
from attnzoo.attention.linear.slots import two_scans
from attnzoo.attention.recurrent import Terms, scanned
from attnzoo.attention.score import Single
from attnzoo.attention.site import Site
from attnzoo.attention.slots import Slot
from attnzoo.attention.stages.mask import Blocks, Causal, Mask, Static
from attnzoo.cards import Claim
from attnzoo.cost import Work
from attnzoo.ops.attention import Keys, computed_pairs
from attnzoo.parallel.tensor import Share
from attnzoo.registry import Card, register
from attnzoo_kernels.scan import scan_flops


class Slots(nn.Module):
    """E and F ``(length, k)``, or one matrix for both."""

    def __init__(self, length: int, k: int, shared: bool) -> None:
        super().__init__()
        bound = 1 / math.sqrt(k)
        self.E = nn.Parameter(torch.empty(length, k).uniform_(-bound, bound))
        self.F = None if shared else nn.Parameter(torch.empty(length, k).uniform_(-bound, bound))

    def both(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        E = self.E.to(dtype)
        return E, E if self.F is None else self.F.to(dtype)


class TwoPass(Stage):
    """Scan stage of the prefix form: slots of keys, a softmax over them, slots of values."""

    def __init__(self, slots: Slots, shape: tuple[int, int, int], chunk_size: int, scale: float) -> None:
        super().__init__()
        if chunk_size < 1:
            raise ValueError(f"chunk_size: must be at least 1, got {chunk_size}")
        self.slots, self.shape, self.chunk_size, self.scale = slots, shape, chunk_size, scale
        self.k = slots.E.shape[1]

    def choose(self, asked: str) -> Choices:
        return choose_scan(asked, max(self.shape[1], self.k))

    def split(self, share: Share) -> None:
        self.shape = (share.count(self.shape[0]), *self.shape[1:])
        share.keep(self)

    def memory(self) -> dict[str, Slot]:
        heads, width, v_width = self.shape
        return {"K": Slot("state", (heads, width, self.k)), "V": Slot("state", (heads, self.k, v_width))}

    def forward(self, terms: Terms, call: Call) -> Tensor:
        q, k, v = terms[:3]
        place = call.line.place(len(self.slots.E), "max_seq_len")
        wide = torch.float64 if v.dtype == torch.float64 else torch.float32
        E, F = (z[place] for z in self.slots.both(wide))
        if v.is_cpu and call.mem.alone and len(place) == 1 and place.shape[1] > 1:
            return two_scans(q, k, v, E[0], F[0], self.scale, self.chunk_size)
        E, F = (z[:, :, None].expand(*v.shape[:3], -1) for z in (E, F))
        scores = scanned(Terms(q, k, E), "K", call, self.scale, self.chunk_size)
        return scanned(Terms(scores.softmax(-1), F, v), "V", call, 1.0, self.chunk_size)

    def work(self, length: int) -> Iterable[Work]:
        heads, width, v_width = self.shape
        for name, sizes in (("slots of keys", (width, self.k)), ("slots of values", (self.k, v_width))):
            flops = scan_flops("scalar", length, heads, *sizes, self.chunk_size)
            yield Work("mixing", name, *flops, "later tokens of a chunk", per_head=True)


@dataclass(frozen=True)
class Finished(Mask):
    """Blocks of ``size`` tokens, standing at their last one, that ended before the query's began."""

    size: int
    causal = True

    def rule(self, q: Tensor, k: Tensor) -> Tensor:
        return k // self.size < q // self.size


class Landmarks(Single):
    """Read stage of the blocks form: landmarks of finished blocks and the own block, in one softmax.

    Args:
        shapes: (heads, width) of q, k and v. size: tokens per block B.
    """

    counts = True
    whole = True
    plain = False

    def __init__(self, slots: Slots, shapes: dict[str, tuple[int, int]], size: int) -> None:
        super().__init__()
        self.slots, self.shapes, self.size = slots, shapes, size
        self.r = slots.E.shape[1]

    def split(self, share: Share) -> None:
        self.shapes = share.shapes(self.shapes)
        share.keep(self)

    def memory(self) -> dict[str, Slot]:
        shapes = ((name, *self.shapes[name]) for name in "kv")
        return {f"{n}_marks": Slot("blocks", (heads, self.r * d), self.size) for n, heads, d in shapes}

    def forward(self, q: Tensor, keys: Keys, attend, call: Call) -> Tensor:
        marks = self._marks(keys, q.shape[2], call)
        if marks.k.shape[2] == 0:
            return attend(q, keys)
        own, near = attend(q, keys, also=("lse",))
        far_o, far = attend(q, (marks, Finished(self.size)), also=("lse",))
        # the softmax over both sets from that over each; queries without landmarks have far = -inf
        share = torch.sigmoid(far["lse"] - near["lse"].clamp(min=-1e30))[..., None].to(own.dtype)
        return own + share * (far_o - own)

    def _marks(self, keys: Keys, new: int, call: Call) -> Keys:
        """Landmarks of all finished blocks of the document."""
        sets = []
        for name, z, E in zip(("k_marks", "v_marks"), keys[:2], self.slots.both(keys.v.dtype), strict=True):
            ended = E.T @ self._blocks(z, new, call)  # (B, G, M, r, width)
            kept = call.mem.ended(name, ended.flatten(3), self.size)
            sets.append(kept.unflatten(-1, ended.shape[3:]).flatten(2, 3))
        axis = call.mem.ended_axis(self.size)
        doc = None if axis.doc is None else axis.doc.repeat_interleave(self.r, dim=1)
        spread = axis._replace(order=axis.order.repeat_interleave(self.r, dim=1), doc=doc)
        return Keys(*sets, spread._replace(tag=("marks", self.r, axis.tag)), aligned=False)

    def _blocks(self, z: Tensor, new: int, call: Call) -> Tensor:
        """``(B, G, M, size, width)`` rows of the blocks that end in this forward."""
        size, line, S = self.size, call.line, z.shape[2]
        if line.doc is None and line.past == 0:
            return z[:, :, : S // size * size].unflatten(2, (S // size, size))
        ends, _ = call.mem.block_ends(size)
        back = torch.arange(1 - size, 1, device=z.device)
        step = ends[..., None] + back  # (B or 1, M, size) among the new tokens, below 0 in the ring
        order = line.order.gather(1, ends.expand(line.order.shape[0], -1))[..., None] + back
        fresh = step >= 0 if new > 1 or call.mem.cache is None else torch.zeros_like(step, dtype=torch.bool)
        index = torch.where(fresh, S - new + step, order % size).clamp(0, S - 1).flatten(1)
        index = index.expand(z.shape[0], -1)[:, None, :, None].expand(-1, z.shape[1], -1, z.shape[3])
        return z.gather(2, index).unflatten(2, (ends.shape[1], size))

    def work(self, length: int) -> Iterable[Work]:
        (heads, width), (groups, _), (_, v_width) = (self.shapes[name] for name in "qkv")
        pair, own = 2 * heads * (width + v_width), Causal() & Blocks(self.size)
        count = length // self.size
        rest = length - count * self.size
        making = 2 * count * self.size * self.r * groups * (width + v_width)
        far = self.r * (self.size * count * (count - 1) // 2 + rest * count)
        near = pair * own.pairs(length), pair * computed_pairs(own, length, "reference")
        yield Work("mixing", "landmarks", making)
        yield Work("mixing", "own block", *near, "hidden keys of a tile", per_head=True)
        dense = pair * length * count * self.r
        yield Work("mixing", "finished blocks", pair * far, dense, "later blocks", per_head=True)


def _frame(site: Site, mode: str = "prefix", **_: object) -> str:
    return "score" if mode == "blocks" else "recurrent"


@register(
    Card(
        name="linformer",
        title="Linformer, causal",
        paper="Linformer: Self-Attention with Linear Complexity",
        arxiv="2006.04768",
        family="linear",
        summary="Keys and values projected along the sequence to k slots, in two forms that see no future.",
        cached="prefix: slots of keys and values (2 H k d), constant; blocks: landmarks and the last block",
        adapted="the paper's slots mix all positions; here sums so far, or landmarks of finished blocks",
        claims=(Claim("on par with BERT; up to 20 times faster at n = 64k", where="masked model, k = 256"),),
        small={"k": 6, "max_seq_len": 160, "chunk_size": 4, "share_kv_proj": True},
    ),
    frames=("recurrent", "score"),
    fixed={
        "window": "a landmark mixes its whole block, of which no window hides a part; set block_size",
        "n_sink": "there is no window that sinks could extend",
    },
    choose=_frame,
)
def linformer(
    draft: Draft,
    *,
    k: int = 256,
    mode: Literal["prefix", "blocks"] = "prefix",
    block_size: int = 64,
    share_kv_proj: bool = False,
    share_layers: bool = False,
) -> None:
    """Sets the two passes, or the landmarks.

    Args:
        k: slots, at least 1. mode: see the module. block_size: B of blocks, which has
            r = k B / max_seq_len landmarks per block, from 1 to B.
        share_kv_proj: E = F. share_layers: the same E, F in all layers of a model.

    Shape: (B, T, D) -> (B, T, D); in the prefix form documents up to max_seq_len.
    Reduces to: mha where blocks have r = B landmarks and E_B = F_B = I; the published layer in the last row
        of prefix.
    """
    for name, value in (("k", k), ("block_size", block_size)):
        if value < 1:
            raise ValueError(f"{name}: must be at least 1, got {value}")
    if mode == "prefix" and "scan" not in draft.frame.slots:
        raise ValueError("mode: prefix needs states, the mixer here keeps keys, got prefix; set mode=blocks")
    site = draft.site
    rows, slots = site.max_len, k
    if mode == "blocks":
        rows, slots = block_size, min(block_size, max(1, round(k * block_size / site.max_len)))

    make = partial(Slots, rows, slots, share_kv_proj)
    maps = site.shared("linformer", make) if share_layers else make()

    def complete(done: Draft) -> None:
        if mode == "blocks":
            done.put("mask", Static(Causal() & Blocks(block_size)))
            wide = done.qk_width + getattr(done.slots.get("position"), "appended", 0)
            shapes = {name: (heads, d if name == "v" else wide) for name, (heads, d) in done.shapes().items()}
            done.put("read", Landmarks(maps, shapes, block_size))
            return
        plain_sum(done)
        shape = (done.o_heads, done.head_dim, done.v_head_dim)
        scale = done.head_dim**-0.5 if done.scale is None else done.scale
        done.put("scan", TwoPass(maps, shape, done.host["chunk_size"], scale))

    draft.last(complete)

"""One softmax over the ends of chunks of tokens and each query's own key."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from attnzoo.attention.call import Call
from attnzoo.attention.score import Single
from attnzoo.attention.stages.mask import Causal, Mask
from attnzoo.attention.timeline import EVERY, Axis
from attnzoo.cost import Work
from attnzoo.ops.attention import Keys, whole
from attnzoo.parallel.tensor import Share


@dataclass(frozen=True)
class ChunkEnds(Mask):
    """The query's own place, and earlier ones that end a chunk of ``size``, of those that ``near`` shows."""

    size: int
    near: Mask
    causal = True

    def rule(self, q: Tensor, k: Tensor) -> Tensor:
        return ((k == q) | ((k < q) & ((k + 1) % self.size == 0))) & self.near.rule(q, k)


@dataclass(frozen=True)
class Finished(Mask):
    """Earlier keys that ``near`` shows, and the key at place -1, which stands for the query's own."""

    near: Mask
    causal = True

    def rule(self, q: Tensor, k: Tensor) -> Tensor:
        return (k < 0) | ((k < q) & self.near.rule(q, k))


class ChunkRead(Single):
    """Reads the ends of chunks of ``rate`` tokens, and each query's own key, in one softmax.

    Args:
        sizes: heads, widths of q and v, and how many channels of q carry a bias of the position stage.
    """

    counts = True

    def __init__(self, rate: int, near: Mask, sizes: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.rate, self.near, self.sizes = rate, near, sizes

    def split(self, share: Share) -> None:
        self.sizes = (share.count(self.sizes[0]), *self.sizes[1:])

    def forward(self, q: Tensor, keys: Keys, attend, call: Call) -> Tensor:
        T, axis = q.shape[2], keys.axis
        if T == 1:  # every row is a finished chunk, or the token's own
            seen = (keys, Causal()) if axis.doc is None and self.near == Causal() else keys
            return attend(q, seen)
        keys = whole(keys)
        k, v = keys.k[:, :, -T:], keys.v[:, :, -T:]
        # the own score in two channels: one would round it in low precision
        score = (wide(q) * wide(_shared(k, q))).sum(-1, keepdim=True)
        high = score.to(v.dtype).to(score.dtype)
        q = torch.cat([q, high.to(q.dtype), (score - high).to(q.dtype)], dim=-1)
        o = attend(q, (self._ends(keys, T, call), Finished(self.near)))
        return o[..., :-1] + o[..., -1:] * _shared(v, q)

    def _ends(self, keys: Keys, length: int, call: Call) -> Keys:
        """The key for the own one, then cached chunks, then those that end in this forward."""
        had, (place, _) = keys.k.shape[2] - length, call.mem.block_ends(self.rate)
        cached = torch.arange(had, device=place.device).expand(len(place), -1)
        index = torch.cat([cached, had + place], dim=1)
        k, v = F.pad(_taken(keys.k, index), (0, 2, 1, 0)), F.pad(_taken(keys.v, index), (0, 1, 1, 0))
        k[:, :, 0, -2:] = 1
        v[:, :, 0, -1:] = 1
        axis = call.mem.ended_axis(self.rate)
        doc = None if axis.doc is None else F.pad(axis.doc, (1, 0), value=EVERY)
        return Keys(k, v, Axis(F.pad(axis.order, (1, 0), value=-1), doc, ("own", *axis.tag)), aligned=False)

    def work(self, length: int) -> Iterable[Work]:
        heads, width, v_width, appended = self.sizes
        visible = ChunkEnds(self.rate, self.near).pairs(length)
        computed = 2 * heads * (width + appended + v_width)
        if length > 1:
            computed = (computed + 2 * heads * 3) * length * (1 + length // self.rate)
        why = "hidden chunks, and channels for the own key"
        yield Work(
            "mixing", "attention", 2 * heads * (width + v_width) * visible, computed, why, per_head=True
        )

    def elementwise(self) -> dict[str, float]:
        heads, width, v_width, _ = self.sizes
        return {"own key": 2.0 * heads * (width + v_width)}


def _shared(z: Tensor, q: Tensor) -> Tensor:
    """``(B, G, T, d)`` as the query heads see it."""
    groups = q.shape[1] // z.shape[1]
    return z if groups == 1 else z.repeat_interleave(groups, dim=1)


def _taken(z: Tensor, index: Tensor) -> Tensor:
    """The keys ``index`` ``(B or 1, N)`` of ``(B, G, S, d)``."""
    if len(index) == 1:
        return z[:, :, index[0]]
    return z.gather(2, index[:, None, :, None].expand(-1, z.shape[1], -1, z.shape[3]))


def wide(z: Tensor) -> Tensor:
    """In at least fp32."""
    return z if z.dtype == torch.float64 else z.float()

"""The memory of a focused transformer while it reads: keys before the local context, as if at its start.

near = keys less than W tokens back, positions as always;  far = those before, seen from W - 1 tokens away
o_i = softmax over near and far together, or over near and the K far keys of the highest scores
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnzoo.attention.call import Call
from attnzoo.attention.stages.mask import Mask, Window
from attnzoo.attention.stages.position import NoPosition
from attnzoo.cost import Work
from attnzoo.ops.attention import Keys, computed_pairs
from attnzoo_kernels.rows import by_rows


@dataclass(frozen=True)
class Beyond(Mask):
    """Keys of ``own`` at least ``size`` tokens back."""

    own: Mask
    size: int
    causal = True

    def rule(self, q: Tensor, k: Tensor) -> Tensor:
        return self.own.rule(q, k) & (q - k >= self.size)


class FarMemory(nn.Module):
    """See the module.

    Args:
        size: W. most: K, None = all. mask: of the host. position: rotates keys. scale: of the scores.
        sizes: heads with scores, widths of their keys and values, for the cost.
    """

    def __init__(
        self,
        size: int,
        most: int | None,
        mask: Mask,
        position: NoPosition,
        scale: float,
        sizes: tuple[int, int, int],
    ) -> None:
        super().__init__()
        self.size, self.most, self.mask, self.scale, self.sizes = size, most, mask, scale, sizes
        self.near, self.far, self.position = mask & Window(size), Beyond(mask, size), position

    def forward(self, q: Tensor, keys: Keys, attend, call: Call) -> Tensor:
        # read in every forward: what a cache holds of positions must not have gaps
        places = call.mem.places() if self.position.rotates else None
        if keys.k.shape[2] <= self.size:
            return attend(q, keys)
        near, more = attend(q, (keys, self.near), also=("lse",))
        far, lse = self._far(keys, places, call)
        # the softmax over both from that over each; queries without far keys have lse = -inf
        share = torch.sigmoid(lse - more["lse"][..., None])
        return near + share.to(near.dtype) * (far - near)

    def _far(self, keys: Keys, places: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
        """``(B, H, T, d_v)`` what queries read of far keys, and the logarithm of their weights' sum."""
        q, k = call.raw.q, keys.k
        if places is not None:  # back to position 0, and all of them W - 1 before the query
            k = self.position.turn(k, -places, call)
            q = self.position.turn(q, torch.full_like(call.line.order, self.size - 1), call)
        wide = torch.promote_types(q.dtype, torch.float32)
        q, H = q.to(wide) * self.scale, q.shape[1]
        k, v = (self._heads(z.to(wide), table, H) for z, table in ((k, keys.k_map), (keys.v, keys.v_map)))
        seen = self.far.visible(call.query, keys.axis)[:, None]

        def run(rows: slice) -> tuple[Tensor, Tensor]:
            s = (q[:, :, rows] @ k.mT).masked_fill(~seen[:, :, rows], -torch.inf)
            if self.most is not None and self.most < s.shape[-1]:
                s = s.masked_fill(s < s.topk(self.most, dim=-1).values[..., -1:], -torch.inf)
            lse = s.logsumexp(-1, keepdim=True)
            # rows without far keys: exp(-inf - 0) in place of exp(-inf + inf)
            p = (s - lse.masked_fill(lse == -torch.inf, 0.0)).exp()
            return p @ v, lse

        with torch.autocast(v.device.type, enabled=False):
            return tuple(by_rows(run, q.shape[2], k.shape[2]))

    @staticmethod
    def _heads(z: Tensor, table: Tensor | None, heads: int) -> Tensor:
        if table is not None:
            return z[:, table]
        return z if z.shape[1] == heads else z.repeat_interleave(heads // z.shape[1], dim=1)

    def work(self, length: int) -> Iterable[Work]:
        heads, width, v_width = self.sizes
        per_pair, why = 2 * heads * (width + v_width), "hidden keys of a tile"
        near = self.near if length > self.size else self.mask
        runs = per_pair * computed_pairs(near, length, "reference")
        yield Work("mixing", "local context", per_pair * near.pairs(length), runs, why, per_head=True)
        if length <= self.size:
            return
        scored = self.far.pairs(length)
        read = min(scored, sum(min(self.most or n, n) for n in range(length - self.size + 1)))
        needed = 2 * heads * (scored * width + read * v_width)
        yield Work("mixing", "memory", needed, per_pair * length**2, "near and left out keys", per_head=True)

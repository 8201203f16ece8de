"""From per-head outputs back to the stream."""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.site import Site
from attnzoo.cost import Work
from attnzoo.ops.fused import linear
from attnzoo.parallel.tensor import Share


class LinearOut(Stage):
    """``concat_h(o) W_o``."""

    def __init__(self, site: Site, num_heads: int, width: int, dim: int, bias: bool = False) -> None:
        super().__init__()
        self.sizes, self.width = (num_heads * width, dim), width
        self.share: Share | None = None
        self.out_proj = site.weights.linear("out", *self.sizes, bias, std=site.out_std)

    def forward(self, o: Tensor, call: Call) -> Tensor:
        if self.share is None or self.out_proj.bias is None:
            return linear(self.out_proj, o.flatten(2))
        return F.linear(o.flatten(2), self.out_proj.weight, self.share.bias(self.out_proj))

    def split(self, share: Share) -> None:
        share.columns(self.out_proj, self.sizes[0] // self.width, self.width)
        self.sizes, self.share = (self.out_proj.in_features, self.sizes[1]), share

    def work(self, length: int) -> Iterable[Work]:
        yield Work("projections", "W_o", 2 * length * self.sizes[0] * self.sizes[1], per_head=True)

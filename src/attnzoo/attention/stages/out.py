"""From per-head outputs back to the stream."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from attnzoo.attention.base import Stage
from attnzoo.attention.call import Call
from attnzoo.attention.site import Site
from attnzoo.cost import Work
from attnzoo.ops.fused import linear


class LinearOut(Stage):
    """``concat_h(o) W_o``."""

    def __init__(self, site: Site, num_heads: int, width: int, dim: int, bias: bool = False) -> None:
        super().__init__()
        self.sizes = (num_heads * width, dim)
        self.out_proj = site.weights.linear("out", *self.sizes, bias, std=site.out_std)

    def forward(self, o: Tensor, call: Call) -> Tensor:
        return linear(self.out_proj, o.flatten(2))

    def work(self, length: int) -> Iterable[Work]:
        yield Work("projections", "W_o", 2 * length * self.sizes[0] * self.sizes[1], per_head=True)

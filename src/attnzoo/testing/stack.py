"""Several layers under the contract of one: what spans layers is tested by the same properties."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm

from attnzoo import registry
from attnzoo.attention import timeline
from attnzoo.attention.timeline import Clock
from attnzoo.context import Context
from attnzoo.cost import Cost, add_costs
from attnzoo.model.backbone import ModelCache
from attnzoo.model.layout import check_layers


class Stack(nn.Module):
    """``depth`` layers of one variant, each adding to the stream: ``h + mixer(norm(h))``, norm without gain.

    It takes and gives what a `Mixer` does: ``(B, T, D) -> (B, T, D)``, a cache, a cost.
    """

    def __init__(self, name: str, depth: int, dim: int, num_heads: int, **options: Any) -> None:
        super().__init__()
        place, bank = {"num_layers": depth} | options, {}
        self.mixers = nn.ModuleList(
            registry.build(name, dim, num_heads, place | {"layer_idx": i}, bank) for i in range(depth)
        )
        check_layers(self.mixers)

    def forward(self, x: Tensor, ctx: Context | None = None, cache: ModelCache | None = None) -> Tensor:
        """See `Mixer.forward`."""
        ctx = ctx or Context()
        if x.dim() != 3 or x.shape[-1] != self.mixers[0].dim or x.shape[1] == 0:
            raise ValueError(f"x: must be (B, T, {self.mixers[0].dim}), got {tuple(x.shape)}")
        line = timeline.read(ctx, *x.shape[:2], x.device, cache.clock if cache else None)
        h = line.compact(x)
        for i, mixer in enumerate(self.mixers):
            h = h + mixer(
                rms_norm(h, h.shape[-1:], eps=1e-6), ctx.at(h, line), cache.layers[i] if cache else None
            )
        line.advance()
        return line.restore(h)

    def new_cache(self, batch_size: int, max_len: int, dtype: torch.dtype | None = None) -> ModelCache:
        """See `Mixer.new_cache`."""
        clock = Clock()
        return ModelCache([m.new_cache(batch_size, max_len, dtype, clock=clock) for m in self.mixers], clock)

    def cost(self, seq_len: int, dtype: torch.dtype = torch.bfloat16) -> Cost:
        """See `Mixer.cost`."""
        params = sum(p.numel() for p in self.parameters())
        return add_costs((m.cost(seq_len, dtype) for m in self.mixers), {}, params)

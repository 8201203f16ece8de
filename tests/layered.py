"""Several layers of one variant, each, run on inputs of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnzoo import Context, registry
from attnzoo.attention.base import Mixer
from tiny import D, H


def build_layers(name: str, depth: int, dim: int = D, heads: int = H, **options: Any) -> list[Mixer]:
    bank: dict[str, Any] = {}
    place = {"num_layers": depth}
    made = [registry.build(name, dim, heads, place | options | {"layer_idx": i}, bank) for i in range(depth)]
    return [mixer.double() for mixer in made]


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 1e-9 * theirs.abs().max()


def scattered(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for param in module.parameters():
            param.add_(0.3 * torch.randn_like(param))
    return module


def run(mixers: list[Mixer], xs: list[Tensor]) -> list[Tensor]:
    """Each layer on an input of its own, in one Context."""
    ctx = Context()
    return [mixer(x, ctx) for mixer, x in zip(mixers, xs, strict=True)]


def run_cached(mixers: list[Mixer], xs: list[Tensor], prefill: int = 9) -> list[Tensor]:
    caches = [mixer.new_cache(*xs[0].shape[:2]) for mixer in mixers]
    cuts = [slice(0, prefill), *(slice(t, t + 1) for t in range(prefill, xs[0].shape[1]))]
    parts = []
    for cut in cuts:
        ctx = Context()
        parts.append([m(x[:, cut], ctx, cache) for m, x, cache in zip(mixers, xs, caches, strict=True)])
    return [torch.cat(outs, dim=1) for outs in zip(*parts, strict=True)]


def check_layers(mixers: list[Mixer], xs: list[Tensor], ys: list[Tensor]) -> None:
    for found in (run(mixers, xs), run_cached(mixers, xs)):
        for ours, theirs in zip(found, ys, strict=True):
            close(ours, theirs)

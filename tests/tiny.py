"""Mixers small enough for exact comparisons, in fp64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import attnzoo
from attnzoo.attention.base import Mixer

D, H, T, d = 16, 4, 9, 4


def build(name: str, **options: Any) -> Mixer:
    """A mixer whose matrices are large enough for weights far from uniform."""
    mixer = attnzoo.create(name, D, H, **options).double().requires_grad_(False)
    for module in mixer.modules():
        if isinstance(module, nn.Linear):
            module.weight.mul_(20)
    return mixer


def tokens(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, T, D)), dtype=torch.float64)


def same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def with_weights_of(source: Mixer, target: Mixer) -> Mixer:
    """``target`` with the weights that ``source`` has too: at least the projections."""
    fit = {name: value for name, value in source.state_dict().items() if name in target.state_dict()}
    assert {"project", "out"} <= {name.split(".")[0] for name in fit}
    target.load_state_dict(target.state_dict() | fit)
    return target


def projections(mixer: Mixer, *heads: int) -> list[Tensor]:
    """The fused projection as matrices ``(heads, d, D)`` for q, k and v."""
    parts = mixer.project.qkv_proj.weight.split([n * d for n in heads])
    return [part.reshape(n, d, D) for part, n in zip(parts, heads, strict=True)]

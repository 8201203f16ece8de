"""What the properties are tested on: a way to build one mixer, and inputs that make its mechanism show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnzoo import registry
from attnzoo.attention.base import Mixer
from attnzoo.registry import Card
from attnzoo.testing.stack import Stack

BATCH, LENGTH, DIM, HEADS = 2, 21, 32, 4


@dataclass(frozen=True)
class Subject:
    """A mixer under test.

    Args:
        make: ``make(dim, num_heads, **options) -> Mixer``.
        card: its card; traits, ``no_grad`` and ``small`` are read.
        options: given to ``make`` on top.
    """

    make: Callable[..., Mixer]
    card: Card
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, layers: int = 1, **options: Any) -> Subject:
        """The registered variant ``name``, or the composition that the option ``add`` makes of it; a stack of
        ``layers`` of them where that is more than 1.
        """

        def make(dim: int, num_heads: int, **more: Any) -> Mixer | Stack:
            if layers > 1:
                return Stack(name, layers, dim, num_heads, **more)
            return registry.create(name, dim, num_heads, **more)

        return cls(make, registry.card(name, options.get("add", ())), options)

    @classmethod
    def cases(cls, name: str) -> dict[str, Subject]:
        """What the suite tests of a variant: its defaults, its card's small options, its stack."""
        card = registry.card(name)
        found = {name: cls.of(name)}
        if card.small:
            found[f"{name}-small"] = cls.of(name, **card.small)
        if card.layers > 1:
            found[f"{name}-stack"] = cls.of(name, card.layers, **card.small)
        return found

    def mixer(self, dtype: torch.dtype = torch.float64, seed: int = 0, **more: Any) -> Mixer | Stack:
        """A mixer with scattered parameters: starts near zero or the identity would hide mistakes."""
        torch.manual_seed(seed)
        mixer = self.make(DIM, HEADS, **{**self.options, **more})
        with torch.no_grad():
            for param in mixer.parameters():
                special = param.dim() < 2 or getattr(param, "no_reinit", False)
                noise = torch.randn_like(param)
                param.copy_(param + 0.1 * noise if special else noise / param.shape[-1] ** 0.5)
        return mixer.to(dtype)

    def has(self, trait: str) -> bool:
        return self.card.traits.get(trait, True)

    @property
    def takes(self) -> set[str]:
        """Names of its options."""
        return set(self.card.defaults)


def inputs(
    seed: int = 1, batch: int = BATCH, length: int = LENGTH, dtype: torch.dtype = torch.float64
) -> Tensor:
    """``(B, T, D)`` standard normal."""
    return torch.randn(
        batch, length, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def gap(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the size of ``b``; infinite where either is not finite."""
    if a.shape != b.shape:
        raise AssertionError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    if a.numel() == 0:
        return 0.0
    if not (a.isfinite().all() and b.isfinite().all()):
        return float("inf")
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-30))


def require(holds: bool, message: str) -> None:
    """`assert` that survives ``python -O``: the suite is a public function."""
    if not holds:
        raise AssertionError(message)

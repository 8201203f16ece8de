"""Where the parameters of RWKV-7 start: functions of channel, layer and depth, as in the released code."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attnzoo.attention.site import Site, flag

# exponents of the blends with the previous token
BLEND = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}


class Start:
    """Starting values of one layer.

    Args:
        site: layer n of L. dim: D; width: of a head.
    """

    def __init__(self, site: Site, dim: int, width: int) -> None:
        self.site, self.dim = site, dim
        self.rest = 1 - site.layer / site.depth
        self.done = site.layer / (site.depth - 1) if site.depth > 1 else 0.0
        channel = torch.arange(dim, dtype=torch.float32)
        self.share, self.ramp = channel / dim, channel / max(dim - 1, 1)
        half = max((width - 1) / 2, 0.5)
        z = (channel % width - (width - 1) / 2) / half
        self.zigzag = z * z.abs()

    def mixes(self, names: tuple[str, ...]) -> Tensor:
        """``(6, D)`` shares of the previous token."""
        return torch.stack([1 - self.share ** (BLEND[name] * self.rest) for name in names])

    def decay_bias(self) -> Tensor:
        return -5.5 + 6 * self.ramp ** (1 + self.done**0.3) + 2.5 * self.zigzag

    def rate_bias(self) -> Tensor:
        return -0.19 + 0.3 * self.zigzag + 0.4 * (self.ramp - 0.5)

    def value_bias(self) -> Tensor:
        return 0.73 - 0.4 * (self.ramp - 0.5)

    def removal(self) -> Tensor:
        return 0.71 - 0.1 * (self.ramp - 0.5)

    def norm_gain(self) -> float:
        return ((self.site.layer + 1) / self.site.depth) ** 0.7

    def param(self, value: Tensor, lr_scale: float = 1.0) -> nn.Parameter:
        """A vector: never decayed, never started anew."""
        return flag(nn.Parameter(value), decay=False, lr_scale=lr_scale, reinit=False)

    def linear(self, name: str) -> nn.Module:
        return self.site.weights.linear(name, self.dim, self.dim)

    def uniform(self, layer: nn.Module, bound: float) -> nn.Module:
        """U(-bound / sqrt(D), bound / sqrt(D))."""
        limit = bound / math.sqrt(self.dim)
        return _begin(layer, lambda weight: nn.init.uniform_(weight, -limit, limit))

    def zero(self, layer: nn.Module) -> nn.Module:
        return _begin(layer, nn.init.zeros_)

    def orthogonal(self, layer: nn.Module) -> nn.Module:
        return _begin(layer, lambda weight: nn.init.orthogonal_(weight, gain=0.1))


def _begin(layer: nn.Module, init) -> nn.Module:
    """Starts a plain matrix; one that a provider shares or makes starts as the provider wants."""
    if isinstance(layer, nn.Linear):
        init(layer.weight)
        flag(layer.weight, reinit=False)
    return layer

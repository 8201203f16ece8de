"""What a conversion reads of an attention layer: matrices for ``x @ W``, sizes, and the inputs it saw."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from attnzoo.attention.stages.mask import Causal, Mask


@dataclass
class Layer:
    """One source layer, in fp64.

    Args:
        weights: by symbol, ``W_q`` ``(D, H d)``, ``W_k``, ``W_v`` ``(D, G d)``, ``W_o`` ``(H d, D)``; biases
            ``b_q``, ``b_k``, ``b_v``, ``b_o`` where there are any; of a latent layer its own symbols.
        heads, kv_heads, head_dim: H, G, d. theta: base of RoPE, None without positions.
        x: ``(B, T, D)`` what the layer reads on calibration text. mask: which keys a query sees.
    """

    weights: dict[str, Tensor]
    heads: int
    kv_heads: int
    head_dim: int
    theta: float | None = 10000.0
    x: Tensor | None = None
    mask: Mask = field(default_factory=Causal)

    def inputs(self) -> Tensor:
        """The calibration inputs, in fp64.

        Raises:
            ValueError: there are none.
        """
        if self.x is None:
            raise ValueError("calibration: this conversion reads activations, got no text; give some")
        return self.x.double()

    def options(self) -> dict[str, Any]:
        """Frame options of a mixer of the same heads, where they are not the defaults."""
        width = {} if self.heads * self.head_dim == len(self.weights["W_q"]) else {"head_dim": self.head_dim}
        return width | ({"qkv_bias": True} if "b_q" in self.weights else {})

    def with_ones(self) -> Layer:
        """The layer without biases: they are further rows of its matrices, for an input that is always 1."""
        if "b_q" not in self.weights:
            return self
        weights = {k: v for k, v in self.weights.items() if k not in ("b_q", "b_k", "b_v")}
        for n in "qkv":
            weights[f"W_{n}"] = torch.cat([weights[f"W_{n}"], self.weights[f"b_{n}"][None]])
        x = None if self.x is None else torch.nn.functional.pad(self.x, (0, 1), value=1.0)
        return replace(self, weights=weights, x=x)

    def q_and_k(self) -> tuple[tuple[Tensor, int], tuple[Tensor, int]]:
        return (self.weights["W_q"], self.heads), (self.weights["W_k"], self.kv_heads)


def by_head(z: Tensor, heads: int) -> Tensor:
    """``(B, T, heads d)`` -> ``(B, heads, T, d)``."""
    return z.unflatten(-1, (heads, -1)).transpose(1, 2)


def heads_of(W: Tensor, heads: int) -> Tensor:
    """``(D, heads d)`` -> ``(heads, D, d)``."""
    return W.unflatten(1, (heads, -1)).transpose(0, 1)


def side_by_side(blocks: Tensor) -> Tensor:
    """``(heads, D, d)`` -> ``(D, heads d)``."""
    return blocks.transpose(0, 1).flatten(1)

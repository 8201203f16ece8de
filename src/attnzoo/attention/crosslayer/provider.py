"""Projections whose weights the layers of a model have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnzoo.attention.draft import Draft
from attnzoo.attention.site import INIT_STD, Plain

# the matrices that lie side by side in what projection stages ask for
MATRICES = {"qkv": "qkv", "q": "q", "k": "k", "v": "v", "kv": "kv", "out": "o"}


class Made(nn.Module):
    """A linear map whose weight ``(d_out, d_in)`` is put together in every forward.

    Args:
        pieces: modules that return their rows of the weight. sizes: (d_in, d_out). bias: whether it has one
            (a layer's own).
    """

    def __init__(self, pieces: Sequence[nn.Module], sizes: tuple[int, int], bias: bool) -> None:
        super().__init__()
        self.pieces = nn.ModuleList(pieces)
        self.in_features, self.out_features = sizes
        self.bias = nn.Parameter(torch.zeros(sizes[1])) if bias else None

    @property
    def weight(self) -> Tensor:
        made = [piece() for piece in self.pieces]
        return made[0] if len(made) == 1 else torch.cat(made)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Bank(Plain):
    """A weight provider that shares some of the matrices q, k, v and o, and leaves the rest plain.

    Args:
        make: ``make(matrix, d_in, d_out, std) -> module`` of one of q, k, v, o, which returns its weight.
        shared: which of q, k, v, o.
    """

    def __init__(self, make: Callable[[str, int, int, float], nn.Module], shared: Sequence[str]) -> None:
        self.make, self.shared = make, tuple(shared)
        self.asked: set[str] = set()

    def linear(
        self,
        name: str,
        d_in: int,
        d_out: int,
        bias: bool = False,
        std: float = INIT_STD,
        parts: Sequence[int] | None = None,
    ) -> nn.Module:
        matrices, sizes = MATRICES.get(name, ""), list(parts or [d_out])
        if len(matrices) != len(sizes) or not set(matrices) & set(self.shared):
            return super().linear(name, d_in, d_out, bias, std, parts)
        self.asked |= set(matrices)
        pieces = [
            self.make(matrix, d_in, size, std) if matrix in self.shared else Own(d_in, size, std)
            for matrix, size in zip(matrices, sizes, strict=True)
        ]
        return Made(pieces, (d_in, d_out), bias)


class Own(nn.Module):
    """Rows of a weight that only this layer has."""

    def __init__(self, d_in: int, d_out: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_out, d_in) * std)

    def forward(self) -> Tensor:
        return self.weight


def provide(draft: Draft, bank: Bank) -> None:
    """Makes ``bank`` the provider of the drafted mixer.

    Raises:
        ValueError: another variant provides weights, or, when the draft settles, a projection was made
            without the bank.
    """
    if type(draft.site.weights) is not Plain:
        raise ValueError(
            f"add: {draft.current} makes the weights of plain matrices, another variant of the composition "
            "already does; leave one of them out"
        )
    draft.site = replace(draft.site, weights=bank)

    def settled(done: Draft) -> None:
        for slot, matrices in (("project", "qkv"), ("out", "o")):
            if slot in done.slots and set(matrices) & set(bank.shared) and not set(matrices) & bank.asked:
                raise ValueError(
                    f"add: {done.current} shares the matrices {'/'.join(matrices)} of plain projections, "
                    f"{done.owner[slot]} has its own {slot} stage; leave one of them out "
                    "or share other matrices"
                )

    draft.very_last(settled)

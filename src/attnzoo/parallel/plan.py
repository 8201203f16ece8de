"""Splitting a mixer or a model among ranks that share heads, and which variants can."""

from __future__ import annotations

import copy

import torch
from torch import nn

from attnzoo.attention.base import Mixer
from attnzoo.model.block import SwiGLU
from attnzoo.parallel.tensor import CannotSplit, Share
from attnzoo.registry import build, card

DIM, HEADS = 32, 4  # of the mixers that `splits` tries


def split_heads(model: nn.Module, share: Share) -> None:
    """Leaves a rank its heads of every mixer and its channels of every MLP, in place; see
    `attnzoo.parallel.tensor`. Embedding, norms and head stay whole.

    Every rank calls it on the same weights, before it makes an optimiser.

    Args:
        model: a `LanguageModel`, or a mixer.

    Raises:
        ValueError: as `check_split`; nothing is changed then.
    """
    check_split(model, share.ranks)
    for _, layer in _layers(model) if share.ranks > 1 else ():
        layer.split(share)


def check_split(model: nn.Module, ranks: int) -> None:
    """Whether ``ranks`` ranks can share the heads of a model; changes nothing.

    Raises:
        ValueError: naming the first layer that cannot be split, with the reason.
    """
    for where, layer in _layers(model) if ranks > 1 else ():
        try:
            _bare(layer).split(Share(0, ranks))
        except CannotSplit as error:
            raise ValueError(
                f"launcher.tensor_parallel: {ranks} ranks cannot share {where}: {error}; "
                "set launcher.tensor_parallel=1 or change the layer"
            ) from None


def splits(name: str, ranks: int = 2, **options: object) -> str | None:
    """Why ``ranks`` ranks cannot share the heads of a registered variant with ``options``; None = they can.

    It is tried on 4 heads, without weights, in as many layers as the variant's mechanism spans.
    """
    bank: dict[str, nn.Module] = {}
    with torch.device("meta"):
        layers = card(name).layers
        for i in range(layers):
            place = {"layer_idx": i, "num_layers": layers}
            try:
                build(name, DIM, HEADS, place | options, bank).split(Share(0, ranks))
            except CannotSplit as error:
                return str(error)
    return None


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """What is split, each with its name for messages."""
    if isinstance(model, Mixer):
        return [(model.name, model)]
    mixers = [(f"layer {i} ({mixer.name})", mixer) for i, mixer in enumerate(model.mixers)]
    return mixers + [("mlp_hidden", module) for module in model.modules() if isinstance(module, SwiGLU)]


def _bare(layer: nn.Module) -> nn.Module:
    """A copy without weights, to try on."""
    known: dict[int, object] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in layer.parameters()
    }
    if isinstance(layer, Mixer) and layer.site.bank is not None:
        known[id(layer.site.bank)] = {}  # what other layers have is not tried
    return copy.deepcopy(layer, known)

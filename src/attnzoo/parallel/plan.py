"""Splitting a mixer or a model among ranks that share heads, and which variants can."""

from __future__ import annotations

import copy

import torch
from torch import nn

from attnzoo.attention.base import Mixer
from attnzoo.model.block import SwiGLU
from attnzoo.parallel.tensor import CannotSplit, Share
from attnzoo.registry import build

DIM, HEADS = 32, 4  # of the mixers that `splits` tries


def split_heads(model: nn.Module, share: Share) -> None:
    """Leaves a rank its heads of every mixer and its channels of every MLP, in place; see
    `attnzoo.parallel.tensor`. Embedding, norms and head stay whole.

    Every rank calls it on the same weights, before it makes an optimiser.

    Args:
        model: a `LanguageModel`, or a mixer.

    Raises:
        ValueError: a layer cannot be split, with the reason; nothing is changed then.
    """
    if share.ranks == 1:
        return
    mixers = [model] if isinstance(model, Mixer) else list(model.mixers)
    layers = [*enumerate(mixers), *((-1, m) for m in model.modules() if isinstance(m, SwiGLU))]
    for i, layer in layers:
        try:
            _bare(layer).split(share)
        except CannotSplit as error:
            where = f"layer {i} ({layer.name}), {error}" if i >= 0 else f"mlp_hidden, {error}"
            raise ValueError(
                f"launcher.tensor_parallel: {share.ranks} ranks cannot share {where}; "
                "set launcher.tensor_parallel=1, or change the model"
            ) from None
    for _, layer in layers:
        layer.split(share)


def splits(name: str, ranks: int = 2, layers: int = 1, **options: object) -> str | None:
    """Why ``ranks`` ranks cannot share the heads of a registered variant; None where they can.

    Args:
        layers: of a model whose layers depend on each other. options: of the variant.
    """
    bank: dict[str, nn.Module] = {}
    with torch.device("meta"):
        for i in range(layers):
            place = {"layer_idx": i, "num_layers": layers}
            try:
                build(name, DIM, HEADS, place | options, bank).split(Share(0, ranks))
            except CannotSplit as error:
                return str(error)
    return None


def _bare(layer: nn.Module) -> nn.Module:
    """A copy without weights, to try on."""
    known = {id(p): nn.Parameter(torch.empty_like(p, device="meta")) for p in layer.parameters()}
    return copy.deepcopy(layer, known)

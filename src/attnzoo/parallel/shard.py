"""FSDP2: every rank keeps a part of each parameter and sees the whole of a block only while it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from attnzoo.attention.base import Stage

# what parameters say to the optimiser and to gathering
MARKS = ("no_weight_decay", "lr_scale", "no_reinit", "shards")


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Spread the parameters over ``mesh``, block by block.

    Layers that share weights or tensors are one unit with the rest: the backward pass may reach one of them
    through another, when its own weights are not there.
    """
    if not entangled(model):
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def read_marks(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What parameters carry as attributes, by name."""
    return {
        name: {mark: getattr(p, mark) for mark in MARKS if hasattr(p, mark)}
        for name, p in model.named_parameters()
    }


def put_marks(model: nn.Module, marks: Mapping[str, dict[str, Any]]) -> None:
    """The same on the parameters that took the place of those: FSDP2 makes new ones, and so does a move to
    another device."""
    for name, p in model.named_parameters():
        for mark, value in marks.get(name, {}).items():
            setattr(p, mark, value)


def entangled(model: nn.Module) -> bool:
    """Whether layers share parameters, or read tensors that others made."""
    owners = Counter(id(p) for block in model.blocks for p in set(block.parameters()))
    return any(n > 1 for n in owners.values()) or any(mixer.gives or mixer.needs for mixer in model.mixers)


@contextmanager
def whole_layers(model: nn.Module) -> Iterator[None]:
    """The weights of those layers whole that look at them between steps (`Stage.on_step`)."""
    units = _units(model)
    stages = (stage for mixer in model.mixers for stage in mixer.stages()) if units else ()
    if not any(type(stage).on_step is not Stage.on_step for stage in stages):
        yield
        return
    for unit in units:
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()


def reshard(model: nn.Module) -> None:
    """Leave each rank its part only; a forward pass without a backward pass keeps some weights whole."""
    for unit in _units(model):
        unit.reshard()


def _units(model: nn.Module) -> list[FSDPModule]:
    """What FSDP2 gathers at once; none of a model that is not spread, without a walk through it."""
    spread = isinstance(model, FSDPModule)
    return [module for module in model.modules() if isinstance(module, FSDPModule)] if spread else []


def gathered(tensor: Tensor) -> Tensor:
    """All parts together, on every rank; a collective call where the tensor is spread."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def spread_like(full: Tensor, like: Tensor) -> Tensor:
    """This rank's part of what all ranks have whole, without communication."""
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)

"""One rank's hold on a model that several share: it is spread at the start and gathered for checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from attnzoo.parallel.layout import Layout
from attnzoo.parallel.pieces import local_part
from attnzoo.parallel.plan import split_heads
from attnzoo.parallel.shard import gathered, put_marks, read_marks, shard, spread_like
from attnzoo.parallel.tensor import Share, assemble, norm_weight, own, sync_gradients


class Ranks:
    """The groups that a rank belongs to, and what they do to a model together.

    Args:
        layout: its place among the others.

    Attributes:
        share, span: its share of the heads and its part of every sequence; None where it has all.
    """

    def __init__(self, layout: Layout = Layout()) -> None:  # noqa: B008
        self.layout = layout
        self.share: Share | None = None
        self.span: Any = None
        self._mesh: DeviceMesh | None = None
        self._marks: dict[str, dict[str, Any]] = {}

    def spread(self, model: nn.Module, device: str) -> None:
        """Give this rank its part of ``model``, in place; the processes are connected, the model is whole.

        Raises:
            ValueError: a layer cannot be split so; the message says why.
        """
        layout = self.layout
        if not layout.sharded or self._mesh is not None:
            return
        names, sizes = ("data", "context", "tensor"), (layout.data, layout.context, layout.tensor)
        mesh = init_device_mesh(device, sizes, mesh_dim_names=names)
        self._mesh = mesh["data", "context"]._flatten("batch")
        if layout.context > 1:
            from attnzoo.parallel.context import connect

            self.span = connect(layout.context_rank, layout.context, mesh["context"].get_group())
        if layout.tensor > 1:
            self.share = Share(layout.tensor_rank, layout.tensor, mesh["tensor"].get_group())
            split_heads(model, self.share)
        self._marks = read_marks(model)
        if layout.batches > 1:
            shard(model, self._mesh)

    def mark(self, model: nn.Module) -> None:
        """Put on the parameters again what they said before they were spread and moved."""
        put_marks(model, self._marks)

    def settle_gradients(self, model: nn.Module) -> list[Tensor]:
        """This rank's parts of all gradients, complete, sharing their memory."""
        if self.share is not None:
            sync_gradients(model, self.share)
        return [local_part(p.grad) for p in model.parameters() if p.grad is not None]

    def squared_norm(self, model: nn.Module) -> Tensor:
        """This rank's summand of the squared norm of the gradient; the sum over all ranks is the whole."""
        held = self.layout.tensor
        known = [p for p in model.parameters() if p.grad is not None]
        return torch.stack([_square(local_part(p.grad), norm_weight(p, held)) for p in known]).sum()

    def whole(self, tensors: Mapping[str, Tensor], like: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Full tensors on the CPU of rank 0, nothing elsewhere; a call that all ranks make together.

        Args:
            tensors: by name. like: the parameters by name that say how they are cut.
        """
        found = {}
        for name, tensor in tensors.items():
            shards = getattr(like.get(name), "shards", None)
            full = gathered(tensor.detach())
            if shards is not None:
                full = assemble(full, shards, self.share)
            if self.layout.rank == 0:
                found[name] = full.cpu() if self.layout.sharded else full
        return found

    def parts(self, tensors: Mapping[str, Tensor], like: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """What of `whole` this rank holds, where no rank before it holds the same; without communication."""
        found = {}
        for name, tensor in tensors.items():
            shards = getattr(like.get(name), "shards", None)
            alone = isinstance(tensor, DTensor) or self.layout.rank < self.layout.tensor
            if alone and (self.layout.tensor_rank == 0 or (shards is not None and shards.blocks)):
                found[name] = local_part(tensor.detach())
        return found

    def part(self, full: Tensor, like: nn.Parameter) -> Tensor:
        """This rank's part of a full tensor of a parameter's shape, as `whole` gave it."""
        return spread_like(own(full, getattr(like, "shards", None)), like)

    def largest(self, value: Tensor) -> Tensor:
        """The largest over all ranks, in place, where there are several."""
        if self.layout.world > 1:
            dist.all_reduce(value, dist.ReduceOp.MAX)
        return value

    def add(self, value: Tensor) -> Tensor:
        """The sum over all ranks, in place, where there are several."""
        if self.layout.world > 1:
            dist.all_reduce(value)
        return value


def tied_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Later names of tensors that have several, each with the first one."""
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        first.setdefault(id(tensor), name)
    return {name: first[id(tensor)] for name, tensor in tensors.items() if first[id(tensor)] != name}


def _square(grad: Tensor, weight: float | Tensor) -> Tensor:
    """The weighted sum of squares in fp64, without a copy of ``grad`` where it has one weight."""
    if isinstance(weight, Tensor):
        return (weight * grad.double().square()).sum()
    return weight * torch.linalg.vector_norm(grad, dtype=torch.float64).square()

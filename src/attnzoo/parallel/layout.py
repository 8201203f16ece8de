"""How the ranks of a run share its work: batches, sequences, heads.

Ranks are numbered as (data, context, tensor), tensor fastest: those which exchange most are neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy

from attnzoo.train.settings import check_number, check_whole

STRATEGIES = ("auto", "ddp", "fsdp")


@dataclass(frozen=True)
class LauncherSettings:
    """The `launcher` group, but for what a scheduler reads.

    Args:
        accelerator, devices, num_nodes: as Lightning's Trainer takes them.
        strategy: "ddp", "fsdp" (FSDP2), or "auto": "ddp" on several ranks, "fsdp" where heads or sequences
            are shared.
        tensor_parallel: ranks that share the heads of every layer.
        context_parallel: ranks that share every sequence.
        timeout: seconds that a rank waits for the others.
    """

    accelerator: str = "auto"
    devices: Any = 1
    num_nodes: int = 1
    strategy: str = "auto"
    tensor_parallel: int = 1
    context_parallel: int = 1
    timeout: float = 1800

    def __post_init__(self) -> None:
        for name in ("num_nodes", "tensor_parallel", "context_parallel"):
            check_whole(f"launcher.{name}", getattr(self, name), 1)
        check_number("launcher.timeout", self.timeout, 1)
        if self.strategy not in STRATEGIES:
            raise ValueError(
                f"launcher.strategy: must be one of {', '.join(STRATEGIES)}, got {self.strategy!r}; take auto"
            )
        self.world  # noqa: B018, checked
        if self.splits > 1 and self.strategy not in ("auto", "fsdp"):
            raise ValueError(
                "launcher.strategy: tensor_parallel and context_parallel go with fsdp, got "
                f"{self.strategy!r}; leave it out"
            )

    @property
    def world(self) -> int:
        """Ranks of the whole run, by the devices that Lightning would take of a node.

        Raises:
            ValueError: ``devices`` is nothing that it takes.
        """
        devices = self.devices
        if isinstance(devices, str):
            devices = [part for part in devices.split(",") if part.strip()] if "," in devices else devices
        if isinstance(devices, (list, tuple)) and devices:
            return len(devices) * self.num_nodes
        if str(devices) in ("auto", "-1"):
            gpus = self.accelerator in ("auto", "gpu", "cuda")
            return max(1, torch.cuda.device_count() if gpus else 1) * self.num_nodes
        if isinstance(devices, bool) or not str(devices).isdecimal() or int(devices) < 1:
            raise ValueError(
                "launcher.devices: must be a number of at least 1, a list of devices, or auto, got "
                f"{self.devices!r}; give the processes of a node"
            )
        return int(devices) * self.num_nodes

    @property
    def splits(self) -> int:
        """Ranks that work on the same samples."""
        return self.tensor_parallel * self.context_parallel

    @property
    def sharded(self) -> bool:
        """Whether a rank holds a part of the model."""
        return self.strategy == "fsdp" or self.splits > 1

    def build_strategy(self) -> str | Strategy:
        """What Lightning's Trainer takes as its strategy."""
        wait = timedelta(seconds=self.timeout)
        if self.sharded:
            return Sharded(self.tensor_parallel, wait)
        if self.strategy == "ddp" or self.world > 1:
            return DDPStrategy(timeout=wait, gradient_as_bucket_view=True)
        return "auto"


class Sharded(ModelParallelStrategy):
    """Lightning's strategy for FSDP2, whose data-parallel ranks are all that do not share heads."""

    def __init__(self, tensor_parallel: int, timeout: timedelta) -> None:
        super().__init__(tensor_parallel_size=tensor_parallel, timeout=timeout)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_processes * self.num_nodes // self._tensor_parallel_size
        super().setup_environment()


@dataclass(frozen=True)
class Layout:
    """One rank's place among the others.

    Args:
        world, rank: of the run. context, tensor: ranks that share a sequence, and the heads.
        sharded: whether a rank holds a part of the model.
    """

    world: int = 1
    rank: int = 0
    context: int = 1
    tensor: int = 1
    sharded: bool = False

    def __post_init__(self) -> None:
        if self.world % (self.context * self.tensor):
            raise ValueError(
                f"launcher: tensor_parallel x context_parallel = {self.tensor} x {self.context} must divide "
                f"the {self.world} ranks (devices x num_nodes); change one"
            )

    @property
    def data(self) -> int:
        """Ranks that read different samples."""
        return self.world // (self.context * self.tensor)

    @property
    def batches(self) -> int:
        """Ranks among which gradients are averaged: all that do not share heads."""
        return self.world // self.tensor

    @property
    def data_rank(self) -> int:
        return self.rank // (self.context * self.tensor)

    @property
    def context_rank(self) -> int:
        return self.rank // self.tensor % self.context

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor

    def facts(self) -> Mapping[str, int]:
        """For the record of a run."""
        return {"data": self.data, "context": self.context, "tensor": self.tensor}

"""Which cores and GPUs each cell that runs at the same time may use."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST = 8  # cells at the same time on a CPU, unless asked for: each holds a few hundred MB


@dataclass(frozen=True)
class Slot:
    """A share of the machine: core numbers, and GPUs as CUDA_VISIBLE_DEVICES names them."""

    cores: tuple[int, ...]
    gpus: tuple[str, ...] = ()


def share(
    cells: int, jobs: int | None, ranks: int, cores: Sequence[int], gpus: Sequence[str] = ()
) -> list[Slot]:
    """Slots for the cells of a sweep.

    Args:
        cells: how many there are to run; no more slots than that are made.
        jobs: how many to run at the same time; None for as many as have GPUs, or cores, of their own.
        ranks: processes of one cell.
        cores, gpus: of this machine. Without GPUs the cells run on the CPU.

    Raises:
        ValueError: one cell needs more GPUs than there are.
    """
    if gpus and ranks > len(gpus):
        raise ValueError(f"launcher.devices: this machine has {len(gpus)} GPUs, got {ranks}; lower it")
    if jobs is None:
        jobs = len(gpus) // ranks if gpus else min(max(len(cores) // ranks, 1), MOST)
    jobs = max(min(jobs, cells), 1)
    return [Slot(_part(cores, i, jobs), _turn(gpus, i, ranks)) for i in range(jobs)]


def ranks_of(config: Mapping[str, Any], gpus: int) -> int:
    """Processes of one cell on this machine.

    Raises:
        ValueError: several nodes, or devices given one by one.
    """
    launcher = config["launcher"]
    nodes, devices = launcher["num_nodes"], launcher["devices"]
    if nodes != 1:
        raise ValueError(f"launcher.num_nodes: must be 1 on this machine, got {nodes!r}; use launcher=slurm")
    if devices in ("auto", -1, "-1"):
        return max(gpus, 1)
    if isinstance(devices, bool) or not isinstance(devices, int) or devices < 1:
        raise ValueError(
            f"launcher.devices: must be a number of them, a sweep deals them out itself, got {devices!r}"
        )
    return devices


def cores_here() -> tuple[int, ...]:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def gpus_here(configs: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """GPUs that the cells are going to use, none if they ask for a CPU."""
    if not any(config["launcher"]["accelerator"] in ("auto", "gpu", "cuda") for config in configs):
        return ()
    import torch

    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.cuda.is_available():
        return ()
    return tuple(chosen.split(",")) if chosen else tuple(map(str, range(torch.cuda.device_count())))


def _part(items: Sequence[int], index: int, parts: int) -> tuple[int, ...]:
    """One of ``parts`` shares that differ by at most one; a single item where there are too few."""
    if parts >= len(items):
        return (items[index % len(items)],)
    return tuple(items[index * len(items) // parts : (index + 1) * len(items) // parts])


def _turn(items: Sequence[str], index: int, count: int) -> tuple[str, ...]:
    """``count`` consecutive items, going round."""
    return tuple(items[(index * count + i) % len(items)] for i in range(count)) if items else ()

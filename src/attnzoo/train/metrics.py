"""What a run reports: losses, speed and memory between two reports, and the speed of the whole run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from attnzoo.train.hardware import peak_flops, peak_memory

# the columns of metrics.csv; metrics.jsonl also has `aux/<name>` for each auxiliary loss
COLUMNS = (
    "step",
    "tokens",
    "seconds",
    "train_loss",
    "aux_loss",
    "lr",
    "grad_norm",
    "tokens_per_second",
    "mfu",
    "peak_memory_bytes",
    "val_loss",
    "val_bpb",
    "val_accuracy",
)


class Measured(NamedTuple):
    """What the targets of held-out samples add up to.

    Args:
        nll: nats. count: targets. correct: targets that the likeliest token is. All ``(T,)``, by position in
            the sample; or ``()``, and ``correct`` None, of an objective that fills in tokens in any order.
    """

    nll: Tensor
    count: Tensor
    correct: Tensor | None = None


def bucket_edges(length: int) -> list[int]:
    """Positions 0, 1, 2, 4, 8, ... and ``length``: a bucket reaches from one edge to before the next."""
    return [0, *(2**i for i in range((length - 1).bit_length())), length] if length > 1 else [0, 1]


def loss_by_position(nll: Tensor, count: Tensor) -> dict[str, list]:
    """Nats per token of each bucket of positions; None where a bucket has no target.

    Shape: ``nll`` and ``count`` are (T,), summed over samples.
    """
    edges = bucket_edges(len(nll))
    buckets = [slice(*pair) for pair in pairwise(edges)]
    sums = [(nll[bucket].sum().item(), count[bucket].sum().item()) for bucket in buckets]
    return {"edges": edges, "loss": [total / number if number else None for total, number in sums]}


@dataclass(frozen=True)
class Progress:
    """How far a run is; what a checkpoint must bring back.

    Args:
        step: optimiser steps done.
        tokens: input tokens of those steps, over all ranks.
        seconds: wall time so far, validation and checkpoints included.
    """

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Meter:
    """Token-weighted losses and speed since the last report, and the speed of the whole run.

    The first step is not timed: it compiles, allocates and tunes.

    Args:
        tokens_per_step: over all ranks.
        flops_per_token: of training, as the chosen implementation runs it.
        world: ranks, all of them on devices like ``device``.
    """

    def __init__(
        self, tokens_per_step: int, flops_per_token: float, device: torch.device, world: int = 1
    ) -> None:
        self.tokens_per_step, self.flops_per_token, self.device = tokens_per_step, flops_per_token, device
        peak = peak_flops(device)
        self.peak = None if peak is None else peak * world
        self._steps, self._seconds = 0, 0.0
        self._warm = False
        self._open()

    def _open(self) -> None:
        self._nll = self._aux = self._count = 0.0
        self._named: dict[str, Tensor] = {}
        self._timed = 0
        self._start = time.perf_counter()

    def add(self, nll: float, auxiliary: float, count: float) -> None:
        """One optimiser step: sums over its ``count`` targets."""
        self._nll, self._aux, self._count = self._nll + nll, self._aux + auxiliary, self._count + count
        if self._warm:
            self._timed += 1
        else:
            self._warm, self._start = True, time.perf_counter()

    def hear(self, losses: Mapping[str, Mapping[int, tuple[Tensor, float]]], count: Tensor) -> None:
        """Auxiliary losses of this rank's micro-batch with ``count`` targets; no wait for the device.

        Args:
            losses: as `Collector.losses`: name -> layer -> unweighted scalar loss, and its weight.
        """
        for name, layers in losses.items():
            mean = torch.stack([value.detach() for value, _ in layers.values()]).mean()
            self._named[name] = self._named.get(name, 0.0) + mean * count

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Leave out time that is not training: validation, checkpoints."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - start

    def report(self, share: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, float | None]:
        """Metrics since the last report; at least one step must have been added.

        Args:
            share: the sums of what each rank heard, added up over all ranks, which call it together.
        """
        seconds = time.perf_counter() - self._start
        self._steps, self._seconds = self._steps + self._timed, self._seconds + seconds
        speed = self._timed * self.tokens_per_step / seconds if self._timed else None
        metrics = {
            "train_loss": self._nll / self._count,
            "aux_loss": self._aux / self._count,
            "tokens_per_second": speed,
            "mfu": speed * self.flops_per_token / self.peak if speed and self.peak else None,
            "peak_memory_bytes": peak_memory(self.device),
        }
        if self._named:
            sums = share(torch.stack(list(self._named.values()))).tolist()
            metrics |= {f"aux/{name}": s / self._count for name, s in zip(self._named, sums, strict=True)}
        self._open()
        return metrics

    def tokens_per_second(self) -> float | None:
        """Speed over all reports; None before the second step."""
        return self._steps * self.tokens_per_step / self._seconds if self._steps else None

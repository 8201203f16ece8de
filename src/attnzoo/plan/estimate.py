"""One layout's memory and time, and the best of those that fit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from attnzoo.plan.hardware import GIB, Hardware
from attnzoo.plan.memory import PARTS, Memory, memory
from attnzoo.plan.rules import check_setup
from attnzoo.plan.setup import Job, Setup
from attnzoo.plan.times import Times, times

LEAST_TOKENS = 1024  # of a sequence on a rank, below which sharing it is not tried
MOST_CONTEXT = 64


@dataclass(frozen=True)
class Estimate:
    """What a layout needs, by the model of `attnzoo.plan`."""

    job: Job
    setup: Setup
    hardware: Hardware
    memory: Memory
    times: Times

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.hardware.usable

    @property
    def tokens_per_second(self) -> float:
        return self.setup.batch * self.job.seq_len / self.times.step

    @property
    def mfu(self) -> float:
        """FLOPs that the model runs, without recomputation, as a share of all devices' peak."""
        flops = 3 * self.job.cost.executed_flops * self.tokens_per_second
        return flops / (self.setup.gpus * self.hardware.peak_flops)


@dataclass(frozen=True)
class Choice:
    """The best layout for a number of GPUs, or None, and why others were left out: reason -> how many."""

    gpus: int
    best: Estimate | None
    left_out: Mapping[str, int]


def estimate(job: Job, setup: Setup, hardware: Hardware, overlap: float) -> Estimate:
    """Memory and time of one layout.

    Raises:
        ValueError: the model cannot be shared so.
    """
    return Estimate(job, setup, hardware, memory(job, setup), times(job, setup, hardware, overlap))


def choose(
    job: Job,
    gpus: int,
    batch: int,
    hardware: Hardware,
    overlap: float,
    fixed: Mapping[str, Any] | None = None,
) -> Choice:
    """The layout with most tokens per second of those that fit into the memory.

    Args:
        batch: samples of a step. fixed: fields of `Setup` that are given.
    """
    best, left_out, least = None, {}, None
    for tensor, context, data in _grids(job, gpus, batch, hardware, fixed or {}, left_out):
        for setup in _micro_batches(job, gpus, tensor, context, batch // data, fixed or {}, left_out):
            try:
                found = estimate(job, setup, hardware, overlap)
            except ValueError as error:
                _count(left_out, str(error).partition("; ")[0])
                break
            if not found.fits:
                least = min(least or found, found, key=lambda e: e.memory.total)
                _count(left_out, "memory")
            elif best is None or found.tokens_per_second > best.tokens_per_second:
                best = found
    if least is not None:
        need, has = least.memory.total / GIB, hardware.usable / GIB
        why = f"memory: more than the {has:.0f} GiB that may be used (the least needs {need:.0f} GiB)"
        left_out = {why if reason == "memory" else reason: n for reason, n in left_out.items()}
    return Choice(gpus, best, left_out)


def _count(left_out: dict[str, int], reason: str) -> None:
    left_out[reason] = left_out.get(reason, 0) + 1


def _grids(
    job: Job,
    gpus: int,
    batch: int,
    hardware: Hardware,
    fixed: Mapping[str, Any],
    left_out: dict[str, int],
) -> Iterator[tuple[int, int, int]]:
    """Sizes (tensor, context, data) that share out GPUs and samples evenly."""
    heads = job.options["num_heads"]
    most = min(MOST_CONTEXT, max(1, job.seq_len // LEAST_TOKENS))
    even = _divisors(gpus)
    tensors = [t for t in even if t <= hardware.per_node and heads % t == 0]
    contexts = [c for c in even if c <= most and job.seq_len % c == 0]
    tensors = [fixed["tensor"]] if "tensor" in fixed else tensors
    contexts = [fixed["context"]] if "context" in fixed else contexts
    micro, parts = fixed.get("accumulate", 1), "the groups that read them"
    if micro > 1:
        parts += f" and their trainer.accumulate={micro} micro-batches"
    for tensor in tensors:
        for context in contexts:
            if gpus % (tensor * context):
                _count(left_out, f"{gpus} GPUs are no multiple of tensor x context")
            elif batch % (gpus // (tensor * context) * micro):
                _count(left_out, f"{batch} samples of a step do not divide among {parts}")
            else:
                yield tensor, context, gpus // (tensor * context)


def _micro_batches(
    job: Job,
    gpus: int,
    tensor: int,
    context: int,
    samples: int,
    fixed: Mapping[str, Any],
    left_out: dict[str, int],
) -> Iterable[Setup]:
    """Layouts that differ in strategy, recomputation and how many samples run at once."""
    shared = tensor * context > 1
    strategies = ("fsdp",) if shared else (("ddp",) if gpus == 1 else ("ddp", "fsdp"))
    rows = [samples // fixed["accumulate"]] if "accumulate" in fixed else _divisors(samples)
    for strategy in [fixed["strategy"]] if "strategy" in fixed else strategies:
        try:
            check_setup(job, Setup(gpus, strategy, tensor, context, samples))
        except ValueError as error:
            _count(left_out, str(error).partition("; ")[0].partition(", got ")[0])
            continue
        for recompute in [fixed["recompute"]] if "recompute" in fixed else (False, True):
            for n in rows:
                yield Setup(gpus, strategy, tensor, context, n, samples // n, recompute)


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def refusal(found: Estimate, memory_bytes: float) -> str | None:
    """Why a run cannot fit into ``memory_bytes`` of a device however wrong the estimate; None = it may."""
    need = found.memory
    if need.lower <= memory_bytes:
        return None
    parts = sorted(((getattr(need, name), name) for name in PARTS), reverse=True)[:3]
    named = ", ".join(f"{name} {size / GIB:.1f}" for size, name in parts)
    ways = [
        text
        for text, helps in (
            ("trainer.checkpoint_activations=true", not found.setup.recompute),
            ("a larger trainer.accumulate", found.setup.rows > 1),
            ("launcher.strategy=fsdp", found.setup.strategy != "fsdp"),
            ("launcher.tensor_parallel or launcher.context_parallel", True),
            ("more devices, or a smaller model", True),
        )
        if helps
    ]
    return (
        f"memory: a rank needs at least {need.lower / GIB:.1f} GiB of {memory_bytes / GIB:.1f} "
        f"({found.setup.rows} samples of {found.job.seq_len} tokens at once; the largest parts in GiB: "
        f"{named}); try {', '.join(ways)}"
    )

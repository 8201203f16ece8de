"""`attnzoo train ... --dry-run`: the configuration checked, memory and time estimated, nothing written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from attnzoo.cli.overrides import order
from attnzoo.cli.tree import compose, config_folder, opened, plain_errors
from attnzoo.cli.zoo import table
from attnzoo.cluster.ranks import launcher_here
from attnzoo.parallel.layout import LauncherSettings, Layout
from attnzoo.plan import Hardware, Setup, entry_for, estimate, read_hardware, refusal
from attnzoo.plan.hardware import GIB
from attnzoo.plan.memory import PARTS as MEMORY
from attnzoo.plan.request import job_of, read_request, vocabulary
from attnzoo.plan.times import PARTS as TIMES
from attnzoo.sweep.grid import plain
from attnzoo.train.batches import CounterBatches
from attnzoo.train.hardware import choose_precision
from attnzoo.train.prepare import check_architecture, read_groups, read_launcher

OWN = ("hardware", "overlap")


def dry_run(arguments: list[str]) -> int:
    """Print what a rank of the run will hold and how long a step takes; returns 0.

    Raises:
        ValueError: a mistake in the configuration, or a device too small for what cannot be avoided.
    """
    for argument in arguments:
        if argument.startswith("-"):
            raise ValueError(
                f"--dry-run: takes key=value of one run, got {argument!r} beside it; leave it out"
            )
    own = [a for a in arguments if a.partition("=")[0] in OWN or a.startswith("hardware.")]
    request = read_request(own)
    with plain_errors(), opened():
        config = plain(compose(["run_dir=.", *order(a for a in arguments if a not in own)]))
    config["launcher"] = launcher_here(config["launcher"])
    config = check_architecture(config)
    launcher = read_launcher(config)
    hardware, memory = _hardware(launcher, request.hardware, request.changes)
    setup, precision = _setup(config, launcher), config["trainer"]["precision"]
    bf16 = precision != "fp32"
    if hardware is None:
        bf16 = choose_precision(precision, torch.device("cpu"), config["model"]["dim"])[0] != "32-true"
    job = job_of(config, vocabulary(config), gpu=hardware is not None, bf16=bf16)
    found = estimate(
        job, setup, hardware or read_hardware(config_folder() / "hardware", "h100"), request.overlap
    )
    _print(found, hardware, memory)
    reason = None if memory is None else refusal(found, memory)
    if reason is not None:
        raise ValueError(reason)
    print("nothing was trained or written")
    return 0


def _hardware(
    launcher: LauncherSettings, name: str | None, changes: Mapping[str, Any]
) -> tuple[Hardware | None, float | None]:
    """The machine and the memory of its devices; what was asked for, else what is here, as far as it is
    known.
    """
    folder = config_folder() / "hardware"
    if name is not None or changes:
        found = read_hardware(folder, name or "h100", changes)
        return found, found.memory
    if not torch.cuda.is_available() or launcher.accelerator not in ("auto", "gpu", "cuda"):
        return None, None
    memory = torch.cuda.get_device_properties(0).total_memory
    entry = entry_for(folder, torch.cuda.get_device_name(0))
    found = None if entry is None else replace(read_hardware(folder, entry), memory=float(memory))
    return found, float(memory)


def _setup(config: Mapping[str, Any], launcher: LauncherSettings) -> Setup:
    """How the run's ranks share it."""
    trainer, _, data = read_groups(config)
    layout = Layout(launcher.world, 0, launcher.context_parallel, launcher.tensor_parallel, launcher.sharded)
    batches = CounterBatches(0, 1, data.batch_size, trainer.accumulate, 0, layout.data)
    return Setup(
        gpus=layout.world,
        strategy="fsdp" if launcher.sharded else "ddp",
        tensor=layout.tensor,
        context=layout.context,
        rows=batches.size,
        accumulate=trainer.accumulate,
        recompute=trainer.checkpoint_activations,
    )


def _print(found, hardware: Hardware | None, memory: float | None) -> None:
    job, setup = found.job, found.setup
    print(
        f"{job.options['layout']}: {job.cost.params:,} parameters; {setup.gpus} "
        f"rank{'s' * (setup.gpus > 1)} (data {setup.data}, "
        f"context {setup.context}, tensor {setup.tensor}), {setup.accumulate} x {setup.rows} samples of "
        f"{job.seq_len} tokens on each; {'bf16' if job.bf16 else 'fp32'}"
    )
    unit, measure = (GIB, "GiB") if found.memory.total > GIB / 10 else (GIB / 1024, "MiB")
    has = "" if memory is None else f" of {memory / unit:.1f}"
    sizes = [[f"  {name}", f"{getattr(found.memory, name) / unit:.2f} {measure}"] for name in MEMORY]
    print(f"memory of a rank: {found.memory.total / unit:.2f} {measure}{has}, at its highest")
    print(table(sizes))
    if hardware is None:
        print("time of a step: unknown here; hardware=h100 tells it for an entry of configs/hardware")
        return
    low, high = found.times.bounds
    spent = [[f"  {name}", f"{seconds:.4f} s"] for name in TIMES if (seconds := getattr(found.times, name))]
    print(f"time of a step on {hardware.name}: {found.times.step:.3f} s ({low:.3f} to {high:.3f})")
    print(table(spent))
    print(f"{found.tokens_per_second:,.0f} tokens/s, {found.mfu:.0%} MFU, bound by {found.times.bound_by}")

"""Compares the plan's model with what this machine does: 1, 2 and 4 processes over gloo, and the memory of
one.

python scripts/check_plan.py            # about four minutes; writes benchmarks/results/plan-check.csv
python scripts/check_plan.py --quick    # two rounds, one model, nothing written

Speeds of products, memory, small operations and exchanges are the model's inputs: measured before and after
each step, on all ranks at once, so that processes which share a core, and whatever else the machine does, are
in them. Layouts take turns, in another order every second round; a step's time is that of the slowest rank,
and ``ratio`` is predicted by measured, each with its own inputs, with quartiles over the rounds.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from machine import machine
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import attnzoo
from attnzoo import Context
from attnzoo.parallel.layout import Layout
from attnzoo.parallel.ranks import Ranks
from attnzoo.plan import Hardware, Job, Setup, estimate

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "plan-check.csv"
LAYOUTS = ("mha", "mla", "gated_deltanet")
SIZES = {"vocab_size": 256, "dim": 192, "depth": 4, "num_heads": 4}
ROWS, LENGTH = 4, 256  # of a step on a rank that shares neither heads nor sequences
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
MEMORY = 64 << 30  # not compared
SETUPS = {
    1: [Setup(1, rows=ROWS)],
    2: [
        Setup(2, "ddp", rows=ROWS),
        Setup(2, "fsdp", rows=ROWS),
        Setup(2, "fsdp", tensor=2, rows=ROWS),
        Setup(2, "fsdp", context=2, rows=ROWS),
    ],
    4: [Setup(4, "ddp", rows=ROWS), Setup(4, "fsdp", rows=ROWS)],
}


def spent(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Gauge:
    """The speeds of this machine now, on all ranks at once: the slowest one's."""

    def __init__(self, ranks: int) -> None:
        rows, dim = ROWS * LENGTH, SIZES["dim"]
        self.ranks, self.flops, self.moved = ranks, 2 * rows * dim * 2 * dim, 3 * rows * 4 * dim * 4
        self.a, self.b = torch.randn(rows, dim), torch.randn(dim, 2 * dim)
        self.x, self.y, self.small = torch.randn(rows, 4 * dim), torch.randn(rows, 4 * dim), torch.ones(8)
        self.parts = [torch.ones(n) for n in (1 << 8, 1 << 19)]
        self.wholes = [torch.empty(ranks * len(part)) for part in self.parts]

    @torch.no_grad()
    def read(self) -> dict[str, float]:
        """FLOPs per second of products of the models' shapes, bytes per second, seconds of an operation,
        bytes per second and seconds of a message in the plan's formula.
        """
        seconds = [
            spent(lambda: [self.a @ self.b for _ in range(10)]) / 10,
            spent(lambda: [self.x + self.y for _ in range(10)]) / 10,
            spent(lambda: [self.small.add_(1) for _ in range(500)]) / 500,
        ]
        for part, whole in zip(self.parts, self.wholes, strict=True) if self.ranks > 1 else ():
            dist.barrier()
            seconds.append(
                min(spent(lambda p=part, w=whole: dist.all_gather_into_tensor(w, p)) for _ in range(3))
            )
        worst = torch.tensor(seconds, dtype=torch.float64)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        product, adding, call, *links = worst.tolist()
        found = {"flops": self.flops / product, "bytes": self.moved / adding, "call": call}
        if not links:
            return found | {"link": 1e12, "message": 0.0}
        little, much = (4.0 * len(part) * (self.ranks - 1) for part in self.parts)
        link = (much - little) / max(links[1] - links[0], 1e-6)
        return found | {"link": link, "message": max(links[0] - little / link, 0.0) / (self.ranks - 1)}


def make_step(layout: str, setup: Setup, rank: int) -> Callable[[], None]:
    """One optimiser step of this rank."""
    torch.manual_seed(0)
    model = attnzoo.create_model(layout, **SIZES)
    ranks = Ranks(Layout(setup.gpus, rank, setup.context, setup.tensor, setup.strategy == "fsdp"))
    ranks.spread(model, "cpu")
    called = model
    if setup.gpus > 1 and setup.strategy == "ddp":
        called = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    text = torch.randint(SIZES["vocab_size"], (setup.rows, LENGTH + 1))
    tokens, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    if ranks.span is not None:
        targets = ranks.span.cut(targets)

    def step() -> None:
        logits = called(tokens, ctx=Context(span=ranks.span))
        cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        ranks.settle_gradients(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def work(rank: int, world: int, folder: str, layouts: Sequence[str], rounds: int) -> None:
    """What one process measures; rank 0 writes it."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="torch.distributed.fsdp")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet-{world}", rank=rank, world_size=world)
    gauge = Gauge(world)
    arms = [(layout, setup) for setup in SETUPS[world] for layout in layouts]
    steps = [make_step(layout, setup, rank) for layout, setup in arms]
    found: list[list[dict[str, float]]] = [[] for _ in arms]
    for i in range(-2, rounds):
        for j in range(len(arms)) if i % 2 else reversed(range(len(arms))):
            before = gauge.read()
            seconds = torch.tensor(spent(steps[j]), dtype=torch.float64)
            dist.all_reduce(seconds, dist.ReduceOp.MAX)
            after = gauge.read()
            if i >= 0:
                speeds = {name: (before[name] * after[name]) ** 0.5 for name in before}
                found[j].append(speeds | {"step": seconds.item()})
    if rank == 0:
        Path(folder, f"{world}.json").write_text(
            json.dumps([[*arm, f] for arm, f in zip(arms, found, strict=True)])
        )
    dist.barrier()
    dist.destroy_process_group()


def machine_as_hardware(speeds: dict[str, float], world: int) -> Hardware:
    return Hardware(
        name="here",
        source="measured",
        peak_flops=speeds["flops"],
        fp32_flops=speeds["flops"],
        memory=MEMORY,
        memory_bandwidth=speeds["bytes"],
        per_node=world,
        link=speeds["link"],
        network=speeds["link"],
        link_latency=speeds["message"],
        network_latency=speeds["message"],
        launch=speeds["call"],
        asynchronous=False,
        efficiency=1.0,
        bandwidth_efficiency=1.0,
        reserve=0.0,
    )


def job_of(layout: str) -> Job:
    return Job({"layout": layout, **SIZES}, LENGTH, bf16=False, gpu=False)


def step_rows(folder: Path) -> list[dict[str, Any]]:
    rows, jobs = [], {layout: job_of(layout) for layout in LAYOUTS}
    for world in SETUPS:
        for layout, fields, rounds in json.loads((folder / f"{world}.json").read_text()):
            setup = Setup(*fields)
            predicted = [
                estimate(jobs[layout], setup, machine_as_hardware(speeds, world), overlap=0.0).times
                for speeds in rounds
            ]
            ratios = [p.step / speeds["step"] for p, speeds in zip(predicted, rounds, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            mean = {name: statistics.median(speeds[name] for speeds in rounds) for name in rounds[0]}
            rows.append(
                {
                    "what": "step_ms",
                    "layout": layout,
                    "ranks": world,
                    "shared_by": shared_by(setup),
                    "predicted": round(1e3 * statistics.median(p.step for p in predicted), 1),
                    "measured": round(1e3 * mean["step"], 1),
                    "ratio": round(middle, 2),
                    "q1": round(low, 2),
                    "q3": round(high, 2),
                    "rounds": len(rounds),
                    "bound_by": predicted[0].bound_by,
                    "gflops": round(mean["flops"] / 1e9, 1),
                    "gbytes": round(mean["bytes"] / 1e9, 1),
                    "call_us": round(1e6 * mean["call"], 2),
                    "link_gbytes": round(mean["link"] / 1e9, 2) if world > 1 else "",
                    "message_us": round(1e6 * mean["message"]) if world > 1 else "",
                }
            )
    return rows


def shared_by(setup: Setup) -> str:
    if setup.gpus == 1:
        return "one"
    sharing = [f"{n} {getattr(setup, n)}" for n in ("context", "tensor") if getattr(setup, n) > 1]
    return " ".join([setup.strategy, *sharing])


def kept_bytes(layout: str) -> int:
    """What autograd keeps of a forward pass, parameters left out, each storage once."""
    model = attnzoo.create_model(layout, **SIZES)
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(z: torch.Tensor) -> torch.Tensor:
        storage = z.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return z

    tokens = torch.randint(SIZES["vocab_size"], (ROWS, LENGTH))
    with saved_tensors_hooks(pack, lambda z: z):
        loss = cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    total = sum(kept.values())
    del loss
    return total


def memory_rows(layouts: Sequence[str]) -> list[dict[str, Any]]:
    rows = []
    for layout in layouts:
        traced = job_of(layout).traced(Setup(rows=ROWS))
        predicted = sum(p.saved for p in traced.blocks) + traced.ends.saved
        measured = kept_bytes(layout)
        rows.append(
            {
                "what": "kept_kb",
                "layout": layout,
                "ranks": 1,
                "shared_by": "one",
                "predicted": round(predicted / 1024),
                "measured": round(measured / 1024),
                "ratio": round(predicted / measured, 3),
            }
        )
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="two rounds of one model, nothing written")
    args = parser.parse_args(argv)
    layouts, rounds = (LAYOUTS[:1], 2) if args.quick else (LAYOUTS, args.rounds)
    with tempfile.TemporaryDirectory() as folder:
        for world in SETUPS:
            mp.spawn(work, (world, folder, layouts, rounds), nprocs=world)
        rows = [*step_rows(Path(folder)), *memory_rows(layouts)]
    rows = [row | machine(cores=CORES) for row in rows]
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items() if key not in machine(cores=CORES)))
    if args.quick:
        return
    names = list(rows[0])
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, names, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()

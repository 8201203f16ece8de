"""How time and memory grow with the length: forward and backward on a CPU, a fresh process per point.

python scripts/bench_growth.py [--lengths 512 ... 16384] [--rounds 3]

By default mha, dcmha, and every variant whose cost per token, says the cost model, hardly grows with the
length: what it promises must show. Writes benchmarks/results/growth-cpu.csv. `extra_mib` is the peak of the
process's resident memory beyond what it held after a short warm-up; `time_exponent` and `memory_exponent` say
how the figures grew since the row above (1 = linear, 2 = quadratic).
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from bench_train import _peak, save, show

import attnzoo

OUT = Path(__file__).parents[1] / "benchmarks" / "results" / "growth-cpu.csv"
DIM, HEADS = 64, 4
QUADRATIC = ("mha", "dcmha")  # for comparison
OPTIONS: dict[str, dict[str, Any]] = {"l2vit": {"layer_idx": 1, "num_layers": 2}}  # its linear layer


def make(name: str, T: int) -> torch.nn.Module:
    return attnzoo.create(name, dim=DIM, num_heads=HEADS, max_seq_len=T, **OPTIONS.get(name, {}))


def linear_time() -> list[str]:
    """Variants that run at most a tenth more FLOPs per token at 16k tokens than at 8k."""
    found = []
    for name in attnzoo.list_variants():
        with torch.device("meta"):
            here, there = (make(name, T).cost(T).executed_flops for T in (16384, 8192))
        if here <= 1.1 * there:
            found.append(name)
    return found


def point(name: str, T: int, rounds: int) -> dict[str, Any]:
    """One length, in a process of its own: a peak of memory cannot be reset."""
    torch.manual_seed(0)
    mixer = make(name, T)

    def step(length: int) -> float:
        x = torch.randn(1, length, DIM, requires_grad=True)
        start = time.perf_counter()
        mixer(x).sum().backward()
        return time.perf_counter() - start

    step(64)
    before = _peak()
    seconds = [step(T) for _ in range(rounds)]
    low, middle, high = min(seconds), statistics.median(seconds), max(seconds)
    extra = (_peak() - before) / 2**20
    return {
        "variant": name,
        "T": T,
        "seconds": f"{middle:.4f}",
        "seconds_low": f"{low:.4f}",
        "seconds_high": f"{high:.4f}",
        "extra_mib": f"{extra:.1f}",
    }


def growth(rows: list[dict[str, Any]]) -> None:
    """Adds the exponents between neighbouring lengths of a variant."""
    for row, above in zip(rows, [None, *rows], strict=False):
        same = above is not None and above["variant"] == row["variant"]
        for column, out in (("seconds", "time_exponent"), ("extra_mib", "memory_exponent")):
            a, b = (float(r[column]) if r else 0.0 for r in (above, row))
            known = same and a > 0 and b > 0
            row[out] = f"{math.log(b / a) / math.log(row['T'] / above['T']):.2f}" if known else ""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--variants", nargs="+", default=[*QUADRATIC, *linear_time()])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(argv)
    rows = []
    for name in options.variants:
        for T in options.lengths:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                rows.append(pool.submit(point, name, T, options.rounds).result())
            print(rows[-1], flush=True)
    growth(rows)
    show(rows)
    save(options.out, rows)


if __name__ == "__main__":
    main()

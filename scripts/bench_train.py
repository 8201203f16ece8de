"""Training speed on this machine: attnzoo's mha against Hugging Face's Llama, then every variant against our
mha.

A measurement is one whole training step (forward, cross-entropy, backward, clipping, fused AdamW), the same
for both sides; sides take turns in one process and the order alternates, so that what disturbs the machine
disturbs both. Results go to ``benchmarks/results/train-<what>.csv``; see ``benchmarks/README.md``.
"""

from __future__ import annotations

import argparse
import csv
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import machine
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import attnzoo
from attnzoo.model.block import default_hidden

VOCAB = 256
FLOOR = ("aten::mm", "aten::addmm", "aten::bmm", "linear_pointwise", "scaled_dot_product", "_Kept")
LIMIT = 1.5  # a variant slower than this times its FLOP ratio needs a reason
REASONS = Path(__file__).parent.parent / "benchmarks" / "reasons.csv"


class Shape(NamedTuple):
    """Model size, sequence length and batch."""

    dim: int
    depth: int
    num_heads: int
    seq_len: int
    batch: int

    def __str__(self) -> str:
        return f"d{self.dim}-L{self.depth}-H{self.num_heads}-T{self.seq_len}-B{self.batch}"


SHAPES = (Shape(256, 6, 8, 256, 8), Shape(384, 6, 6, 512, 4))


class Hub(nn.Module):
    """Hugging Face's Llama of the same size, returning logits."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        self.inner = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCAB,
                hidden_size=shape.dim,
                num_hidden_layers=shape.depth,
                num_attention_heads=shape.num_heads,
                intermediate_size=default_hidden(shape.dim),
                max_position_embeddings=shape.seq_len,
                tie_word_embeddings=False,
                attn_implementation="sdpa",
            )
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(input_ids=tokens, use_cache=False).logits


def make_step(name: str, precision: str, shape: Shape) -> Callable[[], None]:
    """One optimiser step of ``name``, "llama" or a layout of `create_model`, as a function."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "dim": shape.dim, "depth": shape.depth, "num_heads": shape.num_heads}
    model = Hub(shape) if name == "llama" else attnzoo.create_model(name, **sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    text = torch.randint(VOCAB, (shape.batch, shape.seq_len + 1))
    tokens, targets = text[:, :-1].contiguous(), text[:, 1:].flatten()

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
            loss = cross_entropy(model(tokens).flatten(0, 1), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def take_turns(steps: Sequence[Callable[[], None]], rounds: int) -> list[list[float]]:
    """Seconds of each step in each round; every second round runs in reverse order."""
    seconds: list[list[float]] = [[] for _ in steps]
    for i in range(-2, rounds):
        order = range(len(steps)) if i % 2 else reversed(range(len(steps)))
        for j in order:
            start = time.perf_counter()
            steps[j]()
            if i >= 0:
                seconds[j].append(time.perf_counter() - start)
    return seconds


def peak_bytes(name: str, precision: str, shape: Shape) -> int:
    """What three steps add to a fresh process's peak memory."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_grown, name, precision, shape).result()


def _grown(name: str, precision: str, shape: Shape) -> int:
    make_step(name, precision, Shape(32, 1, 2, 8, 1))()  # libraries load on the first step
    before = _peak()
    step = make_step(name, precision, shape)
    for _ in range(3):
        step()
    return _peak() - before


def _peak() -> int:
    # getrusage's figure survives an exec and would be the parent's, so it is the second choice
    status = Path("/proc/self/status")
    if status.exists():
        return next(
            int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith("VmHWM")
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def quartiles(own: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Quartiles of how much faster ``own`` is than ``other``, round by round."""
    low, mid, high = statistics.quantiles([b / a for a, b in zip(own, other, strict=True)], n=4)
    return {"ratio": round(mid, 3), "q1": round(low, 3), "q3": round(high, 3)}


def bench_llama(shape: Shape, rounds: int) -> list[dict[str, Any]]:
    """Ours against Hugging Face's, in both precisions; ratios are to their fp32 and to their same
    precision.
    """
    arms = [("llama", "fp32"), ("mha", "fp32"), ("llama", "bf16"), ("mha", "bf16")]
    seconds = dict(zip(arms, take_turns([make_step(*arm, shape) for arm in arms], rounds), strict=True))
    memory = {arm: peak_bytes(*arm, shape) for arm in arms}
    rows = []
    for own, other in ((1, 0), (3, 0), (3, 2), (2, 0)):
        own, other = arms[own], arms[other]
        rows.append(
            {
                "shape": str(shape),
                "model": " ".join(own),
                "against": " ".join(other),
                **quartiles(seconds[own], seconds[other]),
                "rounds": rounds,
                "tokens_per_s": speed(seconds[own], shape),
                "against_tokens_per_s": speed(seconds[other], shape),
                "peak_mb": memory[own] >> 20,
                "against_peak_mb": memory[other] >> 20,
            }
        )
    return rows


def bench_variants(shape: Shape, rounds: int, precision: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """Every variant's time over our mha's, beside the ratio of executed FLOPs."""
    sizes = {"vocab_size": VOCAB, "dim": shape.dim, "depth": shape.depth, "num_heads": shape.num_heads}
    reasons = read_reasons()
    base = attnzoo.create_model("mha", **sizes).cost(shape.seq_len)
    rows = []
    for name in names:
        cost = attnzoo.create_model(name, **sizes).cost(shape.seq_len)
        base_seconds, seconds = take_turns(
            [make_step(arm, precision, shape) for arm in ("mha", name)], rounds
        )
        spread = quartiles(base_seconds, seconds)  # how much faster mha is: the variant's time ratio
        flops = cost.executed_flops / base.executed_flops
        slow = spread["ratio"] > LIMIT * flops
        rows.append(
            {
                "shape": str(shape),
                "precision": precision,
                "variant": name,
                "time_ratio": spread["ratio"],
                "q1": spread["q1"],
                "q3": spread["q3"],
                "rounds": rounds,
                "executed_flop_ratio": round(flops, 3),
                "forward_flop_ratio": round(cost.forward_flops / base.forward_flops, 3),
                "time_over_flops": round(spread["ratio"] / flops, 2),
                "tokens_per_s": speed(seconds, shape),
                "peak_mb": peak_bytes(name, precision, shape) >> 20,
                "flag": "slow" if slow else "",
                "reason": reasons.get(name, "not explained") if slow else "",
            }
        )
        show(rows[-1:])
    return rows


def bench_profile(shape: Shape, steps: int = 5) -> list[dict[str, Any]]:
    """Where a step's time goes, op by op, and the floor that products of matrices and attention alone set."""
    rows = []
    for arm in (("llama", "fp32"), ("mha", "fp32"), ("llama", "bf16"), ("mha", "bf16")):
        step = make_step(*arm, shape)
        step(), step()
        with torch.profiler.profile() as profiler:
            for _ in range(steps):
                step()
        times = {event.key: event.self_cpu_time_total / 1e3 / steps for event in profiler.key_averages()}
        total = sum(times.values())
        floor = sum(ms for name, ms in times.items() if any(word in name for word in FLOOR))
        times = {"all": total, "linears and attention": floor} | dict(
            sorted(times.items(), key=lambda item: -item[1])[:15]
        )
        for name, ms in times.items():
            rows.append(
                {"shape": str(shape), "model": " ".join(arm), "op": name, "ms_per_step": round(ms, 2),
                 "share": round(ms / total, 3)}
            )  # fmt: skip
        show(rows[-len(times) :][:2])
    return rows


def read_reasons() -> dict[str, str]:
    """Why a variant is slower than its FLOPs, by name."""
    if not REASONS.exists():
        return {}
    with REASONS.open(newline="") as file:
        return {row["variant"]: row["reason"] for row in csv.DictReader(file)}


def speed(seconds: Sequence[float], shape: Shape) -> int:
    return round(shape.batch * shape.seq_len / statistics.median(seconds))


def show(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items() if value != ""), flush=True)


def save(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    rows = [row | machine("transformers", threads=torch.get_num_threads()) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {path}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "what", nargs="*", default=["llama", "profile", "variants"], help="default: all three"
    )
    parser.add_argument("--rounds", type=int, default=21, help="pairs per ratio")
    parser.add_argument("--quick", action="store_true", help="5 rounds of the small shape, nothing written")
    parser.add_argument("--variants", default="*", help="glob of the variants to run")
    parser.add_argument("--precision", default="fp32,bf16", help="of the variants' table")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "benchmarks" / "results")
    args = parser.parse_args(argv)
    if set(args.what) - {"llama", "profile", "variants"}:
        parser.error(f"what: must be llama, profile or variants, got {' '.join(args.what)}")
    rounds, shapes = (5, SHAPES[:1]) if args.quick else (args.rounds, SHAPES)
    print(f"{sys.argv[0]}: {machine()}")
    tables: dict[str, list[dict[str, Any]]] = {}
    if "llama" in args.what:
        for shape in shapes:
            rows = bench_llama(shape, rounds)
            show(rows)
            tables.setdefault("llama", []).extend(rows)
    if "profile" in args.what:
        tables["profile"] = bench_profile(SHAPES[0])
    if "variants" in args.what:
        names = attnzoo.list_variants(args.variants)
        for precision in args.precision.split(","):
            tables.setdefault("variants", []).extend(bench_variants(SHAPES[0], rounds, precision, names))
    if not args.quick:
        for name, rows in tables.items():
            save(args.out / f"train-{name}.csv", rows)


if __name__ == "__main__":
    main()

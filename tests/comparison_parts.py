"""Curves, positions, decoding, profile, claims and runs of what `comparisons` makes up."""

from __future__ import annotations

import random
from typing import Any

from attnzoo.cards import TASKS


def curve(arm: tuple, seed: int) -> dict[str, Any]:
    noise = random.Random(f"{arm[0]} {seed}")
    tokens = [4096 * (step + 1) for step in range(0, 600, 4)]
    floor = 1.32 + arm[7] + random.Random(seed).gauss(0, 0.004)
    loss = [floor + 4.2 / (1 + t / 30_000) for t in tokens]
    val_tokens = tokens[9::10]
    return {
        "arm": arm[0],
        "seed": seed,
        "tokens": tokens,
        "flops": [t * arm[4] for t in tokens],
        "seconds": [t / tokens[-1] * arm[6] * (1 + 0.01 * seed) for t in tokens],
        "train_loss": [y + noise.gauss(0, 0.03) for y in loss],
        "val_tokens": val_tokens,
        "val": [y * 1.38 + noise.gauss(0, 0.004) for y in loss[9::10]],
        "val_key": "val_bpb",
    }


def positions(arm: tuple, seeds: int) -> dict[str, Any]:
    edges = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
    reach = 6 if arm[2] == "sparse" else 10
    mean = [1.25 + 1.9 * 0.62 ** min(i, reach) + arm[7] for i in range(len(edges) - 1)]
    loss = {
        str(seed): [y + random.Random(f"{arm[0]} {seed} {i}").gauss(0, 0.01) for i, y in enumerate(mean)]
        for seed in range(1, seeds + 1)
    }
    return {"arm": arm[0], "edges": edges, "loss": loss, "mean": mean}


def profile(labels: list[str], seeds: int) -> dict[str, Any]:
    chance = random.Random(5)
    mean = [[round(min(1.0, max(0.02, chance.betavariate(1.2, 0.6))), 3) for _ in TASKS] for _ in labels]
    return {
        "tasks": TASKS,
        "arms": labels,
        "mean": mean,
        "low": [[max(0.0, v - 0.04) for v in row] for row in mean] if seeds > 1 else None,
        "high": [[min(1.0, v + 0.04) for v in row] for row in mean] if seeds > 1 else None,
        "seeds": [[seeds for _ in TASKS] for _ in labels],
    }


def decode(arm: tuple) -> dict[str, Any]:
    linear = arm[2] == "linear"
    return {
        "arm": arm[0],
        "context": [128, 256, 512],
        "ms_per_token": [arm[8] * f for f in ((1, 1, 1) if linear else (0.7, 0.83, 1))],
        "cache_bytes": [arm[5] * f for f in ((1, 1, 1) if linear else (0.25, 0.5, 1))],
    }


def claims(labels: list[str]) -> list[dict[str, Any]]:
    made = [
        (
            "gqa num_kv_heads=2",
            "Close to the quality of multi-head attention at a fraction of the cache",
            "T5 XXL, uptrained",
            "val_bpb",
            "equal",
            "not distinguishable",
            "interval -0.004 to 0.011 holds 0",
        ),
        (
            "mla",
            "A cache of 7 % of multi-head attention's",
            "DeepSeek-V2, 236B",
            "cache_bytes",
            "lower",
            "reproduced",
            "14.1 % here",
        ),
        (
            "gated_deltanet",
            "Lower perplexity than softmax attention",
            "1.3B, 100B tokens of FineWeb",
            "val_bpb",
            "lower",
            "reproduced",
            "difference -0.031",
        ),
        (
            "sliding_window",
            "No loss of quality at short contexts",
            "",
            "val_bpb",
            "equal",
            "contradicted",
            "0.034 above the baseline",
        ),
        (
            "gated_deltanet",
            "Extrapolates to 20 times the training length",
            "1.3B",
            "",
            "",
            "not tested",
            "no metric here",
        ),
    ]
    names = ("arm", "text", "where", "metric", "expect", "verdict", "reason")
    return [dict(zip(names, claim, strict=True)) | {"against": "mha"} for claim in made if claim[0] in labels]


def run(label: str, setting: str, seed: int) -> dict[str, Any]:
    variant = label.split()[0]
    return {
        "folder": f"runs/example/cells/{variant}-s{seed}",
        "arm": label,
        "setting": setting,
        "seed": seed,
        "status": "completed",
        "summary": {
            "val_bpb": 1.9 + seed / 100,
            "train_loss": 1.31,
            "params": 10_652_160,
            "tokens": 2_457_600,
            "tokens_per_second": 6012.3,
            "peak_memory_bytes": 1_474_560_000,
        },
        "config_diff": {"seed": [1, seed], "attention.name": ["mha", variant]},
        "environment": {
            "versions": {"torch": "2.10.0", "python": "3.12.4"},
            "platform": "Linux x86_64",
            "device": "cpu",
            "impl": "sdpa" if variant == "mha" else "reference",
            "ranks": 1,
        },
    }

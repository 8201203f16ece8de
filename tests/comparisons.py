"""Comparisons made up for the report page: whole, according to the schema, and the same for every call."""

from __future__ import annotations

import random
from statistics import stdev
from typing import Any

from scipy import stats

from comparison_parts import claims, curve, decode, positions, profile, run

# label, title, family, params, FLOPs per token, cache bytes, seconds, shift of val bpb, ms per token
ARMS = [
    ("mha", "Multi-head attention", "heads", 10_652_160, 62.1e6, 3_145_728, 410.0, 0.0, 4.1),
    (
        "gqa num_kv_heads=2",
        "Grouped-query attention",
        "heads",
        10_651_392,
        62.0e6,
        786_432,
        398.0,
        0.003,
        3.6,
    ),
    ("mla", "Multi-head latent attention", "latent", 10_660_608, 63.8e6, 442_368, 452.0, -0.019, 4.4),
    ("gated_deltanet", "Gated DeltaNet", "linear", 10_671_104, 58.4e6, 196_608, 537.0, -0.031, 2.9),
    ("sliding_window", "Sliding-window attention", "sparse", 10_652_160, 59.7e6, 393_216, 405.0, 0.034, 3.1),
]
METRICS = [
    ("val_bpb", "Validation bits per byte", "bits/byte", "lower", False),
    ("params", "Parameters", "", "lower", True),
    ("train_flops", "Training FLOPs per token", "FLOPs/token", "lower", True),
    ("cache_bytes", "Decoding cache at T", "bytes", "lower", True),
    ("tokens_per_second", "Training speed", "tokens/s", "higher", False),
    ("seconds", "Wall time of the run", "s", "lower", False),
    ("peak_memory_bytes", "Peak memory", "bytes", "lower", False),
    ("decode_ms", "Decoding at T", "ms/token", "lower", False),
]


def comparison(seeds: int = 3, settings: tuple[str, ...] = ("",), arms: int = len(ARMS)) -> dict[str, Any]:
    """A comparison with every part filled in.

    Args:
        seeds: how many per arm; one gives no verdict. settings: their labels. arms: how many of ``ARMS``.
    """
    labels = [arm[0] for arm in ARMS[:arms]]
    return {
        "format": 1,
        "title": "Five attention variants on source code",
        "created": "2026-11-26T04:04:40+00:00",
        "command": "attnzoo compare attention=mha,gqa,mla,gated_deltanet,sliding_window match=params seeds=3",
        "forced": [],
        "left_out": [],
        "method": {
            "interval": "t",
            "level": 0.95,
            "correction": "holm",
            "text": "Differences are paired over seeds: the same seed gives every arm the same data order. "
            "Intervals are Student's t at 95 %; p values are corrected over the arms by Holm's method. "
            "The seeds needed are those at which a difference of this size and spread would be found with "
            "a power of 80 %.",
        },
        "baseline": "mha",
        "notes": ["Times were taken on a machine that did nothing else."],
        "arms": [_arm(arm, seeds) for arm in ARMS[:arms]],
        "settings": [_setting(name, seeds, arms) for name in settings],
        "profile": profile(labels, seeds),
        "claims": claims(labels),
        "runs": [
            run(label, name, seed) for name in settings for label in labels for seed in range(1, seeds + 1)
        ],
    }


def bare() -> dict[str, Any]:
    """One run and nothing measured but its loss: every part that may be missing is missing."""
    full = comparison(seeds=1, arms=1)
    setting = full["settings"][0]
    setting["metrics"] = setting["metrics"][:1]
    setting["results"] = setting["results"][:1]
    setting.update(curves=[], positions=[], decode=[])
    full.update(profile=None, claims=[], notes=[], runs=[])
    full["arms"][0].update(matched=None, tune=None)
    return full


def _arm(arm: tuple, seeds: int) -> dict[str, Any]:
    label, title, family, params = arm[:4]
    baseline = label == "mha"
    hidden = 341 + len(label)
    matched = {
        "budget": "params",
        "target": 10_652_160,
        "value": params,
        "knob": "model.mlp_hidden",
        "from": 341,
        "to": hidden,
        "deviation": params / 10_652_160 - 1,
    }
    grid = {"0.001": 2.11, "0.003": 2.02, "0.01": 2.07}
    return {
        "label": label,
        "variant": label.split()[0],
        "title": title,
        "arxiv": {"mha": "1706.03762", "mla": "2405.04434", "gated_deltanet": "2412.06464"}.get(label, ""),
        "family": family,
        "summary": f"{title} in one sentence.",
        "baseline": baseline,
        "seeds": list(range(1, seeds + 1)),
        "config_diff": {}
        if baseline
        else {"attention.name": ["mha", label.split()[0]], "model.mlp_hidden": [341, hidden]},
        "matched": None if baseline else matched,
        "tune": {
            "lr": 0.003 if label != "mla" else 0.01,
            "grid": [0.001, 0.003, 0.01],
            "at_edge": label == "mla",
            "val": grid,
            "tokens": 3_000_000,
            "flops": 1.9e14,
            "seconds": 240.0,
        },
    }


def _values(arm: tuple, metric: str, seeds: int) -> dict[str, float]:
    label, _, _, params, flops, cache, seconds, shift, decode = arm
    exact = {"params": params, "train_flops": flops, "cache_bytes": cache}
    values = {}
    for seed in range(1, seeds + 1):
        common = random.Random(seed).gauss(0, 0.006)
        own = random.Random(f"{label} {metric} {seed}").gauss(0, 1)
        values[str(seed)] = (
            exact.get(metric)
            or {
                "val_bpb": 1.912 + common + shift + 0.003 * own,
                "seconds": seconds * (1 + 0.01 * own),
                "tokens_per_second": 6e6 / seconds * (1 + 0.01 * own),
                "peak_memory_bytes": 1.4e9 + cache * 24 + 1e6 * own,
                "decode_ms": decode * (1 + 0.02 * own),
            }[metric]
        )
    return values


def _result(arm: tuple, metric: tuple, seeds: int, number: int) -> dict[str, Any]:
    key, _, _, better, exact = metric
    own, base = _values(arm, key, seeds), _values(ARMS[0], key, seeds)
    mean, n = sum(own.values()) / len(own), len(own)
    result = {
        "arm": arm[0],
        "metric": key,
        "values": own,
        "mean": mean,
        "n": n,
        "p": None,
        "p_adjusted": None,
        "sd": stdev(list(own.values())) if n > 1 else None,
        "difference": None,
        "low": None,
        "high": None,
        "ratio": None,
        "verdict": "baseline",
        "seeds_needed": None,
        "reason": "",
    }
    if arm is ARMS[0]:
        return result
    paired = [own[seed] - base[seed] for seed in own]
    difference = sum(paired) / n
    result.update(difference=difference, ratio=mean / (sum(base.values()) / n))
    if exact:
        verdict = "equal" if difference == 0 else "better" if difference < 0 else "worse"
        return result | {"verdict": verdict}
    if n == 1:
        return result | {"verdict": "no verdict", "reason": "a single seed"}
    half = stats.t.ppf(0.975, n - 1) * stdev(paired) / n**0.5
    p = float(stats.ttest_1samp(paired, 0).pvalue)
    found = (difference < 0) == (better == "lower")
    sure = abs(difference) > half and p * number < 0.05
    result.update(
        low=difference - half,
        high=difference + half,
        p=p,
        p_adjusted=min(1.0, p * number),
        verdict=("better" if found else "worse") if sure else "not distinguishable",
        seeds_needed=None if sure else 7,
    )
    return result


def _setting(name: str, seeds: int, arms: int) -> dict[str, Any]:
    chosen = ARMS[:arms]
    number = max(1, arms - 1)
    return {
        "name": name,
        "conditions": {
            "data": "stdlib",
            "path": None,
            "data_fingerprint": "a8b3e7",
            "tokenizer": "bytes",
            "tokenizer_fingerprint": "0f12c4",
            "seq_len": 512,
            "steps": 600,
            "batch_size": 8,
            "tokens": 2_457_600,
            "precision": "bf16-mixed",
            "val_samples": 256,
            "device": "cpu",
            "torch": "2.10.0",
        },
        "arms": [arm[0] for arm in chosen],
        "metrics": [
            dict(zip(("key", "title", "unit", "better", "exact"), metric, strict=True)) for metric in METRICS
        ],
        "results": [_result(arm, metric, seeds, number) for metric in METRICS for arm in chosen],
        "curves": [curve(arm, seed) for arm in chosen for seed in range(1, seeds + 1)],
        "positions": [positions(arm, seeds) for arm in chosen],
        "decode": [decode(arm) for arm in chosen],
    }

"""What is compared: one row per metric, and how a run gives its value."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from attnzoo.compare.runs import Run

FIRST = 8  # positions that have next to no context
MOST_POINTS = 400


@dataclass(frozen=True)
class Metric:
    """A column of the comparison.

    Args:
        better: "lower" or "higher". exact: counted, not measured: the same for every seed.
        timed: depends on the machine and on what ran beside it. learned: what training was for.
    """

    key: str
    title: str
    unit: str
    better: str
    value: Callable[[Run], Any]
    exact: bool = False
    timed: bool = False
    learned: bool = False

    def of(self, run: Run) -> float | None:
        """The run's value; None where it has none."""
        value = self.value(run)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return None
        return value


def _summary(key: str) -> Callable[[Run], Any]:
    return lambda run: run.summary.get(key)


def _cache_bytes(run: Run) -> float | None:
    per_token, state = (run.summary.get(key) for key in ("cache_bytes_per_token", "state_bytes"))
    return None if per_token is None or state is None else run.summary["seq_len"] * per_token + state


def _decode_ms(run: Run) -> float | None:
    measured = (run.summary.get("decode") or {}).get("ms_per_token")
    return measured[-1] if measured else None


def context_gain(positions: Mapping[str, Sequence[float]] | None) -> float | None:
    """Bits per token by which the last half of the positions is predicted better than the first eight.

    The first eight have next to no context; both are means over their positions. Buckets that straddle a
    border count as far as they lie inside.

    Args:
        positions: "edges" and "loss" (nats per token, None where there is no target) of the buckets between.
    """
    if not positions or len(positions["edges"]) < 2 or positions["edges"][-1] < 2 * FIRST:
        return None
    edges, losses = positions["edges"], positions["loss"]

    def mean(start: float, end: float) -> float:
        shares = [max(0.0, min(b, end) - max(a, start)) for a, b in pairwise(edges)]
        inside = [(s, x) for s, x in zip(shares, losses, strict=True) if s and x is not None]
        return sum(s * x for s, x in inside) / sum(s for s, _ in inside) if inside else math.nan

    return (mean(0, FIRST) - mean(edges[-1] / 2, edges[-1])) / math.log(2)


METRICS = (
    Metric("val_bpb", "Validation bits per byte", "bits/byte", "lower", _summary("val_bpb"), learned=True),
    Metric("accuracy", "Accuracy", "", "higher", _summary("val_accuracy"), learned=True),
    Metric("val_loss", "Validation loss", "nats/token", "lower", _summary("val_loss"), learned=True),
    Metric(
        "context_gain",
        "Gain from context",
        "bits/token",
        "higher",
        lambda run: context_gain(run.summary.get("val_loss_by_position")),
        learned=True,
    ),
    Metric("params", "Parameters", "", "lower", _summary("params"), exact=True),
    Metric(
        "train_flops",
        "Training FLOPs per token",
        "FLOPs/token",
        "lower",
        _summary("train_flops_per_token"),
        exact=True,
    ),
    Metric("cache_bytes", "Decoding cache at T", "bytes", "lower", _cache_bytes, exact=True),
    Metric(
        "tokens_per_second",
        "Training speed",
        "tokens/s",
        "higher",
        _summary("tokens_per_second"),
        timed=True,
    ),
    Metric("seconds", "Wall time of the run", "s", "lower", _summary("seconds"), timed=True),
    Metric("peak_memory_bytes", "Peak memory", "bytes", "lower", _summary("peak_memory_bytes"), timed=True),
    Metric("decode_ms", "Decoding at T", "ms/token", "lower", _decode_ms, timed=True),
)
BY_KEY = {metric.key: metric for metric in METRICS}
HEADLINE = ("val_bpb", "accuracy", "val_loss")


def headline(keys: Sequence[str]) -> str | None:
    """The measure of quality that a setting is read by."""
    return next((key for key in HEADLINE if key in keys), None)


def curve(run: Run) -> dict[str, Any]:
    """Losses of a run against tokens, FLOPs and seconds; ``val`` is that of ``val_key``."""
    flops = run.summary.get("train_flops_per_token")
    lines = _thinned([line for line in run.metrics if line.get("train_loss") is not None])
    keys = {"val_bpb": "val_bpb", "val_accuracy": "accuracy", "val_loss": "val_loss"}
    source = next((key for key in keys if any(line.get(key) is not None for line in run.metrics)), "val_loss")
    validated = _thinned([line for line in run.metrics if line.get(source) is not None])
    return {
        "tokens": [line["tokens"] for line in lines],
        "flops": [line["tokens"] * flops if flops else None for line in lines],
        "seconds": [line["seconds"] for line in lines],
        "train_loss": [line["train_loss"] for line in lines],
        "val_tokens": [line["tokens"] for line in validated],
        "val": [line[source] for line in validated],
        "val_key": keys[source],
    }


def _thinned(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most `MOST_POINTS` of them, evenly, with the first and the last."""
    if len(lines) <= MOST_POINTS:
        return lines
    return [lines[round(i * (len(lines) - 1) / (MOST_POINTS - 1))] for i in range(MOST_POINTS)]

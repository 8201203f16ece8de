"""Estimates as tables and as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attnzoo.plan.estimate import Choice, Estimate
from attnzoo.plan.hardware import GIB
from attnzoo.plan.memory import PARTS as MEMORY
from attnzoo.plan.times import PARTS as TIMES

HEAD = (
    "gpus",
    "layout",
    *(f"{name} GiB" for name in MEMORY),
    "total GiB",
    *(f"{name} s" for name in TIMES),
    "step s",
    "tokens/s",
    "MFU",
    "bound by",
)


def layout_of(found: Estimate) -> str:
    """The layout in words: ranks for data, context and tensor, and the micro-batches."""
    setup = found.setup
    sharing = [f"{setup.strategy} {setup.data}"] if setup.gpus > 1 else ["one"]
    sharing += [f"context {setup.context}"] if setup.context > 1 else []
    sharing += [f"tensor {setup.tensor}"] if setup.tensor > 1 else []
    text = f"{' x '.join(sharing)}, {setup.accumulate} x {setup.rows}"
    return f"{text}, recomputed" if setup.recompute else text


def as_row(found: Estimate) -> list[str]:
    """What `HEAD` names; empty where a part is nothing."""
    times, low, high = found.times, *found.times.bounds
    return [
        str(found.setup.gpus),
        layout_of(found),
        *(_number(getattr(found.memory, name) / GIB) for name in MEMORY),
        f"{found.memory.total / GIB:.1f}",
        *(_number(getattr(times, name)) for name in TIMES),
        f"{times.step:.2f} ({low:.2f}-{high:.2f})",
        f"{found.tokens_per_second:,.0f}",
        f"{100 * found.mfu:.0f}%",
        times.bound_by,
    ]


def without_empty(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """The columns of a table, with its head first, that have something in them."""
    kept = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    return [[row[i] for i in kept] for row in rows]


def as_values(choice: Choice) -> dict[str, Any]:
    """Plain values: bytes, seconds."""
    found = choice.best
    values: dict[str, Any] = {
        "gpus": choice.gpus,
        "fits": found is not None,
        "left_out": dict(choice.left_out),
    }
    if found is None:
        return values
    low, high = found.times.bounds
    return values | {
        "layout": found.setup._asdict() | {"data": found.setup.data},
        "memory_bytes": {name: getattr(found.memory, name) for name in (*MEMORY, "total", "lower")},
        "seconds": {name: getattr(found.times, name) for name in (*TIMES, "hidden", "step")}
        | {"step_all_hidden": low, "step_none_hidden": high},
        "tokens_per_second": found.tokens_per_second,
        "mfu": found.mfu,
        "bound_by": found.times.bound_by,
    }


def _number(value: float) -> str:
    return "" if value < 5e-4 else f"{value:.2f}" if value < 10 else f"{value:.1f}"

"""What must agree before two numbers are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attnzoo.compare.arms import Member
from attnzoo.compare.runs import Run

# of `conditions`: what was learned from, for how long, and what is held out
MUST_AGREE = (
    "data_fingerprint",
    "tokenizer_fingerprint",
    "seq_len",
    "steps",
    "batch_size",
    "tokens",
    "precision",
    "val_samples",
    "val_fraction",
    "isolate",
)


def conditions(run: Run) -> dict[str, Any]:
    """The conditions of a run, in words and numbers."""
    data, tokenizer = run.config["data"], run.config.get("tokenizer") or {}
    return {
        "data": data.get("name"),
        "path": data.get("path"),
        "data_fingerprint": run.environment.get("data_fingerprint"),
        "tokenizer": tokenizer.get("name"),
        "tokenizer_fingerprint": run.environment.get("tokenizer_fingerprint"),
        "seq_len": run.summary["seq_len"],
        "steps": run.summary["steps"],
        "batch_size": data.get("batch_size"),
        "tokens": run.summary["tokens"],
        "precision": str(run.environment.get("precision")).split(" (")[0],
        "val_samples": data.get("val_samples"),
        "val_fraction": data.get("val_fraction"),
        "isolate": data.get("isolate"),
        "device": run.environment.get("device"),
        "ranks": run.environment.get("ranks"),
        "torch": (run.environment.get("versions") or {}).get("torch"),
        "measures": run.summary.get("val_measures"),
    }


def common_conditions(members: Sequence[Member]) -> dict[str, Any]:
    """The conditions of a setting; a list where its runs differ."""
    every = [conditions(member.run) for member in members]
    merged = {}
    for key in every[0]:
        values = list(
            dict.fromkeys(one[key] if not isinstance(one[key], list) else str(one[key]) for one in every)
        )
        merged[key] = values[0] if len(values) == 1 else values
    return merged


def disagreements(members: Sequence[Member], *, by_folder: bool) -> list[str]:
    """Fields in which the runs of a setting differ though they must not: "steps: 300 in mha, 200 in mla".

    Args:
        by_folder: name run folders instead of arms.
    """
    return [text for field in MUST_AGREE if (text := who_has_what(members, field, by_folder=by_folder))]


def who_has_what(members: Sequence[Member], field: str, *, by_folder: bool = False) -> str:
    """Which runs have which value of a condition; "" where all have the same."""
    holders: dict[str, list[str]] = {}
    for member in members:
        value = conditions(member.run)[field]
        word = str(value)[:8] if field.endswith("_fingerprint") else str(value)
        who = str(member.run.folder) if by_folder else member.arm
        holders.setdefault(word, []).append(who)
    if len(holders) < 2:
        return ""
    listed = (f"{value} in {', '.join(dict.fromkeys(who))}" for value, who in holders.items())
    return f"{field}: {'; '.join(listed)}"

"""What stands behind the numbers: how the arms differ, and every run with its configuration and machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from attnzoo.compare.arms import flatten
from attnzoo.compare.page.facts import BUDGETS
from attnzoo.compare.page.numbers import grouped, quantity

UNITS = {
    "val_bpb": "bits/byte",
    "val_loss": "nats/token",
    "train_loss": "nats/token",
    "val_accuracy": "share",
    "peak_memory_bytes": "bytes",
    "state_bytes": "bytes",
    "cache_bytes_per_token": "bytes",
    "seconds": "s",
}
# the first of these that a run has stands in its headline
NAMES = {"val_bpb": "bits/byte", "val_accuracy": "accuracy", "val_loss": "nats/token"}
ARXIV = re.compile(r"\d{4}\.\d{4,5}(v\d+)?|[a-z-]+(\.[A-Z]{2})?/\d{7}")


def arm_records(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """Every arm: what it is, what differs from the baseline, what was solved, how its rate was found."""
    return [
        {
            "label": arm["label"],
            "title": arm["title"],
            "summary": arm["summary"],
            "family": arm["family"],
            "baseline": arm["baseline"],
            "arxiv": arm["arxiv"] if ARXIV.fullmatch(arm["arxiv"] or "") else "",
            "changes": changes(arm["config_diff"]),
            "matched": _matched(arm["matched"]),
            "tune": _tuned(arm["tune"]),
        }
        for arm in comparison["arms"]
    ]


def changes(differences: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(key, the baseline's value, own value); what one lacks and the other has as null is none."""
    shown = [(key, *map(_shown, pair)) for key, pair in sorted(differences.items())]
    return [row for row in shown if row[1] != row[2]]


def _shown(value: Any) -> str:
    return "not set" if value is None else str(value)


def _matched(matched: dict[str, Any] | None) -> str:
    if not matched:
        return ""
    budget = BUDGETS.get(matched["budget"], matched["budget"])
    off = f"{100 * matched['deviation']:+.2f} %".replace("-", "−")
    if not matched.get("knob") or matched.get("from") == matched.get("to"):
        return f"{off} off the baseline's {budget}; nothing had to be changed"
    before, after = (_joined(matched[end]) for end in ("from", "to"))
    return f"{matched['knob']} {before} → {after}: {off} off the baseline's {budget}"


def _joined(value: Any) -> str:
    return " + ".join(map(str, value)) if isinstance(value, list) else str(value)


def _tuned(tune: dict[str, Any] | None) -> dict[str, Any] | None:
    if not tune:
        return None
    cost = [
        f"{quantity(tune[key])} {name}"
        for key, name in (("tokens", "tokens"), ("flops", "FLOPs"))
        if tune.get(key)
    ]
    if tune.get("seconds"):
        cost.append(quantity(tune["seconds"], "s"))
    tried = [
        (rate, quantity(loss, "nats/token"), tune["lr"] is not None and float(rate) == tune["lr"])
        for rate, loss in (tune["val"] or {}).items()
    ]
    return {"lr": tune["lr"], "at_edge": tune["at_edge"], "tried": tried, "cost": ", ".join(cost)}


def run_records(comparison: dict[str, Any]) -> dict[str, Any] | None:
    """Every run, and apart from them the environment that all share."""
    if not comparison["runs"]:
        return None
    environments = [flat(run["environment"] or {}) for run in comparison["runs"]]
    shared = {
        key: value
        for key, value in environments[0].items()
        if all(key in each and each[key] == value for each in environments)
    }
    runs = [
        {
            "folder": run["folder"],
            "arm": run["arm"],
            "setting": run["setting"],
            "seed": run["seed"],
            "status": run["status"],
            "quality": next(
                (
                    f"{_summed(key, run['summary'][key])} {NAMES[key]}"
                    for key in NAMES
                    if (run["summary"] or {}).get(key) is not None
                ),
                "",
            ),
            "summary": [
                (key, _summed(key, value))
                for key, value in flat(run["summary"] or {}).items()
                if value is not None
            ],
            "changes": changes(run["config_diff"] or {}),
            "environment": [(key, _shown(value)) for key, value in environment.items() if key not in shared],
        }
        for run, environment in zip(comparison["runs"], environments, strict=True)
    ]
    return {"shared": [(key, _shown(value)) for key, value in shared.items()], "runs": runs}


def flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A nested mapping with dotted keys; an empty one has none."""
    return {key: value for key, value in flatten(tree) if not isinstance(value, Mapping)}


def _summed(key: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _shown(value)
    if isinstance(value, int) and key not in UNITS:
        return grouped(value)
    return quantity(value, UNITS.get(key, ""))

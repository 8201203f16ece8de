"""What the page says in words: the finding, what must be said before it, and the conditions."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from ..metrics import headline
from .numbers import quantity

BUDGETS = {"params": "parameters", "train_flops": "training FLOPs per token", "cache": "cache bytes"}
TITLES = {"seq_len": "context T", "batch_size": "batch", "precision": "precision", "tokenizer": "tokenizer"}


def finding(comparison: dict[str, Any], setting: dict[str, Any]) -> str:
    """One sentence: how many variants are better or worse than the baseline, or neither; and the terms."""
    quality = headline([metric["key"] for metric in setting["metrics"]])
    results = [r for r in setting["results"] if r["metric"] == quality]
    others = [r for r in results if r["verdict"] != "baseline"]
    title = next((metric["title"].lower() for metric in setting["metrics"] if metric["key"] == quality), "")
    if not others:
        return (
            "There is nothing to compare with the baseline." if results else "No run has a validation result."
        )
    if all(r["verdict"] == "no verdict" for r in others):
        return f"No verdict in {title}: " + (
            "one seed cannot tell a difference from noise."
            if max(r["n"] for r in results) < 2
            else "too few seeds are paired with the baseline."
        )
    return f"{_counted(others, comparison['baseline'], title)}{_terms(comparison, others)}."


def _counted(results: list[dict[str, Any]], baseline: str | None, title: str) -> str:
    """`2 of 4 variants are better than mha in bits per byte, 1 is worse and 1 is not distinguishable`."""
    words = {
        "better": "better than",
        "worse": "worse than",
        "equal": "equal to",
        "not distinguishable": "not distinguishable from",
        "no verdict": "without a verdict against",
    }
    phrases = []
    for verdict, relation in words.items():
        count = sum(r["verdict"] == verdict for r in results)
        verb = "is" if count == 1 else "are"
        if count and not phrases:
            who = f"{count} of {len(results)} variants" if len(results) > 1 else results[0]["arm"]
            phrases.append(f"{who} {verb} {relation} {baseline} in {title}")
        elif count:
            phrases.append(f"{count} {verb} {relation.rsplit(' ', 1)[0]}")
    return " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)


def _terms(comparison: dict[str, Any], results: list[dict[str, Any]]) -> str:
    budget = budget_of(comparison)
    least, most = min(r["n"] for r in results), max(r["n"] for r in results)
    seeds = f"{most} seed{'s' if most > 1 else ''}" if least == most else f"{least} to {most} seeds"
    return f", at equal {budget} and {seeds}" if budget else f", at {seeds}"


def budget_of(comparison: dict[str, Any]) -> str:
    """What all arms were made equal in, in words; empty where nothing was."""
    budgets = {arm["matched"]["budget"] for arm in comparison["arms"] if arm["matched"]}
    return " and ".join(BUDGETS.get(budget, budget) for budget in sorted(budgets))


def said_first(comparison: dict[str, Any]) -> list[dict[str, Any]]:
    """Warnings, the gravest first: what was forced, then what was left out."""
    warnings = []
    if comparison["forced"]:
        title = "These runs are not comparable; the comparison was forced."
        warnings.append({"kind": "forced", "title": title, "lines": comparison["forced"]})
    if comparison["left_out"]:
        lines = [f"{each['folder']}: {each['reason']}" for each in comparison["left_out"]]
        many = f"{len(lines)} runs were" if len(lines) > 1 else "One run was"
        warnings.append({"kind": "left-out", "title": f"{many} left out.", "lines": lines})
    return warnings


def conditions(setting: dict[str, Any], comparison: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of everything that the arms of a setting share."""
    facts = [
        (TITLES.get(name, name.replace("_", " ")), _plain(name, value))
        for name, value in setting["conditions"].items()
        if value is not None
    ]
    if budget := budget_of(comparison):
        facts.append(("equal in", budget))
    arms = [arm for arm in comparison["arms"] if arm["label"] in setting["arms"]]
    seeds = sorted({seed for arm in arms for seed in arm["seeds"]})
    if seeds:
        facts.append(("seeds", ", ".join(map(str, seeds))))
    return facts


def _plain(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return quantity(value) if name == "tokens" else f"{value:,}".replace(",", " ")


def moment(created: str) -> str:
    """A time for people; as it stands if it is none."""
    try:
        return datetime.fromisoformat(created).strftime("%d %B %Y, %H:%M %Z").strip(" ,")
    except ValueError:
        return created

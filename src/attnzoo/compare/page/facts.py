"""What the page says in words: the finding, what must be said before it, and the conditions."""

from __future__ import annotations

from typing import Any

from ..metrics import headline
from .numbers import quantity

BUDGETS = {"params": "parameters", "train_flops": "training FLOPs per token", "cache": "cache bytes"}
TITLES = {"seq_len": "context T", "batch_size": "batch", "precision": "precision", "tokenizer": "tokenizer"}


def finding(comparison: dict[str, Any], setting: dict[str, Any] | None = None) -> str:
    """One sentence: how many variants are better, worse or neither than the baseline, and under what terms.

    Args:
        setting: the one to speak of; by default the only one, or how many there are.
    """
    settings = comparison["settings"]
    if setting is None:
        if len(settings) != 1:
            return " ".join(f"{each['name']}: {finding(comparison, each)}" for each in settings)
        setting = settings[0]
    quality = headline([metric["key"] for metric in setting["metrics"]])
    results = [r for r in setting["results"] if r["metric"] == quality]
    others = [r for r in results if r["verdict"] != "baseline"]
    title = next((metric["title"].lower() for metric in setting["metrics"] if metric["key"] == quality), "")
    if not others:
        return "There is nothing to compare with the baseline." if results else "No run has a validation result."
    if all(r["verdict"] == "no verdict" for r in others):
        return f"No verdict in {title}: " + (
            "one seed cannot tell a difference from noise."
            if max(r["n"] for r in results) < 2
            else "too few seeds are paired with the baseline."
        )
    return f"{_counted(others, comparison['baseline'])} in {title}{_terms(comparison, others)}."


def _counted(results: list[dict[str, Any]], baseline: str | None) -> str:
    """`2 of 4 variants are better than mha, 1 is worse, 1 is not distinguishable`."""
    total = len(results)
    phrases = []
    for verdict, words in (("better", f"better than {baseline}"), ("worse", "worse"), ("equal", "equal"),
                           ("not distinguishable", "not distinguishable"), ("no verdict", "without a verdict")):  # fmt: skip
        count = sum(r["verdict"] == verdict for r in results)
        if count:
            if not phrases and verdict != "better":
                words += {"worse": f" than {baseline}", "equal": f" to {baseline}",
                          "not distinguishable": f" from {baseline}"}.get(verdict, "")  # fmt: skip
            of = f" of {total} variants" if not phrases and total > 1 else ""
            noun = "The variant" if total == 1 else f"{count}{of}"
            phrases.append(f"{noun} {'is' if count == 1 else 'are'} {words}")
    return ", ".join(phrases)


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
    """Warnings, the gravest first: what was forced, then what was left out, then single seeds."""
    warnings = []
    if comparison["forced"]:
        title = "These runs are not comparable; the comparison was forced."
        warnings.append({"kind": "forced", "title": title, "lines": comparison["forced"]})
    if comparison["left_out"]:
        lines = [f"{each['folder']}: {each['reason']}" for each in comparison["left_out"]]
        many = f"{len(lines)} runs were" if len(lines) > 1 else "One run was"
        warnings.append({"kind": "left-out", "title": f"{many} left out.", "lines": lines})
    if comparison["notes"]:
        warnings.append({"kind": "notes", "title": "Notes", "lines": comparison["notes"]})
    return warnings


def conditions(setting: dict[str, Any], comparison: dict[str, Any]) -> list[tuple[str, str]]:
    """Name and value of everything that the arms of a setting share."""
    facts = [(TITLES.get(name, name.replace("_", " ")), _plain(name, value))
             for name, value in setting["conditions"].items() if value is not None]  # fmt: skip
    if budget := budget_of(comparison):
        facts.append(("equal in", budget))
    seeds = sorted({seed for arm in comparison["arms"] if arm["label"] in setting["arms"] for seed in arm["seeds"]})
    if seeds:
        facts.append(("seeds", ", ".join(map(str, seeds))))
    return facts


def _plain(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return quantity(value) if name == "tokens" else f"{value:,}".replace(",", " ")


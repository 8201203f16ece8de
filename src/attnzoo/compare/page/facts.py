"""What the page says in words: the finding, what must be said before it, and the conditions."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from attnzoo.compare.metrics import headline
from attnzoo.compare.page.numbers import grouped, quantity

BUDGETS = {"params": "parameters", "train_flops": "training FLOPs per token", "cache": "cache bytes"}
TITLES = {"seq_len": "context T", "batch_size": "batch"}
# of the conditions, what a reader wants to know at once
MAIN = ("data", "tokenizer", "seq_len", "steps", "batch_size", "tokens", "precision", "device")
FEW = 3  # settings that each have their sentence below the title


RELATIONS = {
    "better": "better than",
    "worse": "worse than",
    "equal": "equal to",
    "not distinguishable": "not distinguishable from",
    "no verdict": "without a verdict against",
}


def findings(comparison: dict[str, Any]) -> list[tuple[str, str]]:
    """What stands below the title: (setting, sentence), or one sentence over all where settings are many."""
    settings = comparison["settings"]
    if len(settings) <= FEW:
        return [(setting["name"], finding(comparison, setting)) for setting in settings]
    others = [r for setting in settings for r in _quality(setting) if r["verdict"] != "baseline"]
    counts = {verdict: sum(r["verdict"] == verdict for r in others) for verdict in RELATIONS}
    said = [f"{count} times {RELATIONS[verdict]}" for verdict, count in counts.items() if count]
    said = [each if i == 0 else each.rsplit(" ", 1)[0] for i, each in enumerate(said)]
    text = _listed([said[0] + f" {comparison['baseline']}", *said[1:]]) if said else "not compared"
    return [("", f"Over {len(settings)} settings, a variant is {text}{_terms(comparison, others)}.")]


def finding(comparison: dict[str, Any], setting: dict[str, Any]) -> str:
    """One sentence: how many variants are better or worse than the baseline, or neither; and the terms."""
    results = _quality(setting)
    others = [r for r in results if r["verdict"] != "baseline"]
    if not others:
        return (
            "There is nothing to compare with the baseline." if results else "No run has a validation result."
        )
    key = results[0]["metric"]
    title = next(metric["title"].lower() for metric in setting["metrics"] if metric["key"] == key)
    if all(r["verdict"] == "no verdict" for r in others):
        reasons = dict.fromkeys(r["reason"] for r in others if r["reason"])
        return f"No verdict in {title}" + (f": {'; '.join(reasons)}." if reasons else ".")
    return f"{_counted(others, comparison['baseline'], title)}{_terms(comparison, others)}."


def _quality(setting: dict[str, Any]) -> list[dict[str, Any]]:
    """The results in the metric that the setting is read by."""
    key = headline([metric["key"] for metric in setting["metrics"]])
    return [r for r in setting["results"] if r["metric"] == key]


def _counted(results: list[dict[str, Any]], baseline: str | None, title: str) -> str:
    """`2 of 4 variants are better than mha in bits per byte, 1 is worse and 1 is not distinguishable`."""
    total = len(results)
    if total > 1 and all(r["verdict"] == "not distinguishable" for r in results):
        return f"None of {total} variants is distinguishable from {baseline} in {title}"
    phrases = []
    for verdict, relation in RELATIONS.items():
        count = sum(r["verdict"] == verdict for r in results)
        verb = "is" if count == 1 else "are"
        if count and not phrases:
            who = f"{count} of {total} variants" if total > 1 else results[0]["arm"]
            phrases.append(f"{who} {verb} {relation} {baseline} in {title}")
        elif count:
            phrases.append(f"{count} {verb} {relation.rsplit(' ', 1)[0]}")
    return _listed(phrases)


def _listed(phrases: list[str]) -> str:
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
    """Warnings, the gravest first: what was forced, what was left out, what to know before believing."""
    warnings = []
    if comparison["forced"]:
        title = "These runs are not comparable; the comparison was forced."
        warnings.append({"kind": "forced", "title": title, "lines": comparison["forced"]})
    if comparison["left_out"]:
        lines = [f"{each['folder']}: {each['reason']}" for each in comparison["left_out"]]
        many = f"{len(lines)} runs were" if len(lines) > 1 else "One run was"
        warnings.append({"kind": "left-out", "title": f"{many} left out.", "lines": lines})
    if comparison["notes"]:
        title = "Before believing a number"
        warnings.append({"kind": "notes", "title": title, "lines": comparison["notes"]})
    return warnings


def conditions(setting: dict[str, Any], comparison: dict[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """What the arms of a setting share, name and value: ``main`` at once, ``more`` on demand.

    What differs between runs, which is a list, is never behind a click.
    """
    known = {name: value for name, value in setting["conditions"].items() if value is not None}
    first = [name for name in known if name in MAIN or isinstance(known[name], list)]
    facts = {
        "main": [(_name(name), _plain(name, known[name])) for name in first],
        "more": [(_name(name), _plain(name, known[name])) for name in known if name not in first],
    }
    if budget := budget_of(comparison):
        facts["main"].append(("equal in", budget))
    arms = [arm for arm in comparison["arms"] if arm["label"] in setting["arms"]]
    if seeds := sorted({seed for arm in arms for seed in arm["seeds"]}):
        facts["main"].append(("seeds", ", ".join(map(str, seeds))))
    return facts


def _name(condition: str) -> str:
    return TITLES.get(condition, condition.replace("_", " "))


def _plain(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return quantity(value) if name == "tokens" else grouped(value)


def moment(created: str) -> str:
    """A time for people; as it stands if it is none."""
    try:
        return datetime.fromisoformat(created).strftime("%d %B %Y, %H:%M %Z").strip(" ,")
    except ValueError:
        return created

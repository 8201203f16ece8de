"""What the papers promise, beside what these runs show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from attnzoo.cards import Card
from attnzoo.compare.metrics import BY_KEY, Metric
from attnzoo.compare.profile import task_of
from attnzoo.compare.results import BUDGETS, Setting

EQUAL_WITHIN = 0.01  # of the other's mean
OPPOSITE = {"better": "worse", "worse": "better"}


def judge_claims(
    cards: Mapping[str, Card], settings: Sequence[Setting], variants: Mapping[str, str], baseline: str
) -> list[dict[str, Any]]:
    """Every claim on the cards of the arms, once per setting that can test it, or once with the reason.

    Args:
        cards: arm -> the card of its variant, for the arms that are a variant as it stands.
        variants: arm -> variant, for all arms.
    """
    found = []
    for arm, card in cards.items():
        for claim in card.claims:
            text = {"arm": arm, **_fields(claim)}
            other = _against(text["against"], variants, baseline)
            tested = [] if _untestable(text, other, arm) else list(_tests(text, other, settings))
            reason = _untestable(text, other, arm) or "no run measures it here"
            found += _merged(text, tested) or [
                text | {"setting": "", "verdict": "not tested", "reason": reason}
            ]
    return found


def _fields(claim: Any) -> dict[str, str]:
    """A claim's fields; one that is only a sentence has no metric."""
    names = ("where", "metric", "expect", "against")
    return {
        "text": getattr(claim, "text", None) or str(claim),
        **{name: getattr(claim, name, "") for name in names},
    }


def _against(name: str, variants: Mapping[str, str], baseline: str) -> str | None:
    """The arm that a claim compares with: the baseline, where it is of that variant."""
    arms = [arm for arm, variant in variants.items() if variant == name]
    return baseline if baseline in arms else next(iter(sorted(arms, key=len)), None)


def _untestable(claim: Mapping[str, str], other: str | None, arm: str) -> str:
    key = claim["metric"].partition(":")[0]
    if not key:
        return "needs what this library does not run"
    if key not in BY_KEY:
        return f"{key} is not measured here"
    if other is None:
        return f"no arm is {claim['against']}"
    if other == arm:
        return f"it is about {claim['against']} itself"
    return ""


def _tests(
    claim: Mapping[str, str], other: str, settings: Iterable[Setting]
) -> Iterable[tuple[str, str, str]]:
    """(setting, verdict, reason) wherever the claim's metric was measured for both arms."""
    key, _, task = claim["metric"].partition(":")
    metric = BY_KEY[key]
    for setting in settings:
        if task and not (setting.synthetic and task_of(setting) == task):
            continue
        if not all(setting.values[key].get(name) for name in (claim["arm"], other)):
            continue
        yield setting.name, *_verdict(claim, metric, other, setting)


def _verdict(claim: Mapping[str, str], metric: Metric, other: str, setting: Setting) -> tuple[str, str]:
    matched = next((m.matched for m in setting.of(claim["arm"]) if m.matched), None)
    if matched and BUDGETS.get(matched["budget"]) == metric.key:
        return "not tested", f"{metric.key} was matched"
    result = next(r for r in setting.judge(metric, other) if r["arm"] == claim["arm"])
    verdict = result["verdict"]
    if verdict == "no verdict":
        return "not tested", result["reason"]
    shown = _shown(result, other)
    if claim["expect"] == "equal":
        return _equality(result, setting.values[metric.key][other], shown)
    hoped = "better" if claim["expect"] == metric.better else "worse"
    if verdict == hoped:
        return "reproduced", shown
    if verdict == OPPOSITE[hoped] or (verdict == "equal" and metric.exact):
        return "contradicted", shown
    return "not distinguishable", shown


def _equality(result: Mapping[str, Any], other: Mapping[int, float], shown: str) -> tuple[str, str]:
    band = EQUAL_WITHIN * abs(sum(other.values()) / len(other))
    low, high = (result[k] if result[k] is not None else result["difference"] for k in ("low", "high"))
    if -band <= low and high <= band:
        return "reproduced", f"{shown}, within 1 %"
    if result["verdict"] == "better":
        return "reproduced", f"{shown}: better than claimed"
    return ("contradicted" if result["verdict"] == "worse" else "not distinguishable"), shown


def _shown(result: Mapping[str, Any], other: str) -> str:
    if result["ratio"] is None:
        return f"difference {result['difference']:+.4g} to {other}"
    interval = ""
    if result["low"] is not None:
        interval = f", difference {result['difference']:+.4g} [{result['low']:+.4g}, {result['high']:+.4g}]"
    return f"{result['ratio']:.4g} times {other}{interval}"


def _merged(claim: Mapping[str, str], tested: Sequence[tuple[str, str, str]]) -> list[dict[str, Any]]:
    """One entry where all settings say the same of a claim, else one per setting."""
    if len(tested) > 1 and len({(verdict, reason) for _, verdict, reason in tested}) == 1:
        _, verdict, reason = tested[0]
        tested = [("", verdict, f"{reason} in all {len(tested)} settings")]
    return [dict(claim) | {"setting": s, "verdict": v, "reason": r} for s, v, r in tested]

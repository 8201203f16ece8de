"""The verdict on every arm of a setting in every metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from attnzoo.compare.arms import Member
from attnzoo.compare.comparable import conditions, who_has_what
from attnzoo.compare.metrics import METRICS, Metric
from attnzoo.compare.statistics import Comparison, Method, compare_family

BUDGETS = {"params": "params", "train_flops": "train_flops", "cache": "cache_bytes"}  # budget -> its metric
WITHIN = 0.01  # of a budget that was matched
Values = Mapping[str, Mapping[int, float]]  # arm -> seed -> value


class Setting:
    """The runs that share all but the arm and the seed, and the verdicts on them.

    Args:
        members: at least one. method: how to judge.
    """

    def __init__(self, name: str, members: Sequence[Member], method: Method) -> None:
        self.name, self.members, self.method = name, list(members), method
        self.arms = list(dict.fromkeys(member.arm for member in self.members))
        self.values: dict[str, Values] = {m.key: self._values(m) for m in METRICS}
        self.metrics = [m for m in METRICS if any(self.values[m.key].values())]

    def of(self, arm: str) -> list[Member]:
        """The arm's runs, by seed."""
        return sorted((m for m in self.members if m.arm == arm), key=lambda m: m.seed)

    def _values(self, metric: Metric) -> Values:
        found = {arm: {m.seed: metric.of(m.run) for m in self.members if m.arm == arm} for arm in self.arms}
        return {arm: {s: v for s, v in values.items() if v is not None} for arm, values in found.items()}

    def judge(self, metric: Metric, baseline: str) -> list[dict[str, Any]]:
        """One result per arm, the baseline's among them."""
        values = self.values[metric.key]
        reference = values.get(baseline, {})
        others = {arm: v for arm, v in values.items() if arm != baseline}
        found = {} if metric.exact else compare_family(others, reference, self.method)
        results = []
        for arm in self.arms:
            own = values[arm]
            row = {"arm": arm, "metric": metric.key, **_describe(own)}
            if arm == baseline:
                row |= {"n": len(own), "verdict": "baseline"}
            elif not own or not reference:
                row |= {"reason": "not measured" if not own else "the baseline has no value here"}
            elif metric.exact:
                row |= self._counted(arm, metric, fmean(own.values()), fmean(reference.values()))
            else:
                row |= self._measured(arm, baseline, metric, found[arm])
            results.append(EMPTY | row)
        return results

    def _counted(self, arm: str, metric: Metric, own: float, reference: float) -> dict[str, Any]:
        ratio = own / reference if reference else None
        row = {"n": len(self.values[metric.key][arm]), "difference": own - reference, "ratio": ratio}
        if own == reference:
            return row | {"verdict": "equal"}
        matched = next((m.matched for m in self.of(arm) if m.matched), None)
        if matched and BUDGETS.get(matched["budget"]) == metric.key and ratio and abs(ratio - 1) <= WITHIN:
            return row | {"verdict": "equal", "reason": "the budget that was matched"}
        return row | {"verdict": _side(own - reference, metric)}

    def _measured(self, arm: str, baseline: str, metric: Metric, found: Comparison) -> dict[str, Any]:
        shared = self.values[metric.key][arm].keys() & self.values[metric.key][baseline].keys()
        row = {
            "n": found.n,
            "difference": found.difference,
            "low": found.low,
            "high": found.high,
            "ratio": _ratio(*(
                [self.values[metric.key][name][seed] for seed in sorted(shared)] for name in (arm, baseline)
            )),
            "p": found.p,
            "p_adjusted": found.p_adjusted,
        }  # fmt: skip
        if refusal := self._refusal(arm, baseline, metric):
            return row | {"reason": refusal}
        if found.n < 2:
            return row | {"reason": "a single seed" if found.n else "no seed in common with the baseline"}
        if found.difference == 0 == found.spread:
            return row | {"verdict": "equal", "reason": "the same value in every seed"}
        if found.distinguishable(self.method):
            return row | {"verdict": _side(found.difference, metric)}
        lost = (
            f"p {found.p:.2g} alone, {found.p_adjusted:.2g} corrected" if found.p < self.method.alpha else ""
        )
        return row | {
            "verdict": "not distinguishable",
            "seeds_needed": found.seeds_needed,
            "reason": lost,
        }

    def _refusal(self, arm: str, baseline: str, metric: Metric) -> str:
        """Why two arms cannot be compared in a metric though both have it."""
        pair = [m for m in self.members if m.arm in (arm, baseline)]
        if metric.timed:
            return who_has_what(pair, "device") or who_has_what(pair, "ranks")
        if metric.learned and metric.key != "accuracy":
            return who_has_what(pair, "measures")
        return ""

    @property
    def synthetic(self) -> bool:
        return str(conditions(self.members[0].run)["data"]).startswith("synthetic/")


EMPTY = {
    "mean": None,
    "sd": None,
    "n": 0,
    "difference": None,
    "low": None,
    "high": None,
    "ratio": None,
    "p": None,
    "p_adjusted": None,
    "verdict": "no verdict",
    "seeds_needed": None,
    "reason": "",
}


def _describe(values: Mapping[int, float]) -> dict[str, Any]:
    numbers = list(values.values())
    return {
        "values": {str(seed): values[seed] for seed in sorted(values)},
        "mean": fmean(numbers) if numbers else None,
        "sd": stdev(numbers) if len(numbers) > 1 else None,
    }


def _ratio(own: Sequence[float], reference: Sequence[float]) -> float | None:
    return sum(own) / sum(reference) if reference and sum(reference) else None


def _side(difference: float, metric: Metric) -> str:
    return "better" if (difference < 0) == (metric.better == "lower") else "worse"

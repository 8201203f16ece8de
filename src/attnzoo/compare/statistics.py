"""Whether two arms differ: paired differences over seeds, corrected for how many comparisons there are.

Two runs of one seed start from one stream of samples, so their difference has less spread than either value.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats
from statsmodels.stats.power import TTestPower

INTERVALS = ("t", "bootstrap")
CORRECTIONS = ("holm", "fdr_bh", "none")
POWER = 0.8
MOST_SEEDS = 10_000  # more than this nobody trains
RESAMPLES = 9_999
SHORTEST_FLIP = 6  # seeds from which a sign-flip test can reach 0.05 at all


@dataclass(frozen=True)
class Method:
    """How differences are judged.

    Args:
        interval: "t": Student's t of the paired differences, interval and p; "bootstrap": a BCa bootstrap
            interval and the p of a sign-flip permutation test.
        level: of an interval; 1 - level is the chance, per family, of a verdict where nothing differs.
        correction: within a family: "holm", "fdr_bh" (the share of false verdicts instead) or "none".
    """

    interval: str = "t"
    level: float = 0.95
    correction: str = "holm"

    def __post_init__(self) -> None:
        for name, legal in (("interval", INTERVALS), ("correction", CORRECTIONS)):
            if getattr(self, name) not in legal:
                raise ValueError(f"--{name}: must be one of {', '.join(legal)}, got {getattr(self, name)!r}")
        if not 0.5 <= self.level < 1:
            raise ValueError(f"--level: must be at least 0.5 and below 1, got {self.level}")

    @property
    def alpha(self) -> float:
        return 1 - self.level


@dataclass(frozen=True)
class Comparison:
    """One arm against another in one metric.

    Args:
        n: seeds that both have. difference: mean over them of own value - other value.
        low, high: interval of the difference at the method's level, not corrected; None for a single seed.
        spread: standard deviation of the differences.
        p, p_adjusted: two-sided; the second after the correction within the family.
        seeds_needed: seeds for 80 % power at the corrected level if this difference and spread are the true
            ones; None where it is distinguishable, where no number would do, or where it is not known.
    """

    n: int
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    spread: float | None = None
    p: float | None = None
    p_adjusted: float | None = None
    seeds_needed: int | None = None

    def distinguishable(self, method: Method) -> bool:
        return self.p_adjusted is not None and self.p_adjusted < method.alpha


def compare_family(
    arms: Mapping[str, Mapping[int, float]], baseline: Mapping[int, float], method: Method
) -> dict[str, Comparison]:
    """Every arm against the baseline; the arms are one family of tests.

    Args:
        arms, baseline: seed -> value.
    """
    found = {name: _paired(values, baseline, method) for name, values in arms.items()}
    tested = [name for name, one in found.items() if one.p is not None]
    if not tested:
        return found
    raw = [found[name].p for name in tested]
    adjusted = {"holm": _holm, "fdr_bh": stats.false_discovery_control, "none": list}[method.correction](raw)
    tests = 1 if method.correction == "none" else len(tested)
    for name, p in zip(tested, adjusted, strict=True):
        one = replace(found[name], p_adjusted=float(p))
        if not one.distinguishable(method):
            one = replace(one, seeds_needed=_seeds_needed(one, method, tests))
        found[name] = one
    return found


def mean_interval(values: Sequence[float], level: float) -> tuple[float, float] | None:
    """Student's interval of a mean; None for a single value."""
    if len(values) < 2:
        return None
    low, high = _student(np.asarray(values, dtype=float), level)[1:]
    return low, high


def _paired(values: Mapping[int, float], baseline: Mapping[int, float], method: Method) -> Comparison:
    shared = sorted(values.keys() & baseline.keys())
    if not shared:
        return Comparison(0)
    differences = np.array([values[seed] - baseline[seed] for seed in shared])
    center = float(differences.mean())
    if len(shared) == 1:
        return Comparison(1, center)
    spread = float(differences.std(ddof=1))
    p, low, high = (_student if method.interval == "t" else _bootstrap)(differences, method.level)
    return Comparison(len(shared), center, low, high, spread, p)


def _student(values: np.ndarray, level: float) -> tuple[float, float, float]:
    """p of mean 0, and the interval of the mean."""
    if np.ptp(values) == 0:  # t = 0/0 or infinite
        return float(values[0] == 0), float(values[0]), float(values[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of nearly identical values
        test = stats.ttest_1samp(values, 0.0)
    return float(test.pvalue), *map(float, test.confidence_interval(level))


def _bootstrap(values: np.ndarray, level: float) -> tuple[float, float, float]:
    """p of a sign-flip permutation test, and the BCa interval of the mean; exact or from a fixed seed."""
    flips = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=RESAMPLES, rng=np.random.default_rng(0)
    )
    if np.ptp(values) == 0:
        return float(flips.pvalue), float(values[0]), float(values[0])
    for method in ("BCa", "percentile"):  # BCa has no answer where almost all values are alike
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = stats.bootstrap(
                (values,), np.mean, confidence_level=level, n_resamples=RESAMPLES, method=method,
                rng=np.random.default_rng(0),
            ).confidence_interval  # fmt: skip
        if math.isfinite(found.low) and math.isfinite(found.high):
            break
    return float(flips.pvalue), float(found.low), float(found.high)


def _holm(p: Sequence[float]) -> np.ndarray:
    """Adjusted p; that of statsmodels collects garbage at each call, a tenth of a second beside torch."""
    order, remaining = np.argsort(p), np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(np.asarray(p)[order] * remaining), 1.0)
    return adjusted


def _seeds_needed(one: Comparison, method: Method, tests: int) -> int | None:
    """The least number of seeds with enough power, at the level that the first of ``tests`` must reach."""
    if not one.difference:
        return None
    alpha = method.alpha / tests
    # all signs alike are the rarest outcome of a sign-flip test
    least = max(one.n + 1, 1 + math.ceil(math.log2(1 / alpha)) if method.interval == "bootstrap" else 2)
    if not one.spread:
        return least
    effect = abs(one.difference) / one.spread

    def enough(n: int) -> bool:
        power = TTestPower().power(effect, n, alpha)
        return math.isnan(power) or power >= POWER  # nan: so large that the distribution has no digits left

    low, high = least, MOST_SEEDS
    if not enough(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return low

"""Search for the size at which a variant meets a budget.

Knobs are tried in an order that changes the architecture least, and the first on which some value lies within
the tolerance is taken, at its nearest value. Along a knob the cost grows, so a bisection finds it; not so
along the number of heads, which is seldom divisible by the groups that share keys: all of them are tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attnzoo.match.budget import BUDGETS, budget_of
from attnzoo.match.knobs import KNOBS, current, layout_of, put, settings
from attnzoo.train.settings import check_number, nearest

# the MLP holds no cache
ORDER = {
    "params": ("mlp_hidden", "dim", "dim+mlp_hidden", "depth", "num_heads"),
    "train_flops": ("mlp_hidden", "dim", "dim+mlp_hidden", "depth", "num_heads"),
    "cache": ("num_heads", "dim", "num_heads+dim", "depth"),
}
# how many values of the coarse knob of a pair are tried
TRIED = 6
EMPTY: Mapping[str, Any] = {}


@dataclass(frozen=True)
class Matched:
    """A budget that is met.

    Args:
        budget: its name. target, value: what was asked for, and what the changed configuration spends.
        deviation: ``value / target - 1``.
        changes: dotted keys of the configuration -> new value; empty where nothing needs to change.
        before: the values in effect before, also of keys that the configuration leaves to the model.
    """

    budget: str
    target: float
    value: float
    deviation: float
    changes: Mapping[str, Any]
    before: Mapping[str, Any]

    def apply(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The configuration with the changes; the given one stays as it is."""
        return put(config, self.changes)

    def __str__(self) -> str:
        moved = [f"{k} {self.before[k]} -> {v}" for k, v in self.changes.items() if v != self.before[k]]
        return f"{', '.join(moved) or 'as it is'} ({self.budget} {100 * self.deviation:+.2f} %)"


@dataclass(frozen=True)
class _Trial:
    changes: dict[str, Any]
    value: float
    deviation: float

    @property
    def distance(self) -> float:
        return abs(self.deviation)


class _Search:
    """Trials of changed configurations, each evaluated once."""

    def __init__(self, config: Mapping[str, Any], budget: str, target: float, vocab_size: int) -> None:
        self.config, self.budget, self.target, self.vocab_size = config, budget, target, vocab_size
        self.seen: dict[tuple, _Trial | None] = {}
        # what is wrong with the configuration itself is said, not searched around
        value = budget_of(config, budget, vocab_size)
        self.start = self.seen[()] = _Trial({}, value, value / target - 1)

    def trial(self, changes: Mapping[str, Any]) -> _Trial | None:
        """A changed configuration; None if no such model can be built."""
        changes = {k: v for k, v in changes.items() if _written(self.config, k) != v}
        key = tuple(sorted(changes.items()))
        if key not in self.seen:
            try:
                value = budget_of(put(self.config, changes), self.budget, self.vocab_size)
                self.seen[key] = _Trial(changes, value, value / self.target - 1)
            except ValueError:
                self.seen[key] = None
        return self.seen[key]

    def along(self, how: str, tolerance: float, far: bool) -> list[_Trial]:
        """Trials along a knob or a pair of them, the nearest first."""
        if how == "dim+mlp_hidden":
            trials = self._pair([t.changes for t in self._knob("dim")[:TRIED]], "mlp_hidden", tolerance)
        elif how == "num_heads+dim":
            now = current(self.config, "num_heads")
            near = sorted(range(1, 2 * now + 1), key=lambda n: abs(n - now))[: 2 * TRIED]
            trials = self._pair([{"model.num_heads": n} for n in near], "dim", tolerance)
        else:
            return self._knob(how, far=far)
        return sorted(trials, key=lambda t: t.distance)

    def _knob(self, knob: str, given: Mapping[str, Any] = EMPTY, far: bool = False) -> list[_Trial]:
        axis = [{**given, **changes} for changes in settings(put(self.config, given), knob, far)]
        trials = map(self.trial, axis) if knob == "num_heads" else _bisect(axis, self.trial)
        return sorted((t for t in trials if t), key=lambda t: t.distance)

    def _pair(self, coarse: Sequence[dict[str, Any]], fine: str, tolerance: float) -> Iterator[_Trial]:
        """The nearest trial along a knob for each coarse setting, up to the first that is near enough."""
        for changes in coarse:
            best = next(iter(self._knob(fine, changes)), None)
            if best:
                yield best
                if best.distance <= tolerance:
                    return


def _bisect(axis: Sequence[Any], trial: Callable[[Any], _Trial | None]) -> list[_Trial | None]:
    """The trials below and above the target on an axis of growing cost, or the last before its near end."""

    def legal(places: range) -> int | None:
        return next((i for i in places if trial(axis[i])), None)

    low, high = legal(range(len(axis))), legal(range(len(axis) - 1, -1, -1))
    if low is None or high is None:
        return []
    while high - low > 1:
        middle = legal(range((low + high) // 2, high)) or legal(range((low + high) // 2, low, -1))
        if middle is None:
            break
        if trial(axis[middle]).deviation <= 0:
            low = middle
        else:
            high = middle
    return [trial(axis[low]), trial(axis[high])]


def solve(
    config: Mapping[str, Any],
    budget: str,
    target: float,
    vocab_size: int,
    by: str = "auto",
    tolerance: float = 0.01,
) -> Matched:
    """Change a configuration so that its model spends what is asked for.

    Args:
        config: resolved configuration, as a plain mapping.
        budget: "params", "train_flops" or "cache", see `budget_of`. target: what to spend.
        by: "auto", or the one thing that may change: "mlp_hidden", "dim", "num_heads" or "depth".
        tolerance: largest relative deviation.

    Raises:
        ValueError: an unknown budget or knob, a configuration that cannot be built, or a target that nothing
            reaches, with the nearest that is reached.
    """
    if by not in ("auto", *KNOBS):
        raise ValueError(f"match.by: no knob {by!r}; {nearest(by, ('auto', *KNOBS))}")
    check_number("match.tolerance", tolerance, 0.0)
    check_number("match: the target", target)
    if target <= 0:
        raise ValueError(f"match: the reference holds no {BUDGETS.get(budget, budget)}, got {target:g}")
    search = _Search(config, budget, target, vocab_size)
    best = search.start
    for how in ORDER[budget] if by == "auto" else (by,):
        if best.distance <= tolerance:
            break
        best = min([best, *search.along(how, tolerance, by != "auto")[:1]], key=lambda t: t.distance)
    matched = Matched(budget, target, best.value, best.deviation, best.changes, _before(config, best.changes))
    if best.distance > tolerance:
        raise ValueError(_unmet(config, matched, by, tolerance))
    return matched


def _unmet(config: Mapping[str, Any], near: Matched, by: str, tolerance: float) -> str:
    model = layout_of(config)
    others = [k for k in KNOBS if k != by and not (near.budget == "cache" and k == "mlp_hidden")]
    knobs = "" if by == "auto" else f"match.by ({', '.join(['auto', *others])}), "
    return (
        f"match: {model} cannot meet {near.target:,.0f} {BUDGETS[near.budget]} within {100 * tolerance:g} %; "
        f"the nearest is {near.value:,.0f}, {near}; "
        f"set {knobs}match.tolerance={_up(near.deviation)} or another budget"
    )


def _up(deviation: float) -> float:
    return -(-abs(deviation) * 1000 // 1) / 1000


def _before(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The values in effect before: heads keep their width, and the MLP may follow the stream's."""
    kept = {"attention.head_dim": changes.get("attention.head_dim")}
    kept |= {"model.mlp_hidden": current(config, "mlp_hidden")}
    return {key: kept.get(key) or _written(config, key) for key in changes}


def _written(config: Mapping[str, Any], key: str) -> Any:
    group, _, option = key.partition(".")
    return config[group].get(option)

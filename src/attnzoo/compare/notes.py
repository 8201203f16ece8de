"""What a reader must know before believing a number."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from attnzoo.compare.comparable import who_has_what
from attnzoo.compare.results import Setting
from attnzoo.compare.statistics import POWER, SHORTEST_FLIP, Method


def method_text(method: Method) -> str:
    """How the numbers were computed, in a paragraph."""
    percent = f"{100 * method.level:g} %"
    interval = (
        f"The interval is Student's t at {percent}, and p is that of the paired t test."
        if method.interval == "t"
        else f"The interval is a BCa bootstrap at {percent}, too narrow under {SHORTEST_FLIP} seeds; p is "
        "that of a sign-flip permutation test, which cannot fall below 2 / 2^n with n seeds."
    )
    correction = {
        "holm": "p is corrected by Holm's method: under no true difference the chance of any verdict in a "
        f"family stays at or below {100 * method.alpha:.3g} %.",
        "fdr_bh": "p is corrected by Benjamini and Hochberg's method: of the verdicts in a family, at most "
        f"{100 * method.alpha:.3g} % are expected to be false.",
        "none": "p is not corrected: every single comparison has a chance of "
        f"{100 * method.alpha:.3g} % of a verdict where nothing differs.",
    }[method.correction]
    return (
        "A difference is arm minus baseline, paired over the seeds that both have: runs of one seed read the "
        f"same samples in the same order. {interval} A family is one metric in one setting, over all arms. "
        f"{correction} Metrics and settings are not corrected for one another: each is a question of its "
        "own, and whoever looks for any difference in any of them will find some by chance. The interval is "
        "not corrected, so it may leave out zero where the verdict is still open. "
        "A verdict is about these runs: this size, data and number of steps. "
        f"Seeds needed: how many paired seeds would give {100 * POWER:g} % power at the corrected level if "
        "the difference and the spread were truly those observed; from few seeds that is a rough guess. "
        "Counted metrics (parameters, FLOPs, cache) are the same for every seed and have no p."
    )


def notes(settings: Sequence[Setting], baseline: str, method: Method) -> list[str]:
    """What weakens this comparison, in sentences."""
    found: list[str] = []
    for setting in settings:
        place = f" ({setting.name})" if setting.name else ""
        found += [text.format(place) for text in _of_setting(setting, baseline, method)]
    families = sum(not metric.exact for s in settings for metric in s.metrics if len(s.arms) > 1)
    if len(settings) > 1 and families:
        found.append(
            f"{families} families were tested (measured metrics times settings); with no true difference "
            f"each would still give a verdict with a chance of up to {100 * method.alpha:.3g} %."
        )
    return list(dict.fromkeys(found))


def _of_setting(setting: Setting, baseline: str, method: Method) -> Iterable[str]:
    if baseline not in setting.arms:
        yield f"The baseline {baseline} has no usable run here{{}}: no verdicts."
        return
    seeds = {arm: {m.seed for m in setting.of(arm)} for arm in setting.arms}
    for arm in setting.arms:
        if missing := sorted(seeds[baseline] - seeds[arm]):
            yield f"{arm} lacks seed {_listed(missing)}{{}}: its difference is over the shared seeds."
        if extra := sorted(seeds[arm] - seeds[baseline]):
            yield f"{baseline} lacks seed {_listed(extra)} of {arm}{{}}: its difference is over the others."
    pairs = max((len(seeds[arm] & seeds[baseline]) for arm in setting.arms if arm != baseline), default=0)
    if pairs == 1:
        yield "A single seed says nothing of chance{}: no verdicts on what is measured. Add seeds."
    elif pairs and method.interval == "bootstrap" and pairs < SHORTEST_FLIP:
        yield (
            f"{pairs} seeds are too few for the bootstrap{{}}: its interval is too narrow, and its test "
            "cannot find anything at 0.05. --interval t assumes normal differences instead."
        )
    for field, what in (("device", "times are not compared"), ("torch", "numerics may differ a little")):
        if differing := who_has_what(setting.members, field):
            yield f"{differing}{{}}: {what}."
    if differing := who_has_what(setting.members, "measures"):
        yield f"Losses measure different things{{}}, so they are not compared: {differing}."


def _listed(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, seeds))

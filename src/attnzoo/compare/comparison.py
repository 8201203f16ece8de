"""A comparison as one JSON object: all that the terminal, the CSV and the report page show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from statistics import fmean
from typing import Any

from attnzoo import card
from attnzoo.cards import Card
from attnzoo.compare.arms import Member, config_diff, settled, variant
from attnzoo.compare.claims import judge_claims
from attnzoo.compare.comparable import common_conditions, disagreements
from attnzoo.compare.metrics import curve
from attnzoo.compare.notes import method_text, notes
from attnzoo.compare.profile import profile
from attnzoo.compare.results import Setting
from attnzoo.compare.select import Selection
from attnzoo.compare.statistics import Method

SHOWN = (
    "params",
    "tokens",
    "steps",
    "seq_len",
    "train_loss",
    "val_loss",
    "val_bpb",
    "val_accuracy",
    "tokens_per_second",
    "seconds",
    "mfu",
    "peak_memory_bytes",
    "objective",
    "val_measures",
    "train_flops_per_token",
    "cache_bytes_per_token",
    "state_bytes",
    "impl",
)


def compare(
    selection: Selection,
    method: Method,
    *,
    baseline: str | None = None,
    force: bool = False,
    command: str = "",
) -> dict[str, Any]:
    """The comparison of the selected runs; the contents are described in docs/comparisons.md.

    Args:
        baseline: an arm, or a variant that one arm alone has; default the selection's own.
        force: compare what is not comparable too; the differing fields then stand on top of every output.

    Raises:
        ValueError: runs are not comparable, or the baseline is not among the arms.
    """
    members = selection.members
    chosen = _baseline(baseline, selection)
    by_setting: dict[str, list[Member]] = {}
    for member in members:
        by_setting.setdefault(member.setting, []).append(member)
    forced = _check(by_setting, force)
    settings = [Setting(name, own, method) for name, own in by_setting.items()]
    arms = sorted(dict.fromkeys(m.arm for m in members), key=lambda arm: arm != chosen)
    variants = {m.arm: variant(m.run) for m in members}
    cards = {arm: found for arm in arms if (found := _card(variants[arm]))}
    content = {
        "format": 1,
        "title": selection.title,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "forced": forced,
        "left_out": [{"folder": str(one.folder), "reason": one.reason} for one in selection.left_out],
        "method": vars(method) | {"text": method_text(method)},
        "baseline": chosen,
        "notes": [*selection.notes, *notes(settings, chosen, method)],
        "arms": [_arm(arm, chosen, members, selection, cards.get(arm)) for arm in arms],
        "settings": [_setting(setting, chosen, arms) for setting in settings],
        "profile": profile(settings, arms, method.level),
        "claims": judge_claims(cards, settings, variants, chosen),
        "runs": [_run(member, chosen, members) for member in members],
    }
    return _finite(content)


def _baseline(wanted: str | None, selection: Selection) -> str:
    members = selection.members
    arms = list(dict.fromkeys(m.arm for m in members))
    name = wanted or selection.baseline
    if name in arms:
        return name
    of_variant = sorted({m.arm for m in members if variant(m.run) == name})
    if len(of_variant) == 1:
        return of_variant[0]
    raise ValueError(
        f"--baseline: must be one of the arms {', '.join(arms)}, got {name!r}"
        + ("" if wanted else ", which has no usable run")
    )


def _check(by_setting: Mapping[str, Sequence[Member]], force: bool) -> list[str]:
    """What differs though it must not; refused unless forced."""
    found = []
    for setting, members in by_setting.items():
        place = f"{setting}: " if setting else ""
        found += [place + text for text in disagreements(members, by_folder=not force)]
    if found and not force:
        raise ValueError(f"runs: not comparable; {'; '.join(found)}; --force compares them all the same")
    return found


@cache
def _card(name: str) -> Card | None:
    try:
        return card(name)
    except ValueError:  # a hybrid, a composition, a variant that is not installed here
        return None


def _reference(baseline: str, member: Member, members: Sequence[Member]) -> Member | None:
    """The run of the baseline that a run's configuration is shown against."""
    runs = [m for m in members if (m.arm, m.setting) == (baseline, member.setting)]
    return next((m for m in runs if m.seed == member.seed), runs[0] if runs else None)


def _diff(baseline: str, member: Member, members: Sequence[Member]) -> dict[str, list[Any]]:
    reference = _reference(baseline, member, members)
    return config_diff(settled(reference.run.config), settled(member.run.config)) if reference else {}


def _arm(
    arm: str, baseline: str, members: Sequence[Member], selection: Selection, known: Card | None
) -> dict[str, Any]:
    own = [m for m in members if m.arm == arm]
    # an arm without a run beside the baseline's has nothing to be shown against
    shown = next((m for m in own if _reference(baseline, m, members)), own[0])
    return {
        "label": arm,
        "variant": variant(shown.run),
        "title": known.title if known else variant(shown.run),
        "arxiv": known.arxiv if known else "",
        "family": known.family if known else "",
        "summary": known.summary if known else "",
        "baseline": arm == baseline,
        "seeds": sorted({m.seed for m in own}),
        "config_diff": _diff(baseline, shown, members),
        "matched": dict(shown.matched) if shown.matched else None,
        "tune": selection.tune.get(arm),
    }


def _setting(setting: Setting, baseline: str, arms: Sequence[str]) -> dict[str, Any]:
    order = [arm for arm in arms if arm in setting.arms]
    place = {arm: i for i, arm in enumerate(order)}
    results = [r for metric in setting.metrics for r in setting.judge(metric, baseline)]
    names = [metric.key for metric in setting.metrics]
    return {
        "name": setting.name,
        "conditions": common_conditions(setting.members),
        "arms": order,
        "metrics": [
            {"key": m.key, "title": m.title, "unit": m.unit, "better": m.better, "exact": m.exact}
            for m in setting.metrics
        ],
        "results": sorted(results, key=lambda r: (names.index(r["metric"]), place[r["arm"]])),
        "curves": [{"arm": a, "seed": m.seed, **curve(m.run)} for a in order for m in setting.of(a)],
        "positions": [found for arm in order if (found := _positions(arm, setting.of(arm)))],
        "decode": [found for arm in order if (found := _decode(arm, setting.of(arm)))],
    }


def _positions(arm: str, members: Sequence[Member]) -> dict[str, Any] | None:
    """Loss by position, of each seed and on average."""
    found = {m.seed: p for m in members if (p := m.run.summary.get("val_loss_by_position"))}
    if not found:
        return None
    edges = next(iter(found.values()))["edges"]
    loss = {str(seed): p["loss"] for seed, p in found.items() if p["edges"] == edges}
    return {"arm": arm, "edges": edges, "loss": loss, "mean": _means(list(loss.values()))}


def _decode(arm: str, members: Sequence[Member]) -> dict[str, Any] | None:
    """Decoding, averaged over the seeds."""
    found = [d for m in members if (d := m.run.summary.get("decode")) and d.get("context")]
    found = [d for d in found if d["context"] == found[0]["context"]]
    if not found:
        return None
    averaged = {key: _means([d[key] for d in found]) for key in ("ms_per_token", "cache_bytes")}
    return {"arm": arm, "context": found[0]["context"], **averaged}


def _means(rows: Sequence[Sequence[float | None]]) -> list[float | None]:
    return [None if None in column else fmean(column) for column in zip(*rows, strict=True)]


def _run(member: Member, baseline: str, members: Sequence[Member]) -> dict[str, Any]:
    run = member.run
    return {
        "folder": str(run.folder),
        "arm": member.arm,
        "setting": member.setting,
        "seed": member.seed,
        "status": run.summary["status"],
        "summary": {key: run.summary.get(key) for key in SHOWN},
        "config_diff": _diff(baseline, member, members),
        "environment": run.environment,
    }


def _finite(content: Any) -> Any:
    """The same with null for every number that JSON does not know."""
    if isinstance(content, dict):
        return {str(key): _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content

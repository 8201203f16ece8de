"""Which runs are one arm: the same configuration but for the seed; and how arms are told apart in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from attnzoo import card
from attnzoo.compare.runs import Run

# what no result depends on: where things lie, how progress is reported
NEUTRAL_GROUPS = ("run_dir", "logger", "callbacks", "launcher", "ckpt_path")
NEUTRAL = (
    "data.cache_dir",
    "data.num_workers",
    "data.worker_timeout",
    "trainer.decode_tokens",
    "trainer.log_every",
    "trainer.sample_prompt",
    "trainer.sample_tokens",
    "trainer.val_every",
)
ABSENT = object()


@dataclass(frozen=True)
class Member:
    """A run and its place in the comparison.

    Args:
        arm, setting: labels. matched: what a sweep solved to meet a budget, or None.
    """

    run: Run
    arm: str
    setting: str
    matched: Mapping[str, Any] | None = None

    @property
    def seed(self) -> int:
        return self.run.seed


def group(runs: Sequence[Run], matched: Mapping[str, Mapping[str, Any]]) -> list[Member]:
    """Runs without a sweep's word for it: an arm is a variant, plus the keys in which its runs differ.

    Synthetic tasks are settings; everything else is one setting. Runs of one variant that differ in their
    data are different arms, so that they are refused as incomparable and not mistaken for seeds.

    Args:
        matched: run folder -> what a sweep solved for it; that does not tell arms apart.

    Raises:
        ValueError: an arm has a seed twice.
    """
    settings = [task_setting(run.config) for run in runs]
    names = [variant(run) for run in runs]
    flat = [_without_match(settled(run.config), matched.get(str(run.folder))) for run in runs]
    members = []
    for run, name, setting, own in zip(runs, names, settings, flat, strict=True):
        alike = [f for f, n in zip(flat, names, strict=True) if n == name]
        here = [f for f, n, s in zip(flat, names, settings, strict=True) if (n, s) == (name, setting)]
        keys = {k for k in differing(alike) if not _is_data(k)} | {k for k in differing(here) if _is_data(k)}
        parts = [name, *(f"{_short(k)}={_word(own.get(k))}" for k in sorted(keys))]
        members.append(Member(run, " ".join(parts), setting, matched.get(str(run.folder))))
    refuse_twins(members)
    return members


def refuse_twins(members: Iterable[Member]) -> None:
    """Raise a ValueError where two runs have the same arm, setting and seed."""
    seen: dict[tuple[str, str, int], Member] = {}
    for member in members:
        key = (member.arm, member.setting, member.seed)
        if other := seen.get(key):
            raise ValueError(
                f"seed: {member.arm} has seed {member.seed} twice, in {other.run.folder} and "
                f"{member.run.folder}; leave one out"
            )
        seen[key] = member


def variant(run: Run) -> str:
    """The layout of the run's model in one word."""
    layout = run.summary["variant"]
    if not isinstance(layout, str):
        names = [part["name"] if isinstance(part, Mapping) else str(part) for part in layout]
        layout = ",".join(names)
    add = run.config["attention"].get("add") or ()
    return " + ".join([layout, *([add] if isinstance(add, str) else add)])


def task_setting(config: Mapping[str, Any]) -> str:
    """The setting that a synthetic task is by itself; "" for text."""
    name = str(config["data"].get("name"))
    return f"data={name}" if name.startswith("synthetic/") else ""


def settled(config: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys and values of all that a result may depend on, the seed aside."""
    config = {k: v for k, v in config.items() if k != "seed" and k not in NEUTRAL_GROUPS}
    attention, model = dict(config["attention"]), config["model"]
    if model.get("layout"):
        attention.pop("name", None)  # is not read then
    else:
        attention = _defaults(attention.get("name")) | attention
    return {k: v for k, v in flatten(config | {"attention": attention}) if k not in NEUTRAL}


def differing(configs: Sequence[Mapping[str, Any]]) -> set[str]:
    """The keys that do not have one and the same value in all of them."""
    keys = {key for config in configs for key in config}
    first = configs[0] if configs else {}
    return {k for k in keys if any(c.get(k, ABSENT) != first.get(k, ABSENT) for c in configs)}


def config_diff(reference: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Key -> [the reference's value, own value], where they differ; None where there is no such key.

    Args:
        reference, own: as `settled` gives them.
    """
    return {key: [reference.get(key), own.get(key)] for key in sorted(differing([reference, own]))}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Dotted keys and values of the leaves."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@cache
def _card_defaults(name: str) -> Mapping[str, Any]:
    try:
        return card(name).defaults
    except ValueError:  # a variant of a package that is not installed here
        return {}


def _defaults(name: str | None) -> dict[str, Any]:
    """The variant's own options, so that one set to its default is no difference."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in _card_defaults(str(name)).items()}


def _without_match(flat: dict[str, Any], matched: Mapping[str, Any] | None) -> dict[str, Any]:
    """The configuration before a sweep solved for a budget; several knobs are joined by " + "."""
    knobs = str((matched or {}).get("knob") or "").split(" + ")
    if knobs == [""]:
        return flat
    before = [matched["from"]] if len(knobs) == 1 else matched["from"]
    return flat | dict(zip(knobs, before, strict=True))


def _is_data(key: str) -> bool:
    return key.startswith(("data.", "tokenizer."))


def _short(key: str) -> str:
    return key.removeprefix("attention.")


def _word(value: Any) -> str:
    if isinstance(value, (list, Mapping)):
        return str(value).replace(" ", "")
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))

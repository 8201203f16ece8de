"""The command line of a sweep: its own keys, and the Hydra overrides with their sweep syntax."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import yaml

from attnzoo.train.settings import check_number, nearest

OWN = (
    "name",
    "baseline",
    "match",
    "match.by",
    "match.tolerance",
    "tune",
    "tune.lr",
    "tune.seed",
    "seeds",
    "jobs",
)
BUDGETS = ("params", "train_flops", "cache", "none")
FLAGS = ("--wait",)
# a sweep gives each cell its folder, and starts it or goes on with it
RESERVED = {
    "run_dir": "name=... names the sweep's folder",
    "ckpt_path": "attnzoo sweep resume NAME goes on",
}


@dataclass(frozen=True)
class Request:
    """What a sweep was asked for, besides the grid.

    Args:
        overrides: for Hydra, in the order given.
        name: of the folder under runs/; None for one with the time.
        baseline: an arm's label.
        match: "params", "train_flops", "cache" or None; ``by`` and ``tolerance`` are the solver's.
        tune: learning rates to search; empty for "around the configuration's own", None for no search.
        tune_seed: seed of the search; None for one that is not compared.
        jobs: cells at the same time; None for what the machine holds.
        wait: on a cluster, stay until the cells have ended.
    """

    arguments: tuple[str, ...]
    overrides: tuple[str, ...]
    name: str | None = None
    baseline: str | None = None
    match: str | None = None
    by: str = "auto"
    tolerance: float = 0.01
    tune: tuple[float, ...] | None = None
    tune_seed: int | None = None
    jobs: int | None = None
    wait: bool = False


def read_request(arguments: Iterable[str]) -> Request:
    """Split a command line.

    Raises:
        ValueError: an unknown flag, or a value of one of the sweep's own keys against its rule.
    """
    arguments = tuple(arguments)
    own: dict[str, str] = {}
    overrides = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if argument.startswith("-"):
            _check_flag(argument)
        elif not equals and not argument.startswith("~"):
            raise ValueError(f"sweep: must be key=value, got {argument!r}")
        elif key in OWN:
            if key in own:
                raise ValueError(f"{key}: given twice, got {own[key]!r} and {value!r}; give it once")
            own[key] = value
        elif key.partition(".")[0] in ("match", "tune"):
            raise ValueError(f"{key}: no such key; {nearest(key, OWN)}")
        elif way := _reserved(key.lstrip("+~")):
            raise ValueError(f"{key}: a sweep sets it for each of its cells, got {value!r}; {way}")
        else:
            overrides.append(argument)
    if "seeds" in own:
        if any(override.startswith("seed=") for override in overrides):
            raise ValueError(f"seeds: excludes seed=..., got {own['seeds']!r}; give one of them")
        count = whole("seeds", own["seeds"])
        overrides.append(f"seed={','.join(str(seed) for seed in range(1, count + 1))}")
    return Request(arguments, tuple(overrides), wait="--wait" in arguments, **_values(own))


def check_name(name: str) -> str:
    """The name of a sweep's folder, or a ValueError."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise ValueError(f"name: must be letters, digits and ._- (a folder under runs/), got {name!r}")
    return name


def _values(own: dict[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {"baseline": own.get("baseline")}
    if "name" in own:
        values["name"] = check_name(own["name"])
    if "jobs" in own:
        values["jobs"] = whole("jobs", own["jobs"])
    if "match" in own:
        if own["match"] not in BUDGETS:
            raise ValueError(f"match: must be one of {', '.join(BUDGETS)}, got {own['match']!r}")
        values["match"] = None if own["match"] == "none" else own["match"]
    for key, field in (("match.by", "by"), ("match.tolerance", "tolerance")):
        if key in own:
            if values.get("match") is None:
                raise ValueError(f"{key}: needs match=params, train_flops or cache, got {own[key]!r} alone")
            values[field] = own[key] if field == "by" else positive(key, own[key], 1.0)
    if own.get("tune", "lr") not in ("lr", "none"):
        raise ValueError(f"tune: must be lr or none, got {own['tune']!r}")
    tuned = own.get("tune") == "lr"
    for key in ("tune.lr", "tune.seed"):
        if key in own and not tuned:
            raise ValueError(f"{key}: needs tune=lr, got {own[key]!r} alone")
    if tuned:
        values["tune"] = _rates(own.get("tune.lr", "[]"))
        if "tune.seed" in own:
            values["tune_seed"] = whole("tune.seed", own["tune.seed"], least=0)
    return values


def _rates(text: str) -> tuple[float, ...]:
    listed = text.strip().removeprefix("[").removesuffix("]")
    rates = [positive("tune.lr", part) for part in listed.split(",") if part.strip()]
    if len(set(rates)) < len(rates):
        raise ValueError(f"tune.lr: must be different rates, got {text}")
    return tuple(sorted(rates))


def positive(key: str, text: str, high: float = float("inf")) -> float:
    """A positive number; exponents without a point, such as 1e-3, included."""
    try:
        value = float(yaml.safe_load(text))
    except (TypeError, ValueError, yaml.YAMLError):
        raise ValueError(f"{key}: must be a number, got {text!r}") from None
    check_number(key, value, 0.0, high)
    if value == 0:
        raise ValueError(f"{key}: must be above 0, got {text!r}")
    return value


def whole(key: str, text: str, least: int = 1) -> int:
    """A whole number of at least ``least``, or a ValueError that names the key."""
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"{key}: must be a whole number of at least {least}, got {text!r}")
    return int(text)


def _reserved(key: str) -> str | None:
    """The way out where a key is the sweep's own to set."""
    return RESERVED["run_dir"] if key.startswith("hydra.") else RESERVED.get(key)


def _check_flag(argument: str) -> None:
    if argument in ("-m", "--multirun"):
        raise ValueError(f"{argument}: a sweep runs every value by itself; leave it out")
    if argument not in FLAGS:
        raise ValueError(f"{argument}: no such flag of attnzoo sweep; {nearest(argument, FLAGS)}")

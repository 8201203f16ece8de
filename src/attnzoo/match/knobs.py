"""What may be turned to meet a budget: how far, in which steps, and what turns along with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attnzoo import card
from attnzoo.match.budget import cost_of
from attnzoo.model import parse_layout
from attnzoo.model.block import default_hidden
from attnzoo.model.layout import legal_of

# a knob goes from 1/r to r times of its value: beyond, it is another architecture. The state of a recurrent
# variant is so small beside a cache of keys that heads get more room.
REACH = {"mlp_hidden": 2, "dim": 4, "num_heads": 8, "depth": 4}
# of a knob that was asked for by name
FAR = 8
KNOBS = tuple(REACH)
# widths that variants give their heads, in units of dim / num_heads
WIDTHS = (1, 1 / 2, 2, 3 / 4, 3 / 2, 1 / 4, 4)


def settings(config: Mapping[str, Any], knob: str, far: bool = False) -> list[dict[str, Any]]:
    """What a knob can be set to, as dotted keys, in ascending order; the constructor may still refuse some.

    ``dim`` goes in steps that keep the width of a head an even number. Heads are added and removed at the
    width they have: by `attention.head_dim` where that is an option of all layers, else by a stream that is
    wider or narrower with them.
    """
    now, reach = current(config, knob), FAR if far else REACH[knob]
    if knob != "num_heads":
        step = 2 * config["model"]["num_heads"] if knob == "dim" else 1
        return [{f"model.{knob}": n} for n in _range(now, reach, step)]
    width = head_width(config)
    if width is None:
        wide = config["model"]["dim"] // now
        heads = _range(now, reach if far else REACH["dim"])
        return [{"model.num_heads": n, "model.dim": n * wide} for n in heads]
    return [{"model.num_heads": n, "attention.head_dim": width} for n in _range(now, reach)]


def current(config: Mapping[str, Any], knob: str) -> int:
    """The value of a knob, also where the configuration leaves it to the model."""
    value = config["model"].get(knob)
    return default_hidden(config["model"]["dim"]) if value is None else value


def put(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with dotted keys changed; the given one stays as it is."""
    changed = dict(config)
    for key, value in changes.items():
        group, _, option = key.partition(".")
        changed[group] = {**changed[group], option: value}
    return changed


def layout_of(config: Mapping[str, Any]) -> str | Sequence[Any]:
    """Which mixers the model has."""
    return config["model"]["layout"] or config["attention"]["name"]


def head_width(config: Mapping[str, Any]) -> int | None:
    """The value of `attention.head_dim` that is in effect in all layers; None if there is none."""
    options = {k: v for k, v in config["attention"].items() if k != "name"}
    specs = parse_layout(layout_of(config), config["model"]["depth"])
    if not all("head_dim" in legal_of(s.name, s.options, options) for s in specs):
        return None
    set_to = options.get("head_dim")
    return set_to or next(_unchanged(config, {card(s.name).defaults["head_dim"] for s in specs}), None)


def _unchanged(config: Mapping[str, Any], defaults: set[int | None]) -> Iterator[int]:
    """Values of `attention.head_dim` that leave the costs as they are: a variant may take another width than
    dim / num_heads when it is told none.
    """
    cost = cost_of(config)
    unit = config["model"]["dim"] / config["model"]["num_heads"]
    for width in [w for w in defaults if w] + [round(unit * w) for w in WIDTHS]:
        try:
            if cost_of(put(config, {"attention.head_dim": width})) == cost:
                yield width
        except ValueError:
            continue


def _range(now: int, reach: int, step: int = 1) -> range:
    least = max(step, -(-now // reach // step) * step)
    return range(least, max(now * reach, least) + 1, step)

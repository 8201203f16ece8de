"""Which mixer stands in which layer, and whether layers that depend on each other fit."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from attnzoo.attention.base import Mixer
from attnzoo.registry import legal_options


class LayerSpec(NamedTuple):
    """The mixer of one layer: a registered name and the options that only this layer has."""

    name: str
    options: dict[str, Any]


def parse_layout(layout: str | Sequence[Any], depth: int) -> list[LayerSpec]:
    """One `LayerSpec` per layer.

    Args:
        layout: a name (``"mha"``), a pattern that repeats over the depth (``"gated_deltanet*3,mha"``), or a
            list with one entry per layer, each a name or a mapping with ``name`` and options.
        depth: number of layers.

    Raises:
        ValueError: an empty or malformed pattern, a pattern longer than the depth, or a list of another
            length.
    """
    if isinstance(layout, str):
        names = _pattern(layout)
        if len(names) > depth:
            raise ValueError(
                f"layout: the pattern has {len(names)} layers, depth is {depth}; shorten it or raise depth"
            )
        return [LayerSpec(names[i % len(names)], {}) for i in range(depth)]
    specs = [_entry(item) for item in layout]
    if len(specs) != depth:
        raise ValueError(f"layout: a list needs one entry per layer, depth is {depth}, got {len(specs)}")
    return specs


def _pattern(text: str) -> list[str]:
    names: list[str] = []
    for item in text.split(","):
        match = re.fullmatch(r"\s*([A-Za-z_]\w*)\s*(?:\*\s*([1-9]\d*))?\s*", item)
        if match is None:
            raise ValueError(f"layout: {item.strip()!r} is not a name or name*count, got layout={text!r}")
        names += [match[1]] * int(match[2] or 1)
    return names


def _entry(item: Any) -> LayerSpec:
    if isinstance(item, str):
        return LayerSpec(item, {})
    if isinstance(item, Mapping) and isinstance(item.get("name"), str):
        return LayerSpec(item["name"], {k: v for k, v in item.items() if k != "name"})
    raise ValueError(f"layout: an entry is a variant's name or a mapping with a name, got {item!r}")


def check_layers(mixers: Sequence[Mixer]) -> None:
    """Whether every layer that reads what another layer leaves finds it, as it needs it.

    Raises:
        ValueError: naming both layers and what they differ in.
    """
    given: dict[str, tuple[int, object]] = {}
    for i, mixer in enumerate(mixers):
        for name, wanted in mixer.needs.items():
            if name not in given:
                raise ValueError(
                    f"layout: layer {i} ({mixer.name}) reads {name!r}, which no earlier layer gives; "
                    "put the layer that makes it before it"
                )
            source, offered = given[name]
            # a spec may take more than its equal
            fits = wanted.accepts(offered) if hasattr(wanted, "accepts") else offered == wanted
            if not fits:
                raise ValueError(
                    f"layout: layer {i} ({mixer.name}) needs {name!r} with {wanted}, "
                    f"layer {source} gives {offered}; give both the same options"
                )
        given |= {name: (i, what) for name, what in mixer.gives.items()}


def legal_of(name: str, own: dict[str, Any], shared: dict[str, Any]) -> set[str]:
    """Options that a layer takes, with those of what is added to it."""
    add = own.get("add", shared.get("add")) or ()
    return legal_options(name, (add,) if isinstance(add, str) else tuple(add))

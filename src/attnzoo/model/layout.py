"""Which mixer stands in which layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


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

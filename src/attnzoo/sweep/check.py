"""What is wrong with a cell, before any has started: options, architecture, data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from attnzoo.data import Corpus, build_data
from attnzoo.sweep.manifest import Cell
from attnzoo.train.prepare import check_architecture, read_groups


def check_cells(cells: Iterable[Cell]) -> None:
    """Check every configuration, and each distinct architecture once on tensors without content.

    Raises:
        ValueError: the first mistake; it names the arm where there are several.
    """
    cells = list(cells)
    several = len({cell.group for cell in cells}) > 1
    seen = set()
    for cell in cells:
        config = cell.config
        key = json.dumps([config[group] for group in ("model", "attention", "data", "trainer", "init_from")])
        try:
            read_groups(config)
            if key not in seen:
                check_architecture(config)
        except ValueError as error:
            where = f" (in {' '.join(filter(None, cell.group))})" if several else ""
            raise ValueError(f"{error}{where}") from error
        seen.add(key)


def corpora(cells: Iterable[Cell]) -> dict[str, Corpus]:
    """Each distinct corpus, opened once, by `data_key`; cells then find its tokenised text."""
    opened: dict[str, Corpus] = {}
    for cell in cells:
        key = data_key(cell.config)
        if key not in opened:
            opened[key] = build_data(cell.config["data"], cell.config["tokenizer"], cell.seed)
    return opened


def data_key(config: Mapping[str, Any]) -> str:
    """Equal for configurations that read the same text in the same way."""
    return json.dumps([config["data"], config["tokenizer"]], sort_keys=True)

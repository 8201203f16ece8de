"""Equal budgets: every arm is brought to what the baseline of its setting spends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from attnzoo.match import Matched, budget_of, solve
from attnzoo.sweep.check import corpora, data_key
from attnzoo.sweep.manifest import Cell


def match_cells(cells: Sequence[Cell], baseline: str, match: Mapping[str, Any]) -> list[Cell]:
    """The cells with sizes solved for; the baseline's own stay as they are.

    Args:
        match: ``{"budget", "by", "tolerance"}``.

    Raises:
        ValueError: a setting lacks the baseline, or an arm cannot meet its budget.
    """
    budget = match["budget"]
    vocabularies = {key: corpus.tokenizer.vocab_size for key, corpus in corpora(cells).items()}
    sizes = [vocabularies[data_key(cell.config)] for cell in cells]
    targets, solved = {}, {}
    for cell, size in zip(cells, sizes, strict=True):
        if cell.arm == baseline and cell.setting not in targets:
            targets[cell.setting] = budget_of(cell.config, budget, size)
    matched = []
    for cell, size in zip(cells, sizes, strict=True):
        if cell.arm == baseline:
            matched.append(cell)
            continue
        if cell.group not in solved:
            found = solve(cell.config, budget, targets[cell.setting], size, match["by"], match["tolerance"])
            solved[cell.group] = found
        matched.append(_changed(cell, solved[cell.group]))
    return matched


def _changed(cell: Cell, found: Matched) -> Cell:
    names = list(found.changes)
    old, new = [found.before[name] for name in names], [found.changes[name] for name in names]
    facts = {
        "budget": found.budget,
        "target": found.target,
        "value": found.value,
        "knob": " + ".join(names) or None,
        "from": old[0] if len(old) == 1 else old or None,
        "to": new[0] if len(new) == 1 else new or None,
        "deviation": found.deviation,
    }
    changes = tuple(f"{name}={value}" for name, value in found.changes.items())
    return replace(
        cell,
        config=found.apply(cell.config),
        overrides=cell.overrides + changes,
        matched=facts,
    )

"""Symbols and options of flare and of the architectures of their own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnzoo.attention.linear.flare import KeysValues, Latents
from golden import Rule, Symbols, matrix


def _residual(side: str, part: str) -> Rule:
    """Layers of a residual MLP, first, hidden, last; or the one linear map."""

    def rule(given: Symbols, stage: KeysValues) -> Tensor:
        return given[f"{part}_{side}"].T if part == "W" else given[f"{part}_{side}"]

    return rule


WEIGHTS: dict[type, dict[str, Rule]] = {
    KeysValues: {
        f"{side}.0.{ours}": _residual(side, part)
        for side in "kv"
        for ours, part in (("weight", "W"), ("bias", "b"))
    },
    Latents: {"Q": matrix("Q_L")},
}

OPTIONS: dict[str, Any] = {}


def _final(case: Any, slot: str, expected: Tensor) -> None:
    from test_golden import check_cache

    check_cache(case, slot, expected)


CHECKS: dict[str, Any] = {"flare/final_lse": lambda case, expected: _final(case, "lse", expected)}

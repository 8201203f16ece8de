"""attnzoo: every attention variant worth trying for language-model pretraining, behind one contract."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from attnzoo.context import Collector, Context

if TYPE_CHECKING:
    from attnzoo.cards import Claim
    from attnzoo.cost import Cost
    from attnzoo.model import create_model
    from attnzoo.registry import Card, card, create, list_variants, register
    from attnzoo.train.checkpoint import load

__version__ = "0.1.0"
__all__ = [
    "Card",
    "Claim",
    "Collector",
    "Context",
    "Cost",
    "card",
    "create",
    "create_model",
    "list_variants",
    "load",
    "register",
    "testing",
]

# resolved on first use, so that `import attnzoo` costs little beyond torch
_LAZY = {
    "Card": "registry",
    "Claim": "cards",
    "card": "registry",
    "create": "registry",
    "list_variants": "registry",
    "register": "registry",
    "Cost": "cost",
    "create_model": "model",
    "load": "train.checkpoint",
}


def __getattr__(name: str) -> object:
    if name == "testing":
        return import_module("attnzoo.testing")
    if name not in _LAZY:
        raise AttributeError(f"module 'attnzoo' has no attribute {name!r}")
    value = getattr(import_module(f"attnzoo.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

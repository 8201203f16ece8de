"""What is known of a variant: its card, and what it changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

TRAITS = ("causal", "prefix_consistent", "row_independent", "decodes", "packs", "trains")
Choose = Callable[..., str]  # choose(site, **options of the variant) -> frame


@dataclass(frozen=True)
class Card:
    """What there is to know about a variant.

    Args:
        name: registry name. title: in words. paper: title; arxiv: id. family: folder of the zoo.
        summary: one sentence. cached: what decoding stores.
        adapted: what of the paper looks ahead, and the causal form that stands here; empty: causal by nature.
        traits: properties that hold (all True unless the mathematics forbids it); see ``TRAITS``.
        claims: headline claims of the paper with their conditions.
        small: options under which the mechanism shows at some twenty tokens; the property suite uses them
            too.
        layers: how many layers show the mechanism, where it spans several; the property suite tests a stack.
        no_grad: parameters without gradient -> reason.
        defaults: every option with its default; filled in by `register`.
    """

    name: str
    title: str
    family: str
    summary: str
    paper: str = ""
    arxiv: str = ""
    cached: str = "keys and values"
    adapted: str = ""
    traits: Mapping[str, bool] = field(default_factory=dict)
    claims: tuple[str, ...] = ()
    small: Mapping[str, Any] = field(default_factory=dict)
    layers: int = 1
    no_grad: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """A registered variant: its card, its change of a draft, and the frames the change fits (its own
    first, unless ``choose`` says which by layer and options).
    """

    card: Card
    change: Callable[..., None]
    frames: tuple[str, ...]
    host: Mapping[str, Any]
    fixed: Mapping[str, str]
    choose: Choose | None = None
    branches: tuple[str, ...] = ()

    def own_frames(self) -> tuple[str, ...]:
        """The frames that it can have when it is created by its name."""
        return self.frames if self.choose else self.frames[:1]

"""What is known of a variant: its card, and what it changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

TRAITS = ("causal", "prefix_consistent", "row_independent", "decodes", "packs", "trains")
# what `attnzoo compare` can test a claim by; accuracy is of a synthetic task: "accuracy:mqar"
METRICS = (
    "val_bpb",
    "train_flops",
    "params",
    "cache_bytes",
    "tokens_per_second",
    "peak_memory_bytes",
    "decode_ms",
    "context_gain",
    "accuracy",
)
TASKS = (
    "mqar",
    "induction",
    "selective_copying",
    "fuzzy_recall",
    "noisy_recall",
    "compression",
    "memorisation",
    "parity",
    "s3",
    "s5",
    "needle",
    "regression",
    "length_extrapolation",
)
EXPECTED = ("lower", "higher", "equal")
Choose = Callable[..., str]  # choose(site, **options of the variant) -> frame


@dataclass(frozen=True)
class Claim:
    """What a paper says of its variant.

    Args:
        text: in words and numbers.
        metric: what would show it here, see ``METRICS``, for accuracy with the task; empty: nothing that is
            run here can.
        expect: how the variant's value is to that of ``against``: "lower", "higher" or "equal".
        against: the variant that it is compared with.
        where: the paper's conditions: sizes, tokens, data.

    Raises:
        ValueError: an unknown metric, or one without an expectation.
    """

    text: str
    metric: str = ""
    expect: str = ""
    against: str = "mha"
    where: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text:
            raise ValueError(f"claims: text must be a sentence, got {self.text!r}")
        metric, _, task = self.metric.partition(":")
        if metric and metric not in METRICS:
            raise self._error("metric", f"must be empty or one of {', '.join(METRICS)}", self.metric)
        if task not in (TASKS if metric == "accuracy" else ("",)):
            rule = f"accuracy is of one of {', '.join(TASKS)}, written accuracy:TASK; others have no task"
            raise self._error("metric", rule, self.metric)
        if self.expect not in (EXPECTED if metric else ("",)):
            rule = f"must be one of {', '.join(EXPECTED)} with a metric, empty without"
            raise self._error("expect", rule, self.expect)
        if not self.against:
            raise self._error("against", "must name a variant", self.against)

    def _error(self, field_name: str, rule: str, value: str) -> ValueError:
        return ValueError(f"claims: {field_name} {rule}, got {value!r} in {self.text!r}")

    def __str__(self) -> str:
        return f"{self.text} ({self.where})" if self.where else self.text


@dataclass(frozen=True)
class Card:
    """What there is to know about a variant.

    Args:
        name: registry name. title: in words. paper: title; arxiv: id. family: folder of the zoo.
        summary: one sentence. cached: what decoding stores.
        adapted: what of the paper looks ahead, and the causal form that stands here; empty: causal by nature.
        traits: properties that hold (all True unless the mathematics forbids it); see ``TRAITS``.
        claims: headline claims of the paper; a plain string is one that cannot be tested here.
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
    claims: tuple[Claim, ...] = ()
    small: Mapping[str, Any] = field(default_factory=dict)
    layers: int = 1
    no_grad: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.claims, str):
            raise ValueError(f"claims: must be a list of claims, got {self.claims!r} on {self.name}'s card")
        claims = tuple(Claim(c) if isinstance(c, str) else c for c in self.claims)
        object.__setattr__(self, "claims", claims)


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

"""What a run is told about its length, precision and optimiser, checked before anything starts."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

DEFAULT_STEPS = 300
PRECISIONS = ("auto", "bf16", "fp32")
SCHEDULES = ("cosine", "wsd", "constant")
OPTIMISERS = ("adamw", "muon")
TIME_UNITS = (1, 60, 3600, 86400)


@dataclass(frozen=True)
class TrainerSettings:
    """The `trainer` group.

    Args:
        max_steps, max_tokens, max_time: the first limit reached stops the run. ``max_time`` is in seconds or
            ``[[DD:]HH:]MM:SS``. With no limit at all: `DEFAULT_STEPS` optimiser steps.
        accumulate: micro-batches per optimiser step; it divides memory and never changes the result.
        precision: "bf16" (autocast over fp32 weights), "fp32", or "auto": bf16 where the hardware has it.
        compile: `torch.compile` each block.
        checkpoint_activations: recompute each block in the backward pass.
        grad_clip: largest global gradient norm; None or 0 for no clipping.
        log_every: optimiser steps between two lines of metrics.
        val_every: optimiser steps between two validations; None for one at the end only.
        aux_weights: weight of an auxiliary loss by its name, instead of the one its variant recommends.
        decode_tokens: one-token steps that are timed at each context when the run ends; 0 for none.
        sample_prompt, sample_tokens: the text printed when the run ends; 0 tokens for none.
    """

    max_steps: int | None = None
    max_tokens: int | None = None
    max_time: float | str | None = None
    accumulate: int = 1
    precision: str = "auto"
    compile: bool = False
    checkpoint_activations: bool = False
    grad_clip: float | None = 1.0
    log_every: int = 10
    val_every: int | None = None
    aux_weights: Mapping[str, float] = field(default_factory=dict)
    decode_tokens: int = 16
    sample_prompt: str = "\n"
    sample_tokens: int = 0

    def __post_init__(self) -> None:
        for name in ("max_steps", "max_tokens", "val_every"):
            if getattr(self, name) is not None:
                check_whole(f"trainer.{name}", getattr(self, name), 1)
        check_whole("trainer.accumulate", self.accumulate, 1)
        check_whole("trainer.log_every", self.log_every, 1)
        for name in ("decode_tokens", "sample_tokens"):
            check_whole(f"trainer.{name}", getattr(self, name), 0)
        _check_choice("trainer.precision", self.precision, PRECISIONS)
        for name in ("compile", "checkpoint_activations"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"trainer.{name}: must be true or false, got {getattr(self, name)!r}")
        if self.grad_clip is not None:
            check_number("trainer.grad_clip", self.grad_clip, 0.0)
        for name, weight in self.aux_weights.items():
            check_number(f"trainer.aux_weights.{name}", weight)
        if self.max_time is not None:
            _seconds(self.max_time)

    @property
    def max_seconds(self) -> float | None:
        """`max_time` in seconds."""
        return None if self.max_time is None else _seconds(self.max_time)

    def total_steps(self, tokens_per_step: int) -> int | None:
        """Optimiser steps of the whole run, or None where only the clock ends it."""
        limits = [] if self.max_steps is None else [self.max_steps]
        if self.max_tokens is not None:
            limits.append(math.ceil(self.max_tokens / tokens_per_step))
        if not limits and self.max_time is None:
            return DEFAULT_STEPS
        return min(limits, default=None)


@dataclass(frozen=True)
class OptimSettings:
    """The `optim` group.

    Args:
        name: "adamw", or "muon" (hidden matrices by Muon, everything else by AdamW).
        lr: peak learning rate of both; Muon's update is rescaled to the size of AdamW's.
        betas, eps: AdamW's.
        momentum: Muon's.
        weight_decay: decoupled; never on vectors, nor on parameters marked `no_weight_decay`.
        schedule: "cosine", "wsd" (warm-up, stable, decay) or "constant" (after the warm-up).
        warmup, decay: fractions of the run; ``decay`` is the last phase of "wsd".
        final: the last learning rate as a fraction of ``lr``.
    """

    name: str = "adamw"
    lr: float = 2e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.95
    weight_decay: float = 0.1
    schedule: str = "cosine"
    warmup: float = 0.05
    decay: float = 0.2
    final: float = 0.1

    def __post_init__(self) -> None:
        _check_choice("optim.name", self.name, OPTIMISERS)
        _check_choice("optim.schedule", self.schedule, SCHEDULES)
        check_number("optim.lr", self.lr, 0.0)
        check_number("optim.eps", self.eps, 0.0)
        check_number("optim.weight_decay", self.weight_decay, 0.0)
        for name in ("momentum", "warmup", "decay", "final"):
            check_number(f"optim.{name}", getattr(self, name), 0.0, 1.0)
        if len(self.betas) != 2:
            raise ValueError(f"optim.betas: must be two numbers in [0, 1], got {list(self.betas)}")
        for beta in self.betas:
            check_number("optim.betas", beta, 0.0, 1.0)
        if self.schedule == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(
                f"optim.warmup + optim.decay: must be at most 1, got {self.warmup} + {self.decay}"
            )


Settings = TypeVar("Settings", TrainerSettings, OptimSettings)


@dataclass(frozen=True)
class Plan:
    """What is fixed for the length of a run.

    Args:
        seed: of the weights, the samples and every random draw.
        batch_size, seq_len: samples per optimiser step over all ranks, tokens per sample.
        total_steps: optimiser steps of the whole run, None where only the clock ends it.
        train_flops: per token, forward and backward, as the chosen implementation runs them.
        offset: the counter of the first sample, were all steps of this ``batch_size``.
    """

    seed: int
    batch_size: int
    seq_len: int
    total_steps: int | None
    train_flops: float
    offset: int = 0

    def first_sample(self, step: int) -> int:
        """The counter of the first sample of the step after ``step`` steps."""
        return self.offset + step * self.batch_size

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.seq_len


def read_settings(group: str, kind: type[Settings], values: Mapping[str, Any]) -> Settings:
    """One config group as its settings object.

    Raises:
        ValueError: an unknown key, or a value against its field's rule.
    """
    legal = [f.name for f in fields(kind)]
    for key in values:
        if key not in legal:
            raise ValueError(f"{group}.{key}: no such key; {nearest(str(key), legal)}")
    return kind(**values)


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: the closest known ones, or all of them where none is close."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {', '.join(close)}?" if close else f"there are {', '.join(known)}"


def check_number(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> None:
    """Raise a ValueError unless ``value`` is a finite number in [low, high]."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not low <= value <= high:
        bounds = (
            f" in [{low:g}, {high:g}]"
            if high < math.inf
            else f" of at least {low:g}"
            if low > -math.inf
            else ""
        )
        raise ValueError(f"{name}: must be a number{bounds}, got {value!r}")


def check_whole(name: str, value: Any, low: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name}: must be an integer of at least {low}, got {value!r}")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: must be one of {', '.join(choices)}, got {value!r}")


def _seconds(value: float | str) -> float:
    """Seconds from a number or ``[[DD:]HH:]MM:SS``."""
    parts = str(value).split(":")
    try:
        numbers = [float(part) for part in reversed(parts)]
    except ValueError:
        numbers = []
    seconds = sum(number * unit for number, unit in zip(numbers, TIME_UNITS, strict=False))
    if not 1 <= len(numbers) <= len(TIME_UNITS) or not 0 < seconds < math.inf:
        raise ValueError(f"trainer.max_time: must be positive seconds or [[DD:]HH:]MM:SS, got {value!r}")
    return seconds

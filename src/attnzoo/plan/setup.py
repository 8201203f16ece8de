"""What is planned: a job, and how ranks share it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch

from attnzoo import create_model
from attnzoo.cost import Cost
from attnzoo.plan.trace import Subject, Traced


class Setup(NamedTuple):
    """How ranks share a job.

    Args:
        gpus: ranks. strategy: "ddp" or "fsdp" (FSDP2, a unit per block); of a single rank, neither.
        tensor, context: ranks that share the heads, and the sequences; tensor ranks are neighbours.
        rows: samples of a micro-batch on a rank. accumulate: micro-batches of a step.
        recompute: blocks run again in the backward pass (`trainer.checkpoint_activations`).
    """

    gpus: int = 1
    strategy: str = "ddp"
    tensor: int = 1
    context: int = 1
    rows: int = 1
    accumulate: int = 1
    recompute: bool = False

    @property
    def data(self) -> int:
        """Ranks, or groups of them, that read different samples."""
        return self.gpus // (self.tensor * self.context)

    @property
    def shards(self) -> int:
        """Ranks that a parameter is spread over."""
        return self.data * self.context if self.strategy == "fsdp" else 1

    @property
    def batch(self) -> int:
        """Samples of a step."""
        return self.data * self.rows * self.accumulate


@dataclass(frozen=True)
class Job:
    """A model and what a step trains it on.

    Args:
        options: arguments of `create_model`. seq_len: tokens of a sample.
        optimiser: "adamw" or "muon". bf16: under autocast; else fp32.
        gpu: the implementations of a GPU; else those of this CPU.
        val_seq_len: tokens of a held-out sample, where they are others.
    """

    options: Mapping[str, Any]
    seq_len: int
    optimiser: str = "adamw"
    bf16: bool = True
    gpu: bool = True
    val_seq_len: int | None = None
    _subjects: dict[int, Subject | str] = field(default_factory=dict, repr=False, compare=False)
    _traces: dict[tuple[int, int, int], Traced] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def cost(self) -> Cost:
        return self.cost_at(self.seq_len)

    @cached_property
    def _costs(self) -> dict[int, Cost]:
        return {}

    def cost_at(self, length: int) -> Cost:
        """The model's costs at another length."""
        if length not in self._costs:
            self._costs[length] = self.model.cost(length)
        return self._costs[length]

    @cached_property
    def model(self) -> Any:
        """Without weights."""
        with torch.device("meta"):
            return create_model(**self.options)

    def traced(self, setup: Setup) -> Traced:
        """What a rank's micro-batch holds and exchanges.

        Raises:
            ValueError: the model cannot be shared so; see `Subject`.
        """
        one = self._traced(setup.context, setup.tensor, 1)
        if setup.rows == 1:
            return one
        return one.scaled(self._traced(setup.context, setup.tensor, 2), setup.rows)

    def _traced(self, context: int, tensor: int, rows: int) -> Traced:
        key = context, tensor, rows
        if key not in self._traces:
            self._traces[key] = self.subject(tensor).trace(rows, self.seq_len, context)
        return self._traces[key]

    def subject(self, tensor: int = 1) -> Subject:
        """The model, or the part of one of ``tensor`` ranks that share its heads; built, or refused, once.

        Raises:
            ValueError: see `Subject`.
        """
        if tensor not in self._subjects:
            try:
                self._subjects[tensor] = Subject(self.options, tensor, self.bf16, self.gpu)
            except ValueError as error:
                self._subjects[tensor] = str(error)
        found = self._subjects[tensor]
        if isinstance(found, str):
            raise ValueError(found)
        return found

    @property
    def lengths(self) -> set[int]:
        """Tokens of a sample, in training and held out."""
        return {self.seq_len, self.val_seq_len or self.seq_len}

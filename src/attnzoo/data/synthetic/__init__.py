"""Synthetic tasks: sequences whose answers need one ability, drawn on line and never from a fixed set.

A task is a dataclass of dials (`task`); families of tasks are in `recall`, `lookup`, `copying`,
`states` and `functions`; `corpus` makes one into what the trainer reads. Each docstring shows a sample.
"""

from __future__ import annotations

from . import copying, functions, lookup, recall, states
from .corpus import PREFIX, SyntheticConfig, SyntheticCorpus, build_synthetic, parse_synthetic
from .task import TASKS, Task, show

__all__ = [
    "PREFIX",
    "TASKS",
    "SyntheticConfig",
    "SyntheticCorpus",
    "Task",
    "build_synthetic",
    "copying",
    "functions",
    "lookup",
    "parse_synthetic",
    "recall",
    "show",
    "states",
]

"""What the trainer refuses, a plan refuses: the same checks, of a layout instead of a configuration."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from attnzoo.parallel.context import check_spans
from attnzoo.parallel.layout import LauncherSettings
from attnzoo.plan.setup import Job, Setup
from attnzoo.train.prepare import check_layout


def check_job(job: Job, batch: int, fixed: Mapping[str, Any], aux_weights: Collection[str]) -> None:
    """Whether a run of ``job`` could begin on some number of ranks.

    Args:
        batch: samples of a step. fixed: fields of `Setup` that are given. aux_weights: names of losses.

    Raises:
        ValueError: in the trainer's words; or `Subject`'s, of what no plan can be made for.
    """
    together = fixed.get("tensor", 1) * fixed.get("context", 1)
    check_setup(job, Setup(together, **{"strategy": "auto"} | fixed))
    rows = max(1, batch // fixed.get("accumulate", 1))
    job.subject().check(rows, max(job.lengths), aux_weights)


def check_setup(job: Job, setup: Setup) -> None:
    """Whether a run of ``job`` may be laid out so.

    Raises:
        ValueError: in the trainer's words.
    """
    launcher = LauncherSettings(
        devices=setup.gpus,
        strategy=setup.strategy,
        tensor_parallel=setup.tensor,
        context_parallel=setup.context,
    )
    check_layout(launcher, job.optimiser, setup.batch, setup.accumulate)
    for length in job.lengths:
        check_spans(job.subject().model, setup.context, length)
    job.subject(setup.tensor)

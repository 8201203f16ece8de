"""What the trainer refuses, a plan refuses: the same checks, of a layout instead of a configuration."""

from __future__ import annotations

from attnzoo.parallel.context import check_spans
from attnzoo.parallel.layout import LauncherSettings
from attnzoo.plan.setup import Job, Setup
from attnzoo.train.prepare import check_layout


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
    if job.val_seq_len is not None:
        check_spans(job.model, setup.context, job.val_seq_len)

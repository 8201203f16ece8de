"""What happens beside the optimiser steps: checkpoints and a graceful end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from attnzoo.parallel.pieces import shards_of
from attnzoo.signals import Request
from attnzoo.train.draws import gather_draw_states, restore_draw_states
from attnzoo.train.guard import RunFailed, check_finite
from attnzoo.train.module import LanguageModule
from attnzoo.train.sharded import save_sharded
from attnzoo.train.store import FOLDER, save_checkpoint
from attnzoo.train.writer import Writer, to_cpu


class Checkpoint(Callback):
    """Saves at regular steps and when the run ends, into ``checkpoints/`` of the run folder.

    Args:
        every: optimiser steps between two checkpoints; None for one at the end only.
        keep: how many of the newest to keep.
        keep_every: keep those at multiples of so many steps for good; None for none.
        background: write in a thread while training goes on; a copy of the whole state waits in memory.
            A failure ends the run at the next checkpoint or at the end.
        sharded: every rank writes the part that it holds, into a folder (`attnzoo.train.sharded`); nothing is
            gathered on rank 0.
    """

    def __init__(
        self,
        every: int | None = None,
        keep: int = 1,
        keep_every: int | None = None,
        background: bool = False,
        sharded: bool = False,
    ) -> None:
        for name, value in (("every", every), ("keep", keep), ("keep_every", keep_every)):
            whole = isinstance(value, int) and not isinstance(value, bool)
            if not (value is None and name != "keep") and (not whole or value < 1):
                raise ValueError(
                    f"callbacks.checkpoint.{name}: must be an integer of at least 1, got {value!r}"
                )
        for name, value in (("background", background), ("sharded", sharded)):
            if not isinstance(value, bool):
                raise ValueError(f"callbacks.checkpoint.{name}: must be true or false, got {value!r}")
        if background and sharded:
            raise ValueError(
                "callbacks.checkpoint.background: ranks that write their parts wait for each other, got "
                "sharded=true; set one of them to false"
            )
        self.every, self.keep, self.keep_every, self.sharded = every, keep, keep_every, sharded
        self.about: dict[str, Any] = {}  # of the run: data, vocabulary, configuration, versions
        self._writer = Writer(background)

    def on_train_start(self, trainer: Trainer, module: LanguageModule) -> None:
        self._saved = module.progress.step

    def on_train_batch_end(self, trainer: Trainer, module: LanguageModule, *args: Any) -> None:
        step = module.progress.step
        if step == self._saved or not (trainer.should_stop or (self.every and step % self.every == 0)):
            return
        with module.meter.pause():
            self._settle(trainer, module)  # the one before
            self._save(trainer, module)
            if not self._writer.background:
                self._settle(trainer, module)
        self._saved = step

    def _save(self, trainer: Trainer, module: LanguageModule) -> None:
        content = self.about | module.checkpoint(self.sharded) | position(module)
        content["draws"] = gather_draw_states(trainer.world_size)
        folder, step = Path(trainer.default_root_dir) / FOLDER, module.progress.step
        if self.sharded:
            cuts, layout = shards_of(module.model), module.ranks.layout
            try:
                save_sharded(folder, step, content, cuts, layout, self.keep, self.keep_every)
            except RunFailed:
                module.status = "failed"
                raise
            return
        if not trainer.is_global_zero:
            return
        if self._writer.background:
            content = to_cpu(content)

        def work() -> None:
            check_finite(content, step)
            save_checkpoint(folder, step, content, self.keep, self.keep_every)

        self._writer.start(work)

    def _settle(self, trainer: Trainer, module: LanguageModule) -> None:
        """Wait for what is being written; all ranks fail together, so that none waits for another."""
        failure = self._writer.finish() if trainer.is_global_zero else None
        failure = trainer.strategy.broadcast(failure)
        if failure:
            module.status = "failed"
            raise RunFailed(failure)

    def on_train_end(self, trainer: Trainer, module: LanguageModule) -> None:
        self._settle(trainer, module)

    def on_exception(self, trainer: Trainer, module: LanguageModule, exception: BaseException) -> None:
        failure = self._writer.finish()
        if failure and failure != str(exception):
            print(failure, flush=True)  # the exception is what ends the run


def position(module: LanguageModule) -> dict[str, Any]:
    """Where the schedule and the data are; a checkpoint is taken between steps, so no micro-batch is open."""
    plan, step = module.plan, module.progress.step
    return {
        "schedule": {
            "step": step,
            "total_steps": plan.total_steps,
            "max_seconds": module.settings.max_seconds,
            "lr": max(group["lr"] for group in module.optimizer.param_groups),
        },
        "position": {
            "sample": plan.first_sample(step),
            "micro": 0,
            "accumulate": module.settings.accumulate,
        },
        "metrics": module.metrics,
    }


class Draws(Callback):
    """Goes on with the checkpoint's random generators, before anything of the first step draws.

    Args:
        states: of each rank of the run that was saved; further ranks start as a new run does.
    """

    def __init__(self, states: Sequence[dict[str, Any]]) -> None:
        self.states = list(states)

    def on_train_batch_start(self, trainer: Trainer, module: LanguageModule, *args: Any) -> None:
        if trainer.global_rank < len(self.states):
            restore_draw_states(self.states[trainer.global_rank])
        self.states = []


class GracefulStop(Callback):
    """The first stop signal ends the run after its step, with a checkpoint; a second Ctrl-C aborts it.

    It hears them until `close`: schedulers send them again while the last checkpoint is still being written.
    """

    _request: Request | None = None

    def on_train_start(self, trainer: Trainer, module: LanguageModule) -> None:
        def tell(number: int) -> None:
            module.stop_signal = number

        self._request = Request(tell)

    def close(self) -> None:
        """Handle the signals as before the run."""
        if self._request is not None:
            self._request.close()

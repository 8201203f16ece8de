"""What happens beside the optimiser steps: checkpoints and a graceful end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from attnzoo.signals import Request
from attnzoo.train.checkpoint import FOLDER, save_checkpoint
from attnzoo.train.module import LanguageModule


class Checkpoint(Callback):
    """Saves at regular steps and when the run ends, into ``checkpoints/`` of the run folder.

    Args:
        every: optimiser steps between two checkpoints; None for one at the end only.
        keep: how many of the newest to keep.
    """

    def __init__(self, every: int | None = None, keep: int = 1) -> None:
        for name, value in (("every", every), ("keep", keep)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(
                    f"callbacks.checkpoint.{name}: must be an integer of at least 1, got {value!r}"
                )
        self.every, self.keep = every, keep
        self.about: dict[str, Any] = {}  # data and vocabulary, set by the run

    def on_train_start(self, trainer: Trainer, module: LanguageModule) -> None:
        self._saved = module.progress.step

    def on_train_batch_end(self, trainer: Trainer, module: LanguageModule, *args: Any) -> None:
        step = module.progress.step
        if step == self._saved or not (trainer.should_stop or (self.every and step % self.every == 0)):
            return
        with module.meter.pause():
            content = module.checkpoint()
            if trainer.is_global_zero:
                save_checkpoint(
                    Path(trainer.default_root_dir) / FOLDER, step, self.about | content, self.keep
                )
            trainer.strategy.barrier()
        self._saved = step


class GracefulStop(Callback):
    """The first stop signal ends the run after its step, with a checkpoint; a second Ctrl-C aborts it."""

    def on_train_start(self, trainer: Trainer, module: LanguageModule) -> None:
        def tell(number: int) -> None:
            module.stop_signal = number

        self._request = Request(tell)

    def on_train_end(self, trainer: Trainer, module: LanguageModule) -> None:
        self._request.close()

    def on_exception(self, trainer: Trainer, module: LanguageModule, exception: BaseException) -> None:
        if hasattr(self, "_request"):
            self._request.close()

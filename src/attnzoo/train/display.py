"""The progress of a run: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from typing import Any

from lightning.pytorch import Callback, Trainer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from attnzoo.train.module import LanguageModule


class ProgressDisplay(Callback):
    """Loss, speed and remaining time.

    Args:
        seconds: least time between two plain lines; a validation is always shown.
    """

    def __init__(self, seconds: float = 5.0) -> None:
        self.seconds = seconds
        self._bar: Progress | None = None

    def on_train_start(self, trainer: Trainer, module: LanguageModule) -> None:
        if trainer.is_global_zero:
            print(_header(trainer, module), flush=True)
        self._metrics = module.metrics
        self._first, self._begun = module.fraction, time.monotonic()
        self._shown = self._begun - self.seconds
        if trainer.is_global_zero and sys.stdout.isatty():
            self._bar = Progress(BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"))
            self._task = self._bar.add_task("first step", total=1.0)
            self._bar.start()

    def on_train_batch_end(self, trainer: Trainer, module: LanguageModule, *args: Any) -> None:
        if not trainer.is_global_zero:
            return
        fresh, self._metrics = module.metrics is not self._metrics, module.metrics
        validated = fresh and "val_loss" in module.metrics
        if self._bar:
            if fresh:
                self._bar.update(self._task, description=" · ".join(self._parts(module)))
            self._bar.update(self._task, completed=module.fraction)
            if validated:
                self._bar.console.print(self._line(module), highlight=False)
        elif validated or (fresh and time.monotonic() - self._shown >= self.seconds):
            self._shown = time.monotonic()
            print(self._line(module), flush=True)

    def on_train_end(self, trainer: Trainer, module: LanguageModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, module: LanguageModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None

    def _line(self, module: LanguageModule) -> str:
        metrics, held_out = module.metrics, []
        if metrics.get("val_bpb") is not None:
            held_out = [f"validation {metrics['val_bpb']:.3f} bits/byte"]
        elif metrics.get("val_accuracy") is not None:
            held_out = [f"validation {metrics['val_accuracy']:.1%} correct"]
        return " · ".join(self._parts(module) + held_out)

    def _parts(self, module: LanguageModule) -> list[str]:
        metrics, total = module.metrics, module.plan.total_steps
        step = f"step {metrics['step']}/{total}" if total else f"step {metrics['step']}"
        parts = [step, f"loss {metrics['train_loss']:.3f}"]
        if metrics["tokens_per_second"]:
            parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
        if self._first < module.fraction < 1.0:
            rate = (module.fraction - self._first) / (time.monotonic() - self._begun)
            parts.append(f"{timedelta(seconds=round((1 - module.fraction) / rate))} left")
        return parts


def _header(trainer: Trainer, module: LanguageModule) -> str:
    plan, params = module.plan, sum(p.numel() for p in module.model.parameters())
    steps = f"{plan.total_steps} steps" if plan.total_steps else f"{module.settings.max_seconds:g} s"
    return (
        f"{module.model.config['layout']} · {params:,} parameters · "
        f"{steps} of {plan.tokens_per_step:,} tokens · {trainer.precision} on {module.device}"
    )

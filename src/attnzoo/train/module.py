"""The Lightning module: one optimiser step of language modelling, counted in steps and tokens."""

from __future__ import annotations

import math
import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from attnzoo import Collector
from attnzoo.parallel.ranks import Ranks, tied_names
from attnzoo.parallel.shard import whole_layers
from attnzoo.train.batches import Batch, batch_fingerprint
from attnzoo.train.blocks import prepare_blocks
from attnzoo.train.draws import derived_seed, seed_draws
from attnzoo.train.evaluate import Validation
from attnzoo.train.guard import RunFailed, find_culprit
from attnzoo.train.metrics import Meter, Progress
from attnzoo.train.objective import objective_of
from attnzoo.train.optim import build_optimizer, load_named_state, lr_factor, named_state, set_learning_rate
from attnzoo.train.settings import OptimSettings, Plan, TrainerSettings


class LanguageModule(pl.LightningModule):
    """Trains a language model; Lightning brings devices, precision and accumulation.

    The loss of an optimiser step is the sum over the targets of all its micro-batches and ranks, divided by
    their number. Lightning and its strategies average over micro-batches and ranks, as if all had equally
    many targets, so `training_step` divides by a constant and `configure_gradient_clipping` puts it right.

    Args:
        model: the language model; its parameters stay fp32 whatever the precision.
        ranks: who shares the model, the samples and the sequences.
        resume: the checkpoint to go on from.
    """

    def __init__(
        self,
        model: nn.Module,
        trainer: TrainerSettings,
        optim: OptimSettings,
        plan: Plan,
        validation: Validation,
        ranks: Ranks,
        resume: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.plan, self.validation, self.ranks = model, plan, validation, ranks
        self.settings, self.optim_settings, self.objective = trainer, optim, objective_of(model)
        self.progress = Progress(**resume["progress"]) if resume else Progress()
        self.metrics: dict[str, Any] = dict(resume.get("metrics", {})) if resume else {}  # of the last report
        self.status = "failed"  # until the run ends in another way
        self.stop_signal = 0  # the signal that asked for an end
        self.meter: Meter | None = None
        self._resume = resume
        prepare_blocks(model, trainer.checkpoint_activations, trainer.compile)

    @property
    def fraction(self) -> float:
        """How much of the run is done, by the nearest of its limits."""
        steps = self.progress.step / self.plan.total_steps if self.plan.total_steps else 0.0
        clock = self.progress.seconds / self.settings.max_seconds if self.settings.max_seconds else 0.0
        return min(max(steps, clock), 1.0)

    def configure_model(self) -> None:
        # the module itself is moved later
        self.ranks.spread(self.model, self.trainer.strategy.root_device.type)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.ranks.mark(self.model)
        self.optimizer = build_optimizer(self.model, self.optim_settings)
        if self._resume:
            load_named_state(self.model, self.optimizer, self._resume.pop("optimizer"), self.ranks.part)
            self._resume = None
        return self.optimizer

    def checkpoint(self, sharded: bool = False) -> dict[str, Any]:
        """What a resumed run needs besides its configuration; all ranks call it together.

        The learning rate, the samples and all random draws are functions of the seed and the step, so neither
        schedule nor sampler nor what layers draw have a state to keep.

        Args:
            sharded: with this rank's parts of the tensors, instead of all of them on rank 0.
        """
        params = dict(self.model.named_parameters(remove_duplicate=False))
        take = self.ranks.parts if sharded else self.ranks.whole
        weights, tied = self.model.state_dict(), tied_names(params)
        found = take({name: weights[name] for name in weights if name not in tied}, params)
        state = named_state(self.model, self.optimizer)
        return {
            "model": found | {name: found[first] for name, first in tied.items() if first in found},
            "model_config": dict(self.model.config),
            "optimizer": {
                name: take(entry, dict.fromkeys(_shaped(entry, params[name]), params[name]))
                for name, entry in state.items()
            },
            "progress": vars(self.progress).copy(),
        }

    def on_train_start(self) -> None:
        self._epoch = time.perf_counter() - self.progress.seconds
        self.meter = Meter(
            self.plan.tokens_per_step, self.plan.train_flops, self.device, self.trainer.world_size
        )
        if self.fraction == 1.0:  # it was trained, but ended before its summary was written
            self.status, self.trainer.should_stop = "completed", True

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        micro = batch_idx % self.settings.accumulate
        if micro == 0:
            self._begin_step()
        self._batches.append(batch)
        nll, count, auxiliary = self._loss_terms(batch, micro)
        self._sums += torch.stack([nll.detach(), auxiliary.detach() * count, count]).to(self._sums)
        self.meter.hear(self._collector.losses, count.to(self._sums))
        for name, layers in self._collector.steps.items():
            known = self._stats.setdefault(name, {})
            for layer, value in layers.items():
                known[layer] = value / self.settings.accumulate + known.get(layer, 0.0)
        return (nll + auxiliary * count) * (
            self.settings.accumulate * self.ranks.layout.batches / self.plan.tokens_per_step
        )

    def _begin_step(self) -> None:
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        self._sums = torch.zeros(3, dtype=wide, device=self.device)
        self._batches: list[Batch] = []
        self._stats: dict[str, dict[int, Tensor]] = {}
        done, total = self.progress.step, self.plan.total_steps
        if total is None:
            done, total = self.progress.seconds, self.settings.max_seconds
        self._lr = set_learning_rate(self.optimizer, lr_factor(self.optim_settings, done, total))

    def _loss_terms(self, batch: Batch, micro: int) -> tuple[Tensor, Tensor, Tensor]:
        # draws depend on the step, not on what was drawn before, so that a resumed run repeats them
        layout = self.ranks.layout
        seed_draws(f"{self.plan.seed}/{self.progress.step}/{micro}/{layout.rank // layout.tensor}")
        self._collector = Collector()
        nll, count = self.objective.training(self.model, batch, self._collector, self.ranks.span)
        return nll, count, self._collector.total(self.settings.aux_weights)

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        """Make the gradients those of the token-weighted mean, clip them, and stop on what is not finite."""
        ranks, layout = self.ranks, self.ranks.layout
        grads = ranks.settle_gradients(self.model)
        now = time.perf_counter() - self._epoch
        square = ranks.squared_norm(self.model) if layout.sharded else torch.zeros((), device=self.device)
        more = self._sums.new_tensor([now, float(self.stop_signal > 0)])
        sums = ranks.add(torch.cat([self._sums / layout.tensor, more, square.to(self._sums)[None]]))
        norm = sums[-1].sqrt() if layout.sharded else torch.nn.utils.get_total_norm(grads)
        # the only wait for the device in a step
        nll, auxiliary, count, seconds, stop, _, norm = torch.cat([sums, norm.to(sums)[None]]).tolist()
        weight = self.plan.tokens_per_step / max(count, 1.0)
        self._norm = norm * weight
        if not math.isfinite(nll + auxiliary + self._norm):
            self._fail("gradient" if math.isfinite(nll + auxiliary) else "loss")
        if self.settings.grad_clip:
            weight *= min(1.0, self.settings.grad_clip / (self._norm + 1e-6))
        if weight != 1.0:
            torch._foreach_mul_(grads, weight)
        self.meter.add(nll, auxiliary, count)
        # ranks must stop together, so they share one clock and every request
        self._seconds, self._stop = seconds / layout.world, stop > 0

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        step = self.progress.step + 1
        self._tell_layers(step)
        self.progress = Progress(step, self.progress.tokens + self.plan.tokens_per_step, self._seconds)
        finished = self.fraction == 1.0
        validate = finished or bool(self.settings.val_every and step % self.settings.val_every == 0)
        if validate or self._stop or step % self.settings.log_every == 0:
            self._report(validate)
        if finished or self._stop:
            # it may have reached some of the ranks only, and all of them end by it
            signals = torch.tensor(float(self.stop_signal), device=self.device)
            self.stop_signal = int(self.ranks.largest(signals))
            self.status = "completed" if finished else "stopped"
            self.trainer.should_stop = True

    def _tell_layers(self, step: int) -> None:
        """What changes in the layers outside the gradient, the same on every rank."""
        for layers in self._stats.values():
            for value in layers.values():
                self.ranks.add(value).div_(self.ranks.layout.world)
        generator = torch.Generator().manual_seed(derived_seed(f"{self.plan.seed}/{step}/layers"))
        with whole_layers(self.model):
            self.model.on_step(step, self._stats, generator)

    def _report(self, validate: bool) -> None:
        report = self.meter.report(lambda sums: self.ranks.add(sums / self.ranks.layout.tensor))
        metrics = {**vars(self.progress), **report, "lr": self._lr, "grad_norm": self._norm}
        if validate:
            with self.meter.pause():
                metrics |= self.validation.run(self.model, self.device, self.autocast)
        self.metrics = metrics
        numbers = {k: v for k, v in metrics.items() if isinstance(v, (int, float))}
        for logger in self.trainer.loggers:
            logger.log_metrics(numbers, step=self.progress.step)

    def autocast(self) -> Any:
        """The precision of the run, for a forward pass outside `training_step`."""
        return self.trainer.precision_plugin.forward_context()

    def _fail(self, what: str) -> None:
        def forward() -> None:
            for micro, batch in enumerate(self._batches):
                with self.autocast():
                    self._loss_terms(batch, micro)

        first, size = self.plan.first_sample(self.progress.step), self.plan.batch_size
        raise RunFailed(
            f"step {self.progress.step + 1}: the {what} is not finite, "
            f"first in {find_culprit(self.model, forward)}; "
            f"batch {batch_fingerprint(self._batches)}, samples {first} to {first + size - 1}; "
            "try a smaller optim.lr, or trainer.precision=fp32"
        )


def _shaped(entry: dict[str, Tensor], param: nn.Parameter) -> list[str]:
    """Which parts of an optimiser's state of a parameter are cut as it is."""
    return [name for name, value in entry.items() if value.shape == param.shape]

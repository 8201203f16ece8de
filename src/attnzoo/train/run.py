"""A run: the folder is opened, the model trained, the summary written."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import warnings
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers.logger import Logger
from omegaconf import OmegaConf

from attnzoo.model import generate
from attnzoo.parallel.launch import adopt, end_ranks
from attnzoo.parallel.layout import Layout
from attnzoo.parallel.pulse import Pulse
from attnzoo.parallel.ranks import Ranks
from attnzoo.redaction import plain_command_line, redact, redact_text
from attnzoo.secure import allowed_targets, build
from attnzoo.signals import deaf
from attnzoo.train.batches import CounterBatches, train_loader
from attnzoo.train.callbacks import Checkpoint, Draws, GracefulStop
from attnzoo.train.decode_speed import decode_summary
from attnzoo.train.evaluate import Validation
from attnzoo.train.failure import closing, explain, opening
from attnzoo.train.folder import environment, versions, write_json
from attnzoo.train.hardware import choose_precision, peak_memory
from attnzoo.train.logger import forget_after
from attnzoo.train.module import LanguageModule
from attnzoo.train.prepare import Run
from attnzoo.train.resume import identity


def execute(run: Run) -> dict[str, Any]:
    """Open the run folder, train, and return the summary.

    Raises:
        RunFailed: the loss is not finite, no checkpoint can be written, or a worker process or another rank
            died or hangs. The summary then says "failed".
        ValueError: the hardware or a logger asked for is not there; nothing is written.
    """
    quieten()
    stop = GracefulStop()
    trainer, reason, layout = _build_trainer(run, stop)
    ranks, pulse = Ranks(layout), Pulse(layout.rank, layout.world, run.launcher.timeout)
    trainer.callbacks.append(pulse)
    adopt(trainer)
    first = run.resume["progress"]["step"] if run.resume else 0
    batches = CounterBatches(
        first,
        run.plan.total_steps,
        run.plan.batch_size,
        run.trainer.accumulate,
        layout.data_rank,
        layout.data,
        run.plan.offset,
    )
    if batches.size % run.corpus.pack:
        raise ValueError(
            f"data.pack: must divide the {batches.size} samples of a micro-batch, got {run.corpus.pack}; "
            "lower trainer.accumulate or raise data.batch_size"
        )
    validation = Validation(run.corpus.validation(), batches.size, ranks)
    module = LanguageModule(run.model, run.trainer, run.optim, run.plan, validation, ranks, run.resume)
    trainer.loggers = _instances(run.config, "logger", Logger)
    if trainer.is_global_zero:
        with opening(run.folder):
            _open_folder(run, trainer, layout, first, f"{trainer.precision} ({reason})")
    with plain_command_line():
        for logger in trainer.loggers:
            logger.log_hyperparams(redact(run.config))
    data = run.config["data"]
    loader = train_loader(run.corpus, batches, data["num_workers"], data.get("worker_timeout", 0))
    with contextlib.closing(stop):
        try:
            trainer.fit(module, loader)
        except BaseException as error:
            known = explain(error, run.folder, loader, pulse, module.progress.step + 1)
            pulse.leave(_reason(known))
            with contextlib.suppress(OSError):  # of a full disk, too
                _close_folder(run, trainer, module, error=_reason(known))
            if known is error:
                raise
            raise known from error
        finally:
            loader.end()
            end_ranks(trainer)
        with deaf(), closing(run.folder):
            return _close_folder(run, trainer, module)


def _reason(error: BaseException) -> str:
    # Lightning leaves the process when it is interrupted
    interrupted = isinstance(error, (KeyboardInterrupt, SystemExit))
    return "interrupted" if interrupted else redact_text(str(error)) or type(error).__name__


def _build_trainer(run: Run, stop: GracefulStop) -> tuple[pl.Trainer, str, Layout]:
    """Lightning's trainer, why it has its precision, and this rank's place."""
    launcher = run.launcher
    wanted = launcher.accelerator
    gpu = torch.cuda.is_available() and wanted in ("auto", "gpu", "cuda")
    mps = torch.backends.mps.is_available() and wanted in ("auto", "gpu", "mps") and not gpu
    device = torch.device("cuda" if gpu else "mps" if mps else "cpu")
    precision, reason = choose_precision(run.trainer.precision, device, run.model.config["dim"])
    draws = run.resume.get("draws", []) if run.resume else []
    callbacks = [Draws(draws), stop, *_instances(run.config, "callbacks", pl.Callback)]
    callbacks.sort(key=lambda callback: isinstance(callback, Checkpoint))  # it saves what the others did
    for callback in callbacks:
        if isinstance(callback, Checkpoint):
            callback.about = {
                "identity": identity(run),
                "tokenizer": {
                    "fingerprint": run.corpus.tokenizer.fingerprint,
                    "vocab_size": run.corpus.tokenizer.vocab_size,
                },
                "config": redact(run.config),
                "versions": versions(),
            }
    try:
        trainer = pl.Trainer(
            accelerator=launcher.accelerator,
            devices=launcher.devices,
            num_nodes=launcher.num_nodes,
            strategy=launcher.build_strategy(),
            precision=precision,
            callbacks=callbacks,
            default_root_dir=run.folder,
            accumulate_grad_batches=run.trainer.accumulate,
            max_epochs=-1,
            limit_val_batches=0,
            logger=False,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (MisconfigurationException, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"launcher: {str(error).splitlines()[0]}, got {vars(launcher)}") from error
    # its own would have the ranks meet in a handler, and go back to those before it ahead of the summary
    trainer._signal_connector.register_signal_handlers = lambda: None
    split = {"context": launcher.context_parallel, "tensor": launcher.tensor_parallel}
    layout = Layout(trainer.world_size, trainer.global_rank, **split, sharded=launcher.sharded)
    return trainer, reason, layout


def _instances(config: Mapping[str, Any], group: str, kind: type) -> list[Any]:
    """The objects that a config group describes; an entry set to null is left out."""
    allow = allowed_targets(config.get("allow_targets", ()))
    nodes = config[group].items()
    return [build(node, kind, f"{group}.{name}", allow) for name, node in nodes if node is not None]


def _open_folder(run: Run, trainer: pl.Trainer, layout: Layout, first: int, precision: str) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(redact(run.config))))
    write_json(
        run.folder / "environment.json",
        environment(
            run.model,
            trainer.strategy.root_device,
            precision=precision,
            ranks=trainer.world_size,
            layout=layout.facts(),
            data_fingerprint=run.corpus.fingerprint,
            tokenizer_fingerprint=run.corpus.tokenizer.fingerprint,
        ),
    )
    run.corpus.tokenizer.save(run.folder / "tokenizer")
    forget_after(run.folder, first)


def _close_folder(run: Run, trainer: pl.Trainer, module: LanguageModule, **more: Any) -> dict[str, Any]:
    """Write the summary, whatever the end was."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()
    last = module.metrics
    summary = {
        "variant": run.model.config["layout"],
        "seed": run.plan.seed,
        "status": module.status,
        "stopped_by": signal.Signals(module.stop_signal).name if module.status == "stopped" else None,
        "params": run.cost.params,
        "tokens": module.progress.tokens,
        "steps": module.progress.step,
        "train_loss": last.get("train_loss"),
        "val_loss": last.get("val_loss"),
        "val_bpb": last.get("val_bpb"),
        "val_accuracy": last.get("val_accuracy"),
        "val_loss_by_position": last.get("val_loss_by_position"),
        "tokens_per_second": (module.meter and module.meter.tokens_per_second())
        or last.get("tokens_per_second"),
        "seconds": module.progress.seconds,
        "mfu": last.get("mfu"),
        "peak_memory_bytes": peak_memory(trainer.strategy.root_device),
        "objective": module.objective.name,
        "val_measures": module.objective.measures,
        "train_flops_per_token": module.objective.train_flops(run.model, run.plan.seq_len)[0],
        "cache_bytes_per_token": run.cost.cache_bytes_per_token,
        "state_bytes": run.cost.state_bytes,
        "seq_len": run.plan.seq_len,
        "impl": sorted({mixer.impl for mixer in run.model.mixers}),
        "versions": versions(),
        **more,
    }
    if trainer.is_global_zero:
        if module.status == "completed":
            summary |= decode_summary(trainer, run.model, run.plan.seq_len, run.trainer.decode_tokens)
        write_json(run.folder / "summary.json", summary)
    return summary


def quieten() -> None:
    """Keep the libraries' own advice out of the output."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    # nothing here writes into what a model returns
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    os.environ.setdefault("WANDB_SILENT", "true")


def sample(run: Run) -> str:
    """A few lines written by the trained model."""
    tokenizer, settings = run.corpus.tokenizer, run.trainer
    prompt = tokenizer.encode(settings.sample_prompt) or [tokenizer.eos_id]
    new = generate(
        run.model.eval(), [prompt], settings.sample_tokens, temperature=0.8, top_k=50, seed=run.plan.seed
    )
    return tokenizer.decode(prompt + new[0])

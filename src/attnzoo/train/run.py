"""One training run: everything is checked first, then the run folder is opened and the model trained."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.utils import instantiate
from lightning.fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from torch import nn

from attnzoo import Collector, Context, create_model
from attnzoo.cost import Cost
from attnzoo.data import Corpus, build_data
from attnzoo.model import generate
from attnzoo.train.batches import CounterBatches, train_loader
from attnzoo.train.callbacks import Checkpoint, GracefulStop
from attnzoo.train.checkpoint import (
    check_vocabulary,
    differences,
    find_checkpoint,
    load_weights,
    read_checkpoint,
)
from attnzoo.train.evaluate import Validation
from attnzoo.train.folder import check_folder, environment, versions, write_json
from attnzoo.train.hardware import choose_precision, peak_memory
from attnzoo.train.logger import forget_after
from attnzoo.train.module import LanguageModule, Plan, seed_draws
from attnzoo.train.settings import OptimSettings, TrainerSettings, read_settings

# options that choose how a model computes, not what
FREE_ON_RESUME = ("impl",)


@dataclass(frozen=True)
class Run:
    """A checked run: nothing of it is on disk yet."""

    config: dict[str, Any]
    folder: Path
    trainer: TrainerSettings
    optim: OptimSettings
    corpus: Corpus
    model: nn.Module
    cost: Cost
    plan: Plan
    resume: dict[str, Any] | None


def prepare(config: DictConfig) -> Run:
    """Check a configuration and build its data and model, writing nothing.

    Raises:
        ValueError: the first mistake, in one line that names the field.
    """
    plain = OmegaConf.to_container(config, resolve=True)
    trainer = read_settings("trainer", TrainerSettings, plain["trainer"])
    optim = read_settings("optim", OptimSettings, plain["optim"] | {"betas": tuple(plain["optim"]["betas"])})
    seed, seq_len = plain["seed"], plain["data"]["seq_len"]
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed: must be a whole number of at least 0, got {seed!r}")
    folder, field, start = Path(plain["run_dir"]), *_starting_point(plain)
    if pl.utilities.rank_zero_only.rank == 0:
        check_folder(folder, find_checkpoint(start) if field == "ckpt_path" else None)
    checkpoint = read_checkpoint(start, field) if start else None
    # options are checked on a model without memory, before the data is read
    _check_model(plain, trainer)
    corpus = build_data(plain["data"], plain["tokenizer"], seed)
    seed_draws(f"{seed}/weights")
    model = create_model(**model_options(plain, corpus.tokenizer.vocab_size))
    cost = model.cost(seq_len)
    batch_size = plain["data"]["batch_size"]
    plan = Plan(seed, batch_size, seq_len, trainer.total_steps(batch_size * seq_len), 3 * cost.executed_flops)
    if checkpoint:
        check_vocabulary(corpus.tokenizer, checkpoint, field)
        load_weights(model, checkpoint, field)
    resume = checkpoint if field == "ckpt_path" else None
    run = Run(plain, folder, trainer, optim, corpus, model, cost, plan, resume)
    if resume:
        _check_resume(run)
    return run


def model_options(config: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Arguments of `create_model`: the `model` group, and the options of the `attention` group."""
    attention, model = dict(config["attention"]), dict(config["model"])
    name = attention.pop("name")
    layout = model.pop("layout") or name
    return {"layout": layout, "vocab_size": vocab_size, **model, **attention}


def _check_model(config: Mapping[str, Any], trainer: TrainerSettings) -> None:
    """One forward pass of shapes: layers refuse a length, and name their auxiliary losses, themselves."""
    collector = Collector()
    with torch.device("meta"):
        model = create_model(**model_options(config, vocab_size=256))
        tokens = torch.zeros(1, config["data"]["seq_len"], dtype=torch.long)
    try:
        model(tokens, Context(collector=collector))
    except (RuntimeError, NotImplementedError):
        return  # a layer that looks at its data needs some; it speaks up in the first step
    try:
        collector.total(trainer.aux_weights)
    except ValueError as error:
        raise ValueError(f"trainer.aux_weights: {error}") from None


def _starting_point(config: Mapping[str, Any]) -> tuple[str, str | None]:
    if config["ckpt_path"] and config["init_from"]:
        raise ValueError(
            "init_from: excludes ckpt_path, which goes on with a run instead of starting a new one; "
            f"got {config['init_from']!r} and {config['ckpt_path']!r}"
        )
    field = "ckpt_path" if config["ckpt_path"] else "init_from"
    return field, config[field]


def _check_resume(run: Run) -> None:
    """A resumed run must see the same samples with the same model."""
    there = run.resume["model_config"] | run.resume["identity"]
    here = dict(run.model.config) | identity(run)
    changed = differences(
        *({k: v for k, v in side.items() if k not in FREE_ON_RESUME} for side in (there, here))
    )
    if changed:
        raise ValueError(f"ckpt_path: a resumed run must not change: {'; '.join(changed)}; or use init_from")
    done, total = run.resume["progress"]["step"], run.plan.total_steps
    if total is not None and done >= total:
        raise ValueError(f"trainer.max_steps: must be over the {done} steps of the checkpoint, got {total}")


def identity(run: Run) -> dict[str, Any]:
    """What decides which samples a step sees."""
    return {
        "data": run.corpus.fingerprint,
        "seed": run.plan.seed,
        "data.batch_size": run.plan.batch_size,
        "data.seq_len": run.plan.seq_len,
    }


def execute(run: Run) -> dict[str, Any]:
    """Open the run folder, train, and return the summary.

    Raises:
        RunFailed: the loss is not finite, or no checkpoint can be written. The summary then says "failed".
        ValueError: the hardware or a logger asked for is not there; nothing is written.
    """
    quieten()
    trainer, reason = _build_trainer(run)
    ranks = {"rank": trainer.global_rank, "world": trainer.world_size}
    first = run.resume["progress"]["step"] if run.resume else 0
    batches = CounterBatches(
        first, run.plan.total_steps, run.plan.batch_size, run.trainer.accumulate, **ranks
    )
    validation = Validation(run.corpus.validation(), batches.size, **ranks)
    module = LanguageModule(run.model, run.trainer, run.optim, run.plan, validation, run.resume)
    trainer.loggers = _instances(run.config["logger"])
    if trainer.is_global_zero:
        _open_folder(run, trainer, first, f"{trainer.precision} ({reason})")
    for logger in trainer.loggers:
        logger.log_hyperparams(run.config)
    try:
        trainer.fit(module, train_loader(run.corpus, batches, run.config["data"]["num_workers"]))
    except BaseException as error:
        with suppress(OSError):  # of a full disk, too
            _close_folder(run, trainer, module, error=str(error) or type(error).__name__)
        raise
    return _close_folder(run, trainer, module)


def _build_trainer(run: Run) -> tuple[pl.Trainer, str]:
    """Lightning's trainer, and why it has its precision."""
    launcher = run.config["launcher"]
    wanted = launcher["accelerator"]
    gpu = torch.cuda.is_available() and wanted in ("auto", "gpu", "cuda")
    mps = torch.backends.mps.is_available() and wanted in ("auto", "gpu", "mps") and not gpu
    precision, reason = choose_precision(
        run.trainer.precision, torch.device("cuda" if gpu else "mps" if mps else "cpu")
    )
    callbacks = [GracefulStop(), *_instances(run.config["callbacks"])]
    for callback in callbacks:
        if isinstance(callback, Checkpoint):
            callback.about = {
                "identity": identity(run),
                "tokenizer": {
                    "fingerprint": run.corpus.tokenizer.fingerprint,
                    "vocab_size": run.corpus.tokenizer.vocab_size,
                },
            }
    try:
        trainer = pl.Trainer(
            **launcher,
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
        raise ValueError(f"launcher: {str(error).splitlines()[0]}, got {launcher}") from error
    return trainer, reason


def _instances(group: Mapping[str, Any]) -> list[Any]:
    """The objects that a config group describes; an entry set to null is left out."""
    return [instantiate(node) for node in group.values() if node is not None]


def _open_folder(run: Run, trainer: pl.Trainer, first: int, precision: str) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(run.config)))
    write_json(
        run.folder / "environment.json",
        environment(
            run.model,
            trainer.strategy.root_device,
            precision=precision,
            ranks=trainer.world_size,
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
        "params": run.cost.params,
        "tokens": module.progress.tokens,
        "steps": module.progress.step,
        "train_loss": last.get("train_loss"),
        "val_loss": last.get("val_loss"),
        "val_bpb": last.get("val_bpb"),
        "tokens_per_second": module.meter.tokens_per_second() if module.meter else None,
        "seconds": module.progress.seconds,
        "mfu": last.get("mfu"),
        "peak_memory_bytes": peak_memory(trainer.strategy.root_device),
        "train_flops_per_token": run.cost.train_flops,
        "cache_bytes_per_token": run.cost.cache_bytes_per_token,
        "state_bytes": run.cost.state_bytes,
        "seq_len": run.plan.seq_len,
        "impl": sorted({mixer.impl for mixer in run.model.mixers}),
        "versions": versions(),
        **more,
    }
    if trainer.is_global_zero:
        write_json(run.folder / "summary.json", summary)
    return summary


def quieten() -> None:
    """Keep the libraries' own advice out of the output."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    os.environ.setdefault("WANDB_SILENT", "true")


def sample(run: Run) -> str:
    """A few lines written by the trained model."""
    tokenizer, settings = run.corpus.tokenizer, run.trainer
    prompt = tokenizer.encode(settings.sample_prompt) or [tokenizer.eos_id]
    new = generate(
        run.model.eval(), [prompt], settings.sample_tokens, temperature=0.8, top_k=50, seed=run.plan.seed
    )
    return tokenizer.decode(prompt + new[0])

"""Before a run: its configuration is checked, its data and model are built, and nothing is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from attnzoo import create_model
from attnzoo.cluster.ranks import launcher_here
from attnzoo.cost import Cost
from attnzoo.data import Corpus, build_data
from attnzoo.data.config import DataConfig, parse_data
from attnzoo.parallel.context import check_spans
from attnzoo.parallel.layout import LauncherSettings, Layout
from attnzoo.parallel.plan import check_split
from attnzoo.train.batches import CounterBatches
from attnzoo.train.checkpoint import check_vocabulary, find_checkpoint, load_weights, read_checkpoint
from attnzoo.train.draws import seed_draws
from attnzoo.train.folder import check_folder
from attnzoo.train.objective import objective_of
from attnzoo.train.rehearsal import check_forward, kinds
from attnzoo.train.resume import check_resume, check_same, sample_offset, to_close
from attnzoo.train.settings import OptimSettings, Plan, TrainerSettings, read_settings


@dataclass(frozen=True)
class Run:
    """A checked run: nothing of it is on disk yet."""

    config: dict[str, Any]
    folder: Path
    trainer: TrainerSettings
    optim: OptimSettings
    launcher: LauncherSettings
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
    plain["launcher"] = launcher_here(plain["launcher"])
    trainer, optim, data = read_groups(plain)
    launcher = read_launcher(plain)
    check_layout(launcher, optim.name, data.batch_size, trainer.accumulate)
    seed, field, start = plain["seed"], *_starting_point(plain)
    steps = trainer.total_steps(data.batch_size * data.seq_len)
    checkpoint = read_checkpoint(start, field) if start else None
    resume = checkpoint if field == "ckpt_path" else None
    if resume and (home := to_close(start, resume, steps, trainer.max_seconds)):
        # what is missing belongs to that run, not to another folder
        plain["run_dir"] = str(home)
        plain["logger"] = OmegaConf.to_container(
            OmegaConf.merge(config, {"run_dir": str(home)}), resolve=True
        )["logger"]
    folder = Path(plain["run_dir"])
    if pl.utilities.rank_zero_only.rank == 0:
        check_folder(folder, find_checkpoint(start) if field == "ckpt_path" else None)
    plain = _with_architecture(plain, checkpoint)
    # options are checked before the data is read
    _check_model(plain, trainer)
    corpus = build_data(plain["data"], plain["tokenizer"], seed)
    seed_draws(f"{seed}/weights")
    model = create_model(**model_options(plain, corpus.tokenizer.vocab_size))
    cost = model.cost(data.seq_len)
    train_flops = objective_of(model, corpus.labelled).train_flops(model, data.seq_len)[1]
    plan = Plan(
        seed, data.batch_size, data.seq_len, steps, train_flops, sample_offset(data.batch_size, resume)
    )
    if getattr(data, "val_seq_len", None):
        with torch.no_grad():  # layers that look at their data refuse a length now, not when training is over
            model(torch.zeros(1, data.val_seq_len, dtype=torch.long))
    run = Run(plain, folder, trainer, optim, launcher, corpus, model, cost, plan, resume)
    if resume:
        check_same(run)
    elif checkpoint:
        check_vocabulary(corpus.tokenizer, checkpoint, field)
    if checkpoint:
        load_weights(model, checkpoint, field)
        del checkpoint["model"]  # the run is long
    if resume:
        check_resume(run)
    return run


def read_groups(config: Mapping[str, Any]) -> tuple[TrainerSettings, OptimSettings, DataConfig]:
    """The `trainer`, `optim` and `data` groups and the seed of a resolved configuration, checked."""
    trainer = read_settings("trainer", TrainerSettings, config["trainer"])
    optim = read_settings(
        "optim", OptimSettings, config["optim"] | {"betas": tuple(config["optim"]["betas"])}
    )
    data, seed = parse_data(config["data"]), config["seed"]
    if not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed: must be a whole number of at least 0, got {seed!r}")
    return trainer, optim, data


def read_launcher(config: Mapping[str, Any]) -> LauncherSettings:
    """What the `launcher` group says of the ranks, checked; the rest is for a scheduler."""
    ours = {key: value for key, value in config["launcher"].items() if key != "slurm"}
    return read_settings("launcher", LauncherSettings, ours)


def check_layout(launcher: LauncherSettings, optimiser: str, batch_size: int, accumulate: int) -> None:
    """Raise a ValueError where ranks cannot share a run.

    Args:
        batch_size: samples of a step. accumulate: micro-batches of each rank.
    """
    if optimiser == "muon" and launcher.tensor_parallel > 1:
        raise ValueError(
            "optim.name: muon needs whole matrices, of which ranks that share heads have parts, got "
            f"launcher.tensor_parallel={launcher.tensor_parallel}; use adamw, or launcher.strategy=fsdp alone"
        )
    layout = Layout(launcher.world, 0, launcher.context_parallel, launcher.tensor_parallel)
    CounterBatches(0, 1, batch_size, accumulate, 0, layout.data)


def check_architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """Raise a ValueError for a run that could not begin, without reading data.

    Returns:
        The configuration, as `with_start`.
    """
    trainer, optim, data = read_groups(config)
    check_layout(read_launcher(config), optim.name, data.batch_size, trainer.accumulate)
    config = with_start(config)
    _check_model(config, trainer)
    return config


def with_start(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the architecture of what it starts from, which is read and checked."""
    field, start = _starting_point(config)
    return _with_architecture(dict(config), read_checkpoint(start, field) if start else None)


def model_options(config: Mapping[str, Any], vocab_size: int) -> dict[str, Any]:
    """Arguments of `create_model`: the `model` group, and the options of the `attention` group."""
    attention, model = dict(config["attention"]), dict(config["model"])
    name = attention.pop("name")
    layout = model.pop("layout") or name
    return {"layout": layout, "vocab_size": vocab_size, **model, **attention}


def _check_model(config: Mapping[str, Any], trainer: TrainerSettings) -> None:
    """Layers refuse what they cannot do, and name their auxiliary losses, themselves."""
    data, launcher = config["data"], read_launcher(config)
    lengths = {data["seq_len"], data.get("val_seq_len") or data["seq_len"]}
    with FakeTensorMode() as mode:
        model = create_model(**model_options(config, vocab_size=256))
        objective_of(model)
        for length in lengths:
            check_spans(model, launcher.context_parallel, length)
        check_split(model, launcher.tensor_parallel)
    alike = kinds(model, max(lengths))
    with mode:
        rows = max(1, data["batch_size"] // trainer.accumulate)  # of a micro-batch, on a single rank
        check_forward(model, rows, max(lengths), alike, trainer.aux_weights)


def _with_architecture(config: dict[str, Any], checkpoint: Mapping[str, Any] | None) -> dict[str, Any]:
    """The configuration with the checkpoint's architecture, where ``model.layout`` is "init_from"."""
    if config["model"]["layout"] != "init_from":
        return config
    if checkpoint is None or not config["init_from"]:
        raise ValueError("model.layout: 'init_from' takes the architecture of init_from, got none; set it")
    made = {k: v for k, v in checkpoint["model_config"].items() if k != "vocab_size"}
    names = {name for name in made if name in config["model"]}
    attention = {"name": "converted", **{k: v for k, v in made.items() if k not in names}}
    return config | {"model": {k: made[k] for k in names}, "attention": attention}


def _starting_point(config: Mapping[str, Any]) -> tuple[str, str | None]:
    if config["ckpt_path"] and config["init_from"]:
        raise ValueError(
            "init_from: excludes ckpt_path, which goes on with a run instead of starting a new one; "
            f"got {config['init_from']!r} and {config['ckpt_path']!r}"
        )
    if not isinstance(config.get("ckpt_force", False), bool):
        raise ValueError(f"ckpt_force: must be true or false, got {config['ckpt_force']!r}")
    field = "ckpt_path" if config["ckpt_path"] else "init_from"
    return field, config[field]

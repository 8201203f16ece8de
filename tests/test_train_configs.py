"""Every file of the Hydra tree composes, and says what the code reads."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import hydra
import pytest
import torch
from lightning.pytorch.loggers import wandb as lightning_wandb
from lightning_utilities.core.imports import RequirementCache
from omegaconf import DictConfig, OmegaConf

import attnzoo
from attnzoo.cli import report
from attnzoo.cli.train import config_folder
from attnzoo.parallel.layout import LauncherSettings
from attnzoo.train.hardware import choose_precision, cpu_has
from attnzoo.train.prepare import model_options, prepare
from attnzoo.train.run import execute
from attnzoo.train.settings import DEFAULT_STEPS, OptimSettings, TrainerSettings, read_settings
from runs import metrics, train, write_text

OURS = ("model", "optim", "trainer", "callbacks", "logger", "launcher", "experiment", "debug")
# vocabulary, and the range of parameters in millions
SIZES = {
    "debug": (257, 0.15, 0.3),
    "nano": (257, 1, 3),
    "small": (257, 10, 20),
    "125m": (50257, 115, 130),
    "350m": (50257, 330, 370),
    "1b": (50257, 1000, 1200),
    "7b": (50257, 6000, 7000),
}


def tree(*overrides: str) -> DictConfig:
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        return hydra.compose("config", ["run_dir=run", *overrides])


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))


@pytest.mark.parametrize("choice", [f"{group}={name}" for group in OURS for name in choices(group)])
def test_every_choice_composes(choice: str) -> None:
    config = OmegaConf.to_container(tree(choice), resolve=True)
    read_settings("trainer", TrainerSettings, config["trainer"])
    read_settings("optim", OptimSettings, config["optim"])
    with torch.device("meta"):
        attnzoo.create_model(**model_options(config, vocab_size=257))


def test_the_yaml_names_every_setting() -> None:
    config = tree("optim=muon")
    assert set(config.trainer) == {field.name for field in dataclasses.fields(TrainerSettings)}
    assert set(config.optim) == {field.name for field in dataclasses.fields(OptimSettings)}
    assert set(config.launcher) == {field.name for field in dataclasses.fields(LauncherSettings)}
    assert TrainerSettings().total_steps(2048) == DEFAULT_STEPS


def test_the_defaults_are_those_of_the_readme() -> None:
    config = tree()
    assert (config.attention.name, config.data.name, config.tokenizer.name) == ("mla", "stdlib", "bytes")
    assert (config.optim.name, config.trainer.max_steps, config.seed) == ("adamw", None, 1)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_what_they_say(size: str) -> None:
    assert set(choices("model")) == set(SIZES)
    vocabulary, low, high = SIZES[size]
    with torch.device("meta"):
        model = attnzoo.create_model(
            **model_options(OmegaConf.to_container(tree(f"model={size}")), vocabulary)
        )
    assert low <= model.cost(256).params / 1e6 <= high


@pytest.mark.parametrize("size", ["debug", "nano"])
def test_small_sizes_train_two_steps(tmp_path: Path, size: str) -> None:
    full = tree(f"model={size}").model
    shape = [f"model.{key}={full[key]}" for key in ("dim", "depth", "num_heads")]
    _, summary = train(tmp_path, *shape, "attention=mla", "trainer.max_steps=2", "data.batch_size=1")
    assert summary["steps"] == 2 and summary["params"] > 150_000


def test_debug_fast_trains(tmp_path: Path) -> None:
    data = (
        f"data.path={write_text(tmp_path)}",
        "data.val_fraction=0.3",
        f"data.cache_dir={tmp_path / 'cache'}",
    )
    config = tree("debug=fast", "data=text", *data, f"run_dir={tmp_path / 'run'}")
    assert execute(prepare(config))["steps"] == 2


def test_wandb_stays_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    train(tmp_path, "logger=wandb", "trainer.max_steps=2")
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(metrics(tmp_path / "run")) == 2


def test_wandb_that_is_missing_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(lightning_wandb, "_WANDB_AVAILABLE", RequirementCache("wandb>=99"))
    with pytest.raises(ModuleNotFoundError, match="wandb>=99") as caught:
        train(tmp_path, "logger=wandb")
    report(caught.value)
    err = capsys.readouterr().err
    assert err.startswith("error: a package is missing: ") and err.count("\n") == 1 and "attnzoo[all]" in err
    assert not (tmp_path / "run").exists()


def test_precision_follows_the_hardware(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    native = cpu_has("amx_bf16") or cpu_has("avx512_bf16")
    assert choose_precision("auto", cpu)[0] == ("bf16-mixed" if native else "32-true")
    for flags, expected in (
        ({"amx_bf16"}, "bf16-mixed"),
        ({"avx512_bf16"}, "bf16-mixed"),
        (set(), "32-true"),
    ):
        monkeypatch.setattr("attnzoo.train.hardware.cpu_has", lambda flag, flags=flags: flag in flags)
        assert choose_precision("auto", cpu)[0] == expected
    monkeypatch.setattr("attnzoo.train.hardware.cpu_has", lambda flag: True)
    assert choose_precision("auto", cpu, dim=64)[0] == "32-true"  # the casts would cost more
    assert choose_precision("bf16", cpu, dim=64)[0] == "bf16-mixed"
    assert choose_precision("fp32", cpu) == ("32-true", "requested")
    train(tmp_path, "trainer.precision=bf16", "trainer.max_steps=1")
    facts = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert facts["precision"] == "bf16-mixed (requested)"

"""Training on synthetic tasks: from the command line to the summary, and what the loss is made of."""

from __future__ import annotations

import json
import math
from pathlib import Path

import hydra
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import attnzoo
from attnzoo.cli import main
from attnzoo.cli.tree import config_folder
from attnzoo.data import IGNORED, build_data
from attnzoo.data.synthetic import TASKS
from attnzoo.train.batches import collate
from attnzoo.train.objective import NextToken
from attnzoo.train.prepare import prepare
from attnzoo.train.run import execute
from runs import metrics

SMALL = (
    "attention=mha", "model.dim=16", "model.depth=1", "model.num_heads=2", "trainer.precision=fp32",
    "trainer.max_steps=2", "trainer.log_every=1", "data.batch_size=4", "data.val_samples=6",
)  # fmt: skip


def compose(folder: Path, task: str, *more: str):
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        return hydra.compose("config", [f"data=synthetic/{task}", f"run_dir={folder}", *SMALL, *more])


@pytest.mark.parametrize("task", sorted(TASKS))
def test_every_task_trains_loads_and_generates(tmp_path: Path, task: str) -> None:
    run = prepare(compose(tmp_path / "run", task))
    summary = execute(run)
    model, tokenizer = attnzoo.load(tmp_path / "run")
    right = number = nll = 0.0
    for sample in run.corpus.validation():
        logits, labels = model(sample["tokens"][None])[0], sample["labels"]
        asked = labels != IGNORED
        right += (logits[asked].argmax(-1) == labels[asked]).sum().item()
        nll += cross_entropy(logits[asked].double(), labels[asked], reduction="sum").item()
        number += asked.sum().item()
    assert summary["val_accuracy"] == pytest.approx(right / number)
    assert summary["val_loss"] == pytest.approx(nll / number, rel=1e-5)
    assert summary["val_bpb"] is None and summary["val_loss_by_position"] is None
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["val_accuracy"] == right / number
    assert [line.get("val_accuracy") for line in metrics(tmp_path / "run")] == [None, summary["val_accuracy"]]
    prompt = tokenizer.decode(run.corpus.sample(0)["tokens"].tolist())
    new = attnzoo.model.generate(model, [tokenizer.encode(prompt)], 3)
    assert len(new[0]) == 3 and tokenizer.encode(prompt) == run.corpus.sample(0)["tokens"].tolist()


def test_the_command_line_trains_and_generates(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "data=synthetic/mqar", "data.pairs=3", "hydra.run.dir=run", *SMALL]) == 0
    printed = capsys.readouterr().out
    assert "% correct (loss" in printed and "bits" not in printed and "sample" not in printed
    assert main(["generate", "run", "--prompt", "1 17 2 18 1", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith("1 17 2 18 1 ")
    assert main(["generate", "run", "--prompt", "def x"]) == 2
    assert "symbols are numbers from 0 to 32 with blanks between, got 'def'" in capsys.readouterr().err


@pytest.mark.parametrize("misspelt", ["synthetic/mqr", "sinthetic/mqar"])
def test_a_misspelt_task_is_told_the_right_one(capsys, misspelt: str) -> None:
    assert main(["train", f"data={misspelt}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: data: no choice '{misspelt}'; did you mean synthetic/mqar")
    assert error.count("\n") == 1


def test_the_loss_is_of_the_labels_and_of_nothing_else() -> None:
    corpus = build_data({"name": "synthetic/mqar", "pairs": 3, "seq_len": 16}, {"name": "bytes"}, seed=1)
    model = attnzoo.create_model("mha", vocab_size=corpus.tokenizer.vocab_size, dim=8, depth=1, num_heads=2)
    sample = corpus.sample(0)

    def loss(labels: torch.Tensor) -> tuple[float, int]:
        nll, count = NextToken(model).training(model, collate([sample | {"labels": labels}]))
        return nll.item(), int(count)

    labels = sample["labels"]
    asked = (labels != IGNORED).nonzero().flatten().tolist()
    logits = model(sample["tokens"][None])[0]
    by_hand = sum(cross_entropy(logits[i], labels[i]).item() for i in asked)
    nll, count = loss(labels)
    assert (nll, count) == (pytest.approx(by_hand, rel=1e-5), 3)
    for i in range(16):
        changed = labels.clone()
        changed[i] = 20 if labels[i] != 20 else 21
        assert loss(changed)[0] != nll
        changed[i] = IGNORED
        assert loss(changed)[1] == (2 if i in asked else 3)


def test_samples_do_not_depend_on_workers() -> None:
    corpus = build_data({"name": "synthetic/needle"}, {"name": "bytes"}, seed=1)
    loader = DataLoader(corpus.train_dataset(5, 17), batch_size=4, collate_fn=collate, num_workers=2)
    found = torch.cat([batch["tokens"] for batch in loader])
    assert torch.equal(found, torch.stack([corpus.sample(n)["tokens"] for n in range(5, 17)]))


def test_a_resumed_run_goes_on_with_the_next_samples(tmp_path: Path) -> None:
    whole = execute(
        prepare(compose(tmp_path / "whole", "s3", "trainer.max_steps=4", "optim.schedule=constant"))
    )
    execute(prepare(compose(tmp_path / "half", "s3", "optim.schedule=constant")))
    again = prepare(
        compose(
            tmp_path / "rest", "s3", "trainer.max_steps=4", "optim.schedule=constant",
            f"ckpt_path={tmp_path / 'half'}",
        )
    )  # fmt: skip
    assert execute(again)["val_loss"] == pytest.approx(whole["val_loss"], rel=1e-6)
    with pytest.raises(ValueError, match="ckpt_path: a resumed run must not change: data is"):
        prepare(compose(tmp_path / "no", "s3", "data.moves=pair", f"ckpt_path={tmp_path / 'half'}"))


def test_layers_that_fill_in_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data: block_diffusion layers learn to fill in tokens") as caught:
        prepare(compose(tmp_path / "run", "mqar", "attention=efficient_dlm"))
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("variant", ["spectformer", "linformer"])
def test_a_model_without_room_for_validation_is_refused_at_once(tmp_path: Path, variant: str) -> None:
    options = [f"attention={variant}", "model.max_seq_len=32", "data.seq_len=32", "data.val_seq_len=64"]
    with pytest.raises(ValueError, match="has 64 tokens, there is room for 32"):
        prepare(compose(tmp_path / "run", "parity", *options))


def test_the_profile_names_every_task() -> None:
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        config = hydra.compose("config", ["experiment=profile"], return_hydra_config=True)
    override = OverridesParser.create().parse_override(f"data={config.hydra.sweeper.params.data}")
    names = list(override.sweep_string_iterator())
    assert sorted(names) == sorted(f"synthetic/{name}" for name in TASKS)
    assert config.data.name == "synthetic/mqar"  # of a single run


def test_multirun_trains_a_model_per_task(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    tasks = "hydra.sweeper.params.data='synthetic/parity, synthetic/s3'"
    job = ["train", "-m", "experiment=profile", "hydra.sweep.dir=out", tasks, *SMALL]
    assert main(job) == 0
    summaries = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("out/*/summary.json"))]
    assert len(summaries) == 2 and all(math.isfinite(s["val_accuracy"]) for s in summaries)

"""A resumed run goes on where it stopped: same samples, same draws, same weights."""

from __future__ import annotations

import random
from pathlib import Path
from typing import ClassVar

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch.nn.functional import dropout

from attnzoo.data import TextCorpus
from attnzoo.train.batches import CounterBatches
from attnzoo.train.checkpoint import read_checkpoint
from attnzoo.train.logger import FileLogger, forget_after
from runs import metrics, train

ALLOWED = f"allow_targets=[{__name__}]"  # to be named by a configuration
HALF = ("callbacks.checkpoint.every=2", "callbacks.checkpoint.keep=9")
EXACT = ("step", "tokens", "train_loss", "lr", "grad_norm")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counters of the training samples read, in their order."""
    counters: list[int] = []
    sample = TextCorpus.sample

    def watched(self: TextCorpus, n: int) -> dict[str, torch.Tensor]:
        counters.append(n)
        return sample(self, n)

    monkeypatch.setattr(TextCorpus, "sample", watched)
    return counters


class Noise(Callback):
    """Makes the model draw random numbers."""

    def on_fit_start(self, trainer: object, module: pl.LightningModule) -> None:
        module.model.blocks[0].mlp.register_forward_hook(
            lambda mlp, args, y: dropout(y, 0.2, training=mlp.training)
        )


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("optim=muon", "attention=moh", "trainer.accumulate=2"),
        ("trainer.precision=bf16", "data.isolate=true"),
        (f"+callbacks.noise._target_={__name__}.Noise", ALLOWED, "trainer.val_every=1"),
    ],
    ids=str,
)
def test_resuming_changes_nothing(tmp_path: Path, seen: list[int], options: tuple[str, ...]) -> None:
    straight, _ = train(tmp_path, *options, *HALF, name="straight")
    assert seen == list(range(16))
    seen.clear()
    half = tmp_path / "straight" / "checkpoints" / "step-00000002.pt"
    resumed, summary = train(tmp_path, *options, f"ckpt_path={half}", name="resumed")
    assert seen == list(range(8, 16))
    for (name, p), q in zip(straight.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    before, after = metrics(tmp_path / "straight")[2:], metrics(tmp_path / "resumed")
    assert [[entry[key] for key in EXACT] for entry in before] == [[e[key] for key in EXACT] for e in after]
    assert summary["steps"] == 4 and summary["tokens"] == 4 * 4 * 32
    assert summary["seconds"] > read_checkpoint(half)["progress"]["seconds"]


def test_a_folder_goes_on_in_place(tmp_path: Path, seen: list[int]) -> None:
    train(tmp_path, "trainer.max_steps=2")
    with pytest.raises(ValueError, match=r"trainer\.max_steps: the checkpoint is at 2, got 2; raise it"):
        train(tmp_path, "trainer.max_steps=2", f"ckpt_path={tmp_path / 'run'}")
    seen.clear()
    train(tmp_path, f"ckpt_path={tmp_path / 'run'}")
    assert seen == list(range(8, 16))
    assert [entry["step"] for entry in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 5


def test_reports_after_the_checkpoint_are_written_again(tmp_path: Path) -> None:
    logger = FileLogger(str(tmp_path))
    for step in (1, 2, 3):
        logger.log_metrics({"step": step, "train_loss": 1.0 / step, "aux/balance": 2.0})
    forget_after(tmp_path, 2)
    assert [entry["step"] for entry in metrics(tmp_path)] == [1, 2]
    assert metrics(tmp_path)[1] == {"step": 2, "train_loss": 0.5, "aux/balance": 2.0}
    assert [line.split(",")[0] for line in (tmp_path / "metrics.csv").read_text().splitlines()] == [
        "step",
        "1",
        "2",
    ]


def test_an_older_checkpoint_needs_a_folder_of_its_own(tmp_path: Path) -> None:
    train(tmp_path, *HALF)
    older = tmp_path / "run" / "checkpoints" / "step-00000002.pt"
    with pytest.raises(ValueError, match=r"hydra\.run\.dir: .*already at step-00000004.*new folder"):
        train(tmp_path, f"ckpt_path={older}")


def test_accumulation_and_workers_do_not_change_the_samples(tmp_path: Path, seen: list[int]) -> None:
    runs = {}
    for options in ((), ("trainer.accumulate=2",), ("trainer.accumulate=4",)):
        seen.clear()
        runs[options], _ = train(tmp_path, *options, name=f"run{len(runs)}")
        assert seen == list(range(16))
    run, _ = train(tmp_path, "data.num_workers=2", name="workers")
    for p, q in zip(run.model.parameters(), runs[()].model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(("accumulate", "world"), [(1, 1), (2, 1), (1, 4), (2, 2)])
def test_ranks_share_a_steps_samples(accumulate: int, world: int) -> None:
    served = [list(CounterBatches(3, 5, 8, accumulate, rank, world)) for rank in range(world)]
    for step in range(2):
        of_step = [
            n for rank in served for batch in rank[step * accumulate : (step + 1) * accumulate] for n in batch
        ]
        assert sorted(of_step) == list(range((3 + step) * 8, (4 + step) * 8))


def test_a_step_must_divide_evenly() -> None:
    with pytest.raises(ValueError, match=r"data\.batch_size: .* 6, got 8"):
        CounterBatches(0, 1, 8, accumulate=3, world=2)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("seed=2", "seed is 1 there and 2 here"),
        ("data.batch_size=8", r"data\.batch_size is 4 there and 8 here"),
        ("data.max_documents=30", "data is '"),
        ("data.isolate=true", r"data\.isolate is None there and True here"),
        ("model.depth=1", r"depth is 2 there and 1 here"),
        ("optim=muon", r"optim\.name: .*init_from"),
        ("tokenizer=bpe tokenizer.vocab_size=300", r"tokenizer is one of 257 tokens .* of 300 .*; data is '"),
    ],
)
def test_what_would_change_a_run_is_refused(tmp_path: Path, option: str, words: str) -> None:
    train(tmp_path, "trainer.max_steps=1")
    with pytest.raises(ValueError, match=words) as caught:
        train(tmp_path, *option.split(), f"ckpt_path={tmp_path / 'run'}", name="resumed")
    assert "\n" not in str(caught.value) and not (tmp_path / "resumed").exists()


def test_forced_a_run_goes_on_and_says_what_differs(
    tmp_path: Path, seen: list[int], capsys: pytest.CaptureFixture
) -> None:
    train(tmp_path, "trainer.max_steps=1")
    seen.clear()
    forced = ("ckpt_force=true", f"ckpt_path={tmp_path / 'run'}")
    _, summary = train(tmp_path, "seed=2", "data.max_documents=30", *forced, name="resumed")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("ckpt_force: ")]
    assert len(lines) == 1 and "seed is 1 there and 2 here" in lines[0] and "data is '" in lines[0]
    assert seen == list(range(4, 16)) and summary["steps"] == 4
    with pytest.raises(ValueError, match=r"ckpt_path: of another architecture: dim is 16 there and 32 here"):
        train(tmp_path, "model.dim=32", *forced, name="wider")
    with pytest.raises(ValueError, match=r"optim\.name: "):
        train(tmp_path, "optim=muon", *forced, name="muon")
    with pytest.raises(ValueError, match="ckpt_force: must be true or false, got 'perhaps'"):
        train(tmp_path, "ckpt_force=perhaps", forced[1], name="perhaps")


class Drawing(Callback):
    """Draws before and after every step, from every generator, without the seeds of the step."""

    drawn: ClassVar[list[tuple]] = []

    def on_train_batch_start(self, *args: object) -> None:
        self.drawn.append((torch.rand(()).item(), np.random.normal(), random.gauss(0, 1)))

    on_train_batch_end = on_train_batch_start


def test_what_others_draw_goes_on(tmp_path: Path) -> None:
    drawing = (f"+callbacks.drawing._target_={__name__}.Drawing", ALLOWED)
    Drawing.drawn.clear()
    train(tmp_path, *drawing, *HALF, name="straight")
    straight = list(Drawing.drawn)
    Drawing.drawn.clear()
    half = tmp_path / "straight" / "checkpoints" / "step-00000002.pt"
    train(tmp_path, *drawing, f"ckpt_path={half}", name="resumed")
    assert len(straight) == 8 and Drawing.drawn == straight[4:]


def test_init_from_takes_the_weights_only(tmp_path: Path, seen: list[int]) -> None:
    first, _ = train(tmp_path, "trainer.max_steps=1", "seed=3")
    weights = {name: p.clone() for name, p in first.model.state_dict().items()}
    seen.clear()
    options = ("seed=4", "optim=muon", "data.seq_len=16", "optim.lr=0", "trainer.max_steps=1")
    second, summary = train(tmp_path, *options, f"init_from={tmp_path / 'run'}", name="second")
    assert seen == [0, 1, 2, 3] and summary["steps"] == 1 and summary["seed"] == 4
    for name, p in second.model.state_dict().items():
        assert torch.equal(p, weights[name])
    with pytest.raises(ValueError, match="init_from: excludes ckpt_path"):
        train(tmp_path, "init_from=a", "ckpt_path=b", name="third")


def test_another_batch_size_reads_on(tmp_path: Path, seen: list[int]) -> None:
    train(tmp_path, "trainer.max_steps=3", "callbacks.checkpoint.keep=9")
    forced = ("data.batch_size=8", f"ckpt_path={tmp_path / 'run'}", "ckpt_force=true")
    train(tmp_path, *forced, "trainer.max_steps=5", name="wider")
    assert seen == [*range(12), *range(12, 28)]
    wider = read_checkpoint(tmp_path / "wider")
    assert wider["position"]["sample"] == 28 and wider["progress"]["step"] == 5
    seen.clear()
    train(tmp_path, "data.batch_size=8", f"ckpt_path={tmp_path / 'wider'}", "trainer.max_steps=6", name="on")
    assert seen == list(range(28, 36))


def test_forced_packs_are_whole(tmp_path: Path) -> None:
    train(tmp_path, "trainer.max_steps=1", "data.batch_size=2")
    forced = (f"ckpt_path={tmp_path / 'run'}", "ckpt_force=true")
    with pytest.raises(ValueError, match=r"data\.pack: the checkpoint is at sample 2 of a pack of 4"):
        train(tmp_path, *forced, "data.pack=4", name="packs")

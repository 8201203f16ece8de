"""What a run computes, where it stops, what it writes."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch import nn
from torch.nn.functional import cross_entropy

from attnzoo import Context
from attnzoo.data import targets
from attnzoo.signals import STOPS
from attnzoo.train.batches import collate
from attnzoo.train.guard import RunFailed, find_culprit
from attnzoo.train.prepare import Run, prepare
from attnzoo.train.run import execute
from runs import compose, metrics, train


def flat(run: Run) -> torch.Tensor:
    return torch.cat([p.detach().double().flatten() for p in run.model.parameters()])


def by_hand(run: Run, steps: int) -> torch.Tensor:
    """The weights after a plain loop over whole batches, one sample at a time."""
    model, settings = run.model, run.optim
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
    )
    size = run.plan.batch_size
    for step in range(steps):
        total, count = 0.0, 0
        for n in range(step * size, (step + 1) * size):
            tokens, labels, segments = (x[None] for x in targets(run.corpus.sample(n)))
            logits = model(tokens, Context(segment_ids=segments))
            total = total + cross_entropy(logits[0], labels[0], reduction="sum")
            count += int((labels != -100).sum())
        optimizer.zero_grad()
        (total / count).backward()
        if run.trainer.grad_clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), run.trainer.grad_clip)
        optimizer.step()
    return flat(run)


@pytest.mark.parametrize(("accumulate", "clip"), [(1, "null"), (2, "null"), (4, "null"), (2, "0.2")])
def test_every_target_weighs_the_same_however_a_step_is_cut(
    tmp_path: Path, accumulate: int, clip: str
) -> None:
    options = (
        "data.isolate=true",
        "optim.schedule=constant",
        "optim.warmup=0",
        "trainer.max_steps=3",
        f"trainer.grad_clip={clip}",
        f"trainer.accumulate={accumulate}",
    )
    run, oracle = (prepare(compose(tmp_path, *options)) for _ in range(2))
    for r in (run, oracle):
        r.model.double()
    counts = [int((targets(run.corpus.sample(n))[1] != -100).sum()) for n in range(4)]
    assert len(set(counts)) > 1  # otherwise any weighting would do
    execute(run)
    torch.testing.assert_close(flat(run), by_hand(oracle, 3), rtol=1e-9, atol=1e-11)


def test_validation_counts_bits_per_byte_of_text(tmp_path: Path) -> None:
    run = prepare(compose(tmp_path, "data.isolate=true"))
    run.model.blocks[0].mlp.register_forward_hook(lambda mlp, args, y: 2 * y if mlp.training else y)
    summary = execute(run)
    run.model.eval()
    nll = count = size = 0.0
    for sample in run.corpus.validation():
        tokens, labels, segments = (x[None] for x in targets(sample))
        logits = run.model(tokens, Context(segment_ids=segments))
        nll += cross_entropy(logits[0].double(), labels[0], reduction="sum").item()
        count += int((labels != -100).sum())
        size += run.corpus.tokenizer.byte_length(labels[labels != -100])
    assert summary["val_loss"] == pytest.approx(nll / count, rel=1e-5)
    assert summary["val_bpb"] == pytest.approx(nll / math.log(2) / size, rel=1e-5)


def test_auxiliary_losses_get_the_configured_weight(tmp_path: Path) -> None:
    reported = {}
    for weight in (0.0, 0.5):
        options = ("attention=moh", "trainer.max_steps=1", f"trainer.aux_weights={{moh/balance: {weight}}}")
        train(tmp_path, *options, name=str(weight))
        reported[weight] = metrics(tmp_path / str(weight))[0]
    assert reported[0.0]["aux_loss"] == 0.0
    assert reported[0.5]["aux_loss"] == pytest.approx(0.5 * reported[0.5]["aux/moh/balance"], rel=1e-5)
    assert reported[0.0]["train_loss"] == reported[0.5]["train_loss"]  # the language model's own


def test_auxiliary_losses_are_reported_over_all_micro_batches(tmp_path: Path) -> None:
    options = ("model.layout='mha,moh'", "trainer.accumulate=2", "trainer.log_every=2", "data.isolate=true")
    train(tmp_path, *options, "trainer.aux_weights={moh/balance: 0.5}")
    lines = metrics(tmp_path / "run")
    assert len(lines) == 2
    for line in lines:
        # sums in fp64 of the same losses in fp32, of which one was rounded once more when it was weighted
        assert line["aux_loss"] == pytest.approx(0.5 * line["aux/moh/balance"], rel=2**-23)


def test_activation_checkpointing_changes_nothing_but_memory(tmp_path: Path) -> None:
    results = []
    for flag in ("true", "false"):
        options = (f"trainer.checkpoint_activations={flag}", "attention=moh", "data.isolate=true")
        results.append(flat(train(tmp_path, *options, name=flag)[0]))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_compiled_blocks_train_alike(tmp_path: Path) -> None:
    results = [
        metrics(tmp_path / flag)
        for flag in ("true", "false")
        if train(tmp_path, f"trainer.compile={flag}", name=flag)
    ]
    for compiled, plain in zip(*results, strict=True):
        assert compiled["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-4)


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_it_learns(tmp_path: Path, optim: str) -> None:
    train(tmp_path, f"optim={optim}", "optim.lr=1e-2", "trainer.max_steps=60", "trainer.precision=bf16")
    losses = [entry["train_loss"] for entry in metrics(tmp_path / "run")]
    assert losses[0] > 5.0 and losses[-1] < 3.0
    assert all(p.dtype == torch.float32 for p in prepare(compose(tmp_path, name="new")).model.parameters())


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        (("trainer.max_steps=3", "trainer.max_tokens=100000"), 3),
        (("trainer.max_steps=null", f"trainer.max_tokens={2 * 4 * 32 + 1}"), 3),
        (("trainer.max_steps=null", f"trainer.max_tokens={2 * 4 * 32}"), 2),
    ],
)
def test_the_first_limit_stops_the_run(tmp_path: Path, limits: tuple[str, ...], steps: int) -> None:
    _, summary = train(tmp_path, *limits)
    assert (summary["steps"], summary["tokens"], summary["status"]) == (steps, steps * 4 * 32, "completed")


@pytest.mark.parametrize("limit", ["1.0", "'00:00:00:01'"])
def test_the_clock_stops_the_run(tmp_path: Path, limit: str) -> None:
    _, summary = train(tmp_path, "trainer.max_steps=null", f"trainer.max_time={limit}")
    assert summary["status"] == "completed" and 1.0 <= summary["seconds"] < 5.0
    rates = [entry["lr"] for entry in metrics(tmp_path / "run")]
    assert max(rates) > 1.5e-3 and rates[-1] < 0.5e-3  # the schedule follows the clock


def test_a_run_folder_says_what_was_done(tmp_path: Path) -> None:
    run, summary = train(tmp_path, "attention=mla", "trainer.val_every=2", "seed=7")
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        "metrics.jsonl",
        "metrics.csv",
        "summary.json",
        "environment.json",
        "checkpoints",
        "tokenizer",
    }
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["variant"] == "mla" and summary["seed"] == 7 and summary["seq_len"] == 32
    assert summary["params"] == sum(p.numel() for p in run.model.parameters())
    cost = run.model.cost(32)
    assert summary["train_flops_per_token"] == cost.train_flops and summary["mfu"] is None
    assert summary["cache_bytes_per_token"] == cost.cache_bytes_per_token and summary["state_bytes"] == 0
    assert summary["tokens_per_second"] > 0 and summary["peak_memory_bytes"] > 1e7
    assert summary["versions"]["torch"] == torch.__version__ and summary["impl"] == ["sdpa"]
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and lines[-1]["tokens"] == 4 * 4 * 32
    assert ["val_bpb" in line for line in lines] == [False, True, False, True]
    assert all(line["grad_norm"] > 0 and line["lr"] > 0 for line in lines)
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["train_loss"]) for row in rows] == [line["train_loss"] for line in lines]
    facts = json.loads((folder / "environment.json").read_text())
    assert facts["data_fingerprint"] == run.corpus.fingerprint
    assert facts["impl"] == {"layer 0 mla": "sdpa", "layer 1 mla": "sdpa"}


def test_mfu_counts_what_runs() -> None:
    from attnzoo.train.metrics import Meter

    meter = Meter(tokens_per_step=100, flops_per_token=6.0, device=torch.device("cpu"), world=2)
    meter.peak = 1e4
    for _ in range(3):
        meter.add(nll=200.0, auxiliary=0.0, count=100.0)
    report = meter.report()
    assert report["train_loss"] == 2.0
    assert report["mfu"] == pytest.approx(report["tokens_per_second"] * 6.0 / 1e4)


class Interrupt(Callback):
    """Sends a signal in the middle of the second step, twice at once as launchers do."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_train_batch_start(self, trainer: object, module: object, batch: object, batch_idx: int) -> None:
        if batch_idx == 1:
            os.kill(os.getpid(), self.number)
            os.kill(os.getpid(), self.number)


@pytest.fixture
def heard(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    """A stop signal that has a handler: whoever started the tests may have had it ignored."""
    before = signal.signal(request.param, signal.SIG_DFL)
    yield request.param
    signal.signal(request.param, before)


@pytest.mark.parametrize("heard", STOPS, ids=lambda number: number.name, indirect=True)
def test_a_stop_signal_finishes_the_step_and_saves(tmp_path: Path, heard: signal.Signals) -> None:
    interrupt = "+callbacks.interrupt"
    options = (f"{interrupt}._target_={__name__}.Interrupt", f"{interrupt}.number={int(heard)}")
    options += (f"allow_targets=[{__name__}]",)
    _, summary = train(tmp_path, *options)
    assert (summary["status"], summary["steps"]) == ("stopped", 2)
    assert summary["stopped_by"] == heard.name
    assert (tmp_path / "run" / "checkpoints" / "step-00000002.pt").exists()
    assert signal.getsignal(heard) is signal.SIG_DFL


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    run = prepare(compose(tmp_path, "trainer.accumulate=2"))
    rotten = run.corpus.sample(9)["tokens"][:-1]
    factor = torch.ones(())
    healthy = run.model.blocks[1].mlp.down.forward

    def look(model: nn.Module, args: tuple) -> None:
        factor.fill_(math.nan if (args[0] == rotten).all(1).any() else 1.0)

    run.model.register_forward_pre_hook(look)
    run.model.blocks[1].mlp.down.forward = lambda x: healthy(x) * factor
    with pytest.raises(RunFailed) as caught:
        execute(run)
    message = str(caught.value)
    tokens = torch.stack([run.corpus.sample(n)["tokens"][:-1] for n in range(8, 12)])
    fingerprint = hashlib.sha256(tokens.numpy().tobytes()).hexdigest()[:16]
    for words in ("step 3: the loss", "blocks.1.mlp.down (Linear)", "samples 8 to 11", fingerprint):
        assert words in message, message
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed" and summary["steps"] == 2 and summary["error"] == message
    assert "\n" not in message


def test_the_culprit_may_be_weights_or_gradients() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    def culprit() -> str:
        return find_culprit(model, lambda: model(torch.ones(1, 2)))

    model[0].weight.grad = torch.full((2, 2), math.inf)
    assert culprit() == "the gradient of 0.weight"
    model[1].forward = lambda x: x / 0
    assert culprit() == "the output of 1 (Linear)"
    model[0].bias.data[0] = math.nan
    assert culprit() == "the weights of 0.bias, before the step"


def test_a_batch_of_whole_documents_needs_no_mask(tmp_path: Path) -> None:
    run = prepare(compose(tmp_path, "data.isolate=true"))
    masks = [collate([run.corpus.sample(n)])["segment_ids"] for n in range(40)]
    assert any(mask is None for mask in masks) and any(mask is not None for mask in masks)
    assert all(mask is None or mask.unique().numel() > 1 for mask in masks)

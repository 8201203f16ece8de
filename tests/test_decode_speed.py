"""The time of one more token, measured when a run ends."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from attnzoo import create_model
from attnzoo.train import decode_speed
from attnzoo.train.decode_speed import measure
from runs import train

TEXT = ("trainer.max_steps=1",)


def tiny(variant: str = "mha", **options: object) -> torch.nn.Module:
    return create_model(variant, vocab_size=32, dim=16, depth=2, num_heads=2, max_seq_len=32, **options)


def test_a_run_reports_three_contexts_and_the_caches_of_their_lengths(tmp_path: Path) -> None:
    _, summary = train(tmp_path, *TEXT)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["decode"] == summary["decode"]
    assert summary["decode"]["context"] == [8, 16, 32]
    assert all(ms > 0 for ms in summary["decode"]["ms_per_token"])
    per_token, state = summary["cache_bytes_per_token"], summary["state_bytes"]
    assert summary["decode"]["cache_bytes"] == [n * per_token + state for n in (8, 16, 32)]


def test_the_last_step_fills_the_context_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny(), []
    forward = model.forward

    def spy(tokens: torch.Tensor, ctx=None, cache=None, keep=None) -> torch.Tensor:
        out = forward(tokens, ctx, cache, keep)
        calls.append((tokens.shape[1], cache.length))
        return out

    monkeypatch.setattr(model, "forward", spy)
    monkeypatch.setattr(decode_speed, "SECONDS", 60.0)
    measure(model, [8, 32], 16, nullcontext)
    assert calls[:8] == [(1, 1), *((1, n) for n in range(2, 9))]
    assert calls[8:] == [(16, 16), *((1, n) for n in range(17, 33))]


def test_slow_steps_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = tiny(), []
    monkeypatch.setattr(decode_speed, "SECONDS", 0.0)
    model.register_forward_hook(lambda *_: calls.append(1))
    measure(model, [32], 16, nullcontext)
    assert len(calls) == 1 + decode_speed.LEAST + 1


def test_the_model_and_the_generator_are_left_as_they_were() -> None:
    model = tiny("gated_deltanet")
    for training in (True, False):
        model.train(training)
        state = torch.random.get_rng_state()
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        model.blocks[0].register_forward_hook(lambda *_: print(torch.rand(1)))
        measure(model, [16], 4, nullcontext)
        assert model.training == training
        assert torch.equal(torch.random.get_rng_state(), state)
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("trainer.decode_tokens=0",), "trainer.decode_tokens is 0"),
        (("attention=efficient_dlm", "attention.block_size=8"), "not decoded token by token"),
    ],
)
def test_what_is_not_measured_says_why(tmp_path: Path, options: tuple[str, ...], reason: str) -> None:
    _, summary = train(tmp_path, *TEXT, *options)
    assert summary["decode"] is None and reason in summary["decode_reason"]
    assert summary["status"] == "completed"


def test_a_failing_measurement_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(decode_speed, "measure", broken)
    _, summary = train(tmp_path, *TEXT)
    assert (summary["status"], summary["decode"], summary["decode_reason"]) == ("completed", None, "no room")
    assert (tmp_path / "run" / "summary.json").exists()


def test_recomputing_and_compiled_blocks_are_decoded_plainly(tmp_path: Path) -> None:
    _, summary = train(tmp_path, *TEXT, "trainer.checkpoint_activations=true")
    assert summary["decode"]["ms_per_token"]
    model = tiny()
    for block in model.blocks:
        block.compile(backend=lambda graph, inputs: pytest.fail("compiled"))
    recompute = model.run_block = lambda *_: pytest.fail("recomputing")
    measure(model, [8], 4, nullcontext)
    assert model.run_block is recompute

"""Checkpoints are complete or absent, run no code, and say what does not fit."""

from __future__ import annotations

import copy
import os
import pickle
import resource
import subprocess
from pathlib import Path

import pytest
import torch

import attnzoo
from attnzoo.train import checkpoint, store
from attnzoo.train.checkpoint import find_checkpoint, load_weights, read_checkpoint
from attnzoo.train.folder import check_folder
from attnzoo.train.guard import RunFailed
from attnzoo.train.optim import build_optimizer, load_named_state, named_state
from attnzoo.train.settings import OptimSettings
from attnzoo.train.store import save_checkpoint
from runs import train


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished tiny run."""
    folder = tmp_path_factory.mktemp("finished")
    train(folder, "attention=mla", "trainer.max_steps=1")
    return folder / "run"


def content(size: int = 10) -> dict:
    return {name: {} for name in checkpoint.KEYS} | {"model": {"weight": torch.arange(size)}}


def test_a_run_folder_loads_without_lightning(finished: Path) -> None:
    model, tokenizer = attnzoo.load(finished)
    assert not model.training and model.config["layout"] == "mla" and tokenizer.vocab_size == 257
    again, _ = attnzoo.load(finished / "checkpoints" / "step-00000001.pt")
    tokens = torch.randint(257, (1, 9))
    assert torch.equal(model(tokens), again(tokens))


def test_it_holds_plain_values_only(finished: Path) -> None:
    loaded = torch.load(find_checkpoint(finished), weights_only=True)
    informing = {"config", "versions", "schedule", "position", "metrics", "draws"}
    assert set(loaded) == {"format", *checkpoint.KEYS, *informing}
    assert loaded["position"] == {"sample": 4, "micro": 0, "accumulate": 1}
    assert loaded["schedule"]["total_steps"] == 1 and loaded["schedule"]["lr"] > 0
    assert loaded["config"]["attention"]["name"] == "mla" and "torch" in loaded["versions"]
    assert loaded["metrics"]["val_bpb"] > 0 and len(loaded["draws"]) == 1
    assert loaded["progress"]["step"] == 1 and loaded["identity"]["seed"] == 1
    assert set(loaded["optimizer"]) == set(loaded["model"])


def test_what_is_loaded_does_not_hang_on_the_file(tmp_path: Path) -> None:
    """Others may remove it while the run goes on."""
    train(tmp_path, "trainer.max_steps=1")
    saved = read_checkpoint(tmp_path / "run")
    model = attnzoo.create_model(**saved["model_config"])
    optimizer = build_optimizer(model, OptimSettings())
    load_weights(model, saved)
    load_named_state(model, optimizer, saved["optimizer"])
    before = copy.deepcopy((model.state_dict(), named_state(model, optimizer)))
    with find_checkpoint(tmp_path / "run").open("r+b") as file:
        file.write(bytes(os.path.getsize(file.name)))
    assert not any(value.any() for value in saved["model"].values())  # they are the file
    torch.testing.assert_close((model.state_dict(), named_state(model, optimizer)), before, rtol=0, atol=0)


def test_every_name_of_a_checkpoint_finds_it(finished: Path) -> None:
    file = finished / "checkpoints" / "step-00000001.pt"
    for path in (finished, finished / "checkpoints", finished / "checkpoints" / "last", file):
        assert find_checkpoint(path) == file
    for path, words in (
        (finished / "nothing", "does not exist"),
        (finished / "tokenizer", "no complete checkpoint"),
    ):
        with pytest.raises(ValueError, match=f"ckpt_path: .*{words}"):
            find_checkpoint(path)


def test_only_the_newest_are_kept_and_last_names_the_newest(tmp_path: Path) -> None:
    (tmp_path / ".step-00000001.pt.7.tmp").write_bytes(b"of a killed process")
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, content(), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "last",
        "step-00000002.pt",
        "step-00000002.pt.sha256",
        "step-00000010.pt",
        "step-00000010.pt.sha256",
    ]
    assert find_checkpoint(tmp_path).name == "step-00000010.pt"


def steps(folder: Path) -> list[int]:
    return [store.step_of(path) for path in reversed(store.checkpoints(folder))]


def test_those_of_every_so_many_steps_stay(tmp_path: Path) -> None:
    for step in range(1, 10):
        save_checkpoint(tmp_path, step, content(), keep=2, keep_every=3)
    assert steps(tmp_path) == [3, 6, 8, 9]


def test_going_back_drops_what_came_later_and_keeps_what_is_written(tmp_path: Path) -> None:
    for step in (1, 2, 4):
        save_checkpoint(tmp_path, step, content(), keep=9)
    save_checkpoint(tmp_path, 3, content(), keep=1)
    assert steps(tmp_path) == [3] and find_checkpoint(tmp_path).name == "step-00000003.pt"


def test_sha256sum_checks_them(tmp_path: Path) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, content(), keep=2)
    command = ["sha256sum", "-c", "step-00000001.pt.sha256", "step-00000002.pt.sha256"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == 2


def test_a_disk_that_keeps_something_else_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 1, content(), keep=1)
    fsync = os.fsync

    def forgetful(number: int) -> None:
        fsync(number)
        for file in tmp_path.glob(".step-00000002*"):
            flip(file, file.stat().st_size // 2)

    monkeypatch.setattr(os, "fsync", forgetful)
    with pytest.raises(RunFailed, match=r"step 2: what was read back .*step-00000001\.pt"):
        save_checkpoint(tmp_path, 2, content(), keep=1)
    assert steps(tmp_path) == [1] and find_checkpoint(tmp_path).name == "step-00000001.pt"


def flip(file: Path, position: int) -> None:
    """Turn one bit over."""
    data = bytearray(file.read_bytes())
    data[position] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize("with_sum", [True, False])
def test_a_flipped_bit_anywhere_in_a_tensor_is_refused(tmp_path: Path, with_sum: bool) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, content(200), keep=9)
    file = tmp_path / "step-00000003.pt"
    flip(file, file.read_bytes().index(torch.arange(200).numpy().tobytes()) + 100)
    if not with_sum:
        (tmp_path / f"{file.name}.sha256").unlink()
    words = "differs from its checksum" if with_sum else "is truncated or no checkpoint"
    other = tmp_path / "step-00000002.pt"
    with pytest.raises(ValueError, match=words) as caught:
        read_checkpoint(tmp_path)
    message = str(caught.value)
    assert str(file) in message and f"ckpt_path={other} hydra.run.dir=" in message and "\n" not in message
    flip(other, 100)
    with pytest.raises(ValueError, match=r"init_from: .*: give init_from=.*step-00000001\.pt"):
        read_checkpoint(tmp_path, "init_from")


def test_a_damaged_pointer_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, content(), keep=9)
    for text in ("", "../../elsewhere.pt", "step-0000"):
        (tmp_path / "last").write_text(text + "\n")
        with pytest.raises(ValueError, match=r"step-00000001\.pt"):
            read_checkpoint(tmp_path)


def test_a_damaged_checkpoint_does_not_bar_its_folder(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    for step in (1, 2):
        save_checkpoint(folder, step, content(), keep=9)
    first = folder / "step-00000001.pt"
    with pytest.raises(ValueError, match="already at step-00000002"):
        check_folder(folder.parent, first)
    flip(folder / "step-00000002.pt", 80)
    check_folder(folder.parent, first)


def test_format_1_is_read(finished: Path, tmp_path: Path) -> None:
    loaded = read_checkpoint(finished)
    old = {key: loaded[key] for key in checkpoint.KEYS} | {"format": 1}
    torch.save(old, tmp_path / "old.pt")
    assert read_checkpoint(tmp_path / "old.pt")["progress"] == loaded["progress"]


@pytest.mark.parametrize("victim", ["step-00000002.pt", "step-00000002.pt.sha256", "last"])
def test_an_interruption_at_any_write_leaves_the_last_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str
) -> None:
    save_checkpoint(tmp_path, 1, content(), keep=1)
    replace = os.replace

    def interrupted(source: Path, target: Path) -> None:
        if Path(target).name == victim:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, content(), keep=1)
    assert read_checkpoint(find_checkpoint(tmp_path)) and find_checkpoint(tmp_path).name == "step-00000001.pt"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("write", [1, 5, 9])
def test_an_interruption_amid_the_bytes_is_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    """torch fails to close the file then, with an error of its own."""
    save_checkpoint(tmp_path, 1, content(), keep=1)
    writes = []

    def interrupted(self: store._Watched, data: bytes) -> int:
        writes.append(data)
        if len(writes) == write:
            raise KeyboardInterrupt
        return len(data)

    monkeypatch.setattr(store._Watched, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, content(), keep=1)
    assert steps(tmp_path) == [1] and not list(tmp_path.glob(".*"))


def test_a_full_disk_leaves_the_last_good_one(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, content(), keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # the kernel then refuses larger files
    try:
        with pytest.raises(RunFailed) as caught:
            save_checkpoint(tmp_path, 2, content(100_000), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = str(caught.value)
    assert "\n" not in message
    for words in ("step 2", "disk is full", "step-00000001.pt", "ckpt_path"):
        assert words in message
    assert steps(tmp_path) == [1] and not list(tmp_path.glob(".*"))
    assert len(read_checkpoint(tmp_path)["model"]["weight"]) == 10


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_one_is_refused(finished: Path, tmp_path: Path, share: float) -> None:
    whole = find_checkpoint(finished).read_bytes()
    file = tmp_path / "step-00000001.pt"
    file.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match=r"ckpt_path: .*truncated") as caught:
        read_checkpoint(file)
    assert "\n" not in str(caught.value)


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def test_pickled_code_does_not_run(tmp_path: Path) -> None:
    torch.save({"format": 1, "model": Evil(tmp_path / "ran")}, tmp_path / "evil.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    torch.save({"something": 1}, tmp_path / "other.pt")
    for name in ("evil.pt", "raw.pt", "other.pt"):
        with pytest.raises(ValueError, match="ckpt_path: "):
            read_checkpoint(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_another_architecture_is_described(finished: Path) -> None:
    loaded = read_checkpoint(finished)
    wide = attnzoo.create_model("mla", vocab_size=257, dim=32, depth=2, num_heads=2)
    with pytest.raises(ValueError, match=r"dim is 16 there and 32 here; embed\.weight is \[257, 16\] there"):
        load_weights(wide, loaded)
    other = attnzoo.create_model("mha", vocab_size=257, dim=16, depth=2, num_heads=2)
    with pytest.raises(
        ValueError, match=r"layout is 'mla' there and 'mha' here; .* only (here|there)"
    ) as caught:
        load_weights(other, loaded, "init_from")
    assert str(caught.value).startswith("init_from: ") and "\n" not in str(caught.value)


def test_a_missing_or_foreign_tokenizer_is_refused(finished: Path, tmp_path: Path) -> None:
    lone = tmp_path / "run" / "checkpoints" / "step-00000001.pt"
    lone.parent.mkdir(parents=True)
    lone.write_bytes(find_checkpoint(finished).read_bytes())
    with pytest.raises(ValueError, match=r"checkpoint: .*tokenizer"):
        attnzoo.load(lone)
    loaded = copy.deepcopy(read_checkpoint(finished))
    loaded["tokenizer"] = {"fingerprint": "another", "vocab_size": 300}
    _, tokenizer = attnzoo.load(finished)
    with pytest.raises(ValueError, match=r"vocabulary is another: 300 tokens .* 257"):
        checkpoint.check_vocabulary(tokenizer, loaded, "ckpt_path")

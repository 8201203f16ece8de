"""A full disk and a read-only folder: one line says so, and what was there before stays."""

from __future__ import annotations

import resource
from contextlib import suppress
from pathlib import Path

import pytest

from attnzoo.train.checkpoint import read_checkpoint
from attnzoo.train.logger import FileLogger, forget_after
from children import run_child
from faults import cli, one_line, read_only, small_disk, train_command
from runs import metrics, train

pytestmark = [pytest.mark.multi, pytest.mark.slow]


def on_small_disk(path: Path, size: int, arguments: list[str]) -> None:
    print("disk:", small_disk(path, size))
    cli(*arguments)


def on_read_only(path: Path, arguments: list[str]) -> None:
    print("read-only:", read_only(path))
    cli(*arguments)


def test_a_token_cache_that_finds_no_room(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    ended = run_child(on_small_disk, cache, 8192, train_command(tmp_path), cwd=tmp_path)
    line = one_line(ended.stderr)
    assert ended.returncode == 2 and "data.cache_dir: " in line and "with room" in line, line


@pytest.mark.parametrize(
    ("size", "code", "words"),
    [
        (4096, 2, ("hydra.run.dir: ", "cannot be written: the disk is full", "with room")),
        (65536, 1, ("checkpoint of step 4: the disk is full; there is none; make room",)),
    ],
)
def test_a_run_folder_that_finds_no_room(tmp_path: Path, size: int, code: int, words: tuple) -> None:
    train(tmp_path, name="first")  # the cache is there
    disk = tmp_path / "disk"
    ended = run_child(on_small_disk, disk, size, train_command(tmp_path, name="disk/run"), cwd=tmp_path)
    line = one_line(ended.stderr)
    assert ended.returncode == code and all(word in line for word in words), line


def fills_up(path: Path, arguments: list[str]) -> None:
    """Training on a disk that takes one checkpoint and not the next; then, with room, from the first on."""
    from attnzoo.cli import main
    from attnzoo.train import callbacks

    save = callbacks.save_checkpoint

    def saves(folder: Path, step: int, *more: object) -> None:
        if step == 4 and not filler.exists():
            filler.touch()
            if kind == "limit":
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, size))
            else:
                with open(filler, "wb", buffering=0) as file, suppress(OSError):
                    while file.write(bytes(4096)):
                        pass
        return save(folder, step, *more)

    size = 1 << 20
    kind = small_disk(path, size)
    filler, callbacks.save_checkpoint = path / "filler", saves
    assert main(arguments) == 1
    checkpoints = path / "run" / "checkpoints"
    left = sorted(file.name for file in checkpoints.iterdir())
    print(left, read_checkpoint(path / "run")["progress"]["step"])
    filler.unlink()
    if kind == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    callbacks.save_checkpoint = save
    assert main([*arguments, f"ckpt_path={path / 'run'}"]) == 0
    print(read_checkpoint(path / "run")["progress"]["step"])


def test_a_later_checkpoint_finds_no_room(tmp_path: Path) -> None:
    train(tmp_path, name="first")
    arguments = train_command(tmp_path, "callbacks.checkpoint.every=2", name="disk/run")
    ended = run_child(fills_up, tmp_path / "disk", arguments, cwd=tmp_path)
    assert ended.returncode == 0, ended.stderr
    line = one_line(ended.stderr)
    assert (
        "checkpoint of step 4: the disk is full; the last good one is" in line and "step-00000002.pt" in line
    )
    shown = ended.stdout.splitlines()
    assert "['last', 'step-00000002.pt', 'step-00000002.pt.sha256'] 2" in shown and shown[-1] == "4"


def test_a_read_only_run_folder(tmp_path: Path) -> None:
    place = tmp_path / "locked"
    ended = run_child(on_read_only, place, train_command(tmp_path, name="locked/run"), cwd=tmp_path)
    line = one_line(ended.stderr)
    assert ended.returncode == 2 and line.startswith(f"error: hydra.run.dir: '{place}"), line
    assert "cannot be written" in line and "give a folder" in line, line


def metrics_on_small_disk(path: Path) -> None:
    small_disk(path, 8192)
    logger, written = FileLogger(str(path)), 0
    try:
        while written < 10_000:
            logger.log_metrics({"step": written + 1, "train_loss": 0.5})
            written += 1
    except OSError as error:
        assert error.filename and "metrics" in error.filename, error
    lines = metrics(path)
    assert 0 < written < 10_000 and [line["step"] for line in lines][:written] == list(range(1, written + 1))
    print("whole")


def test_a_metrics_line_that_finds_no_room_is_taken_back(tmp_path: Path) -> None:
    ended = run_child(metrics_on_small_disk, tmp_path / "disk")
    assert ended.stdout == "whole\n", ended.stderr


def test_a_torn_line_is_forgotten(tmp_path: Path) -> None:
    train(tmp_path)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "tok')
    forget_after(tmp_path / "run", 9)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert read_checkpoint(tmp_path / "run")["progress"]["step"] == 4

"""Hostile input: what a configuration, a run folder or a sweep from elsewhere cannot do."""

from __future__ import annotations

import json
import os
import pickle
import stat
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger

from attnzoo.cli import explain, main
from attnzoo.cli.tree import path_part
from attnzoo.compare.runs import _config
from attnzoo.data import load_tokenizer
from attnzoo.redaction import redact, redact_arguments, redact_text
from attnzoo.secure import VARIABLE, allowed_targets, build
from attnzoo.sweep.cell import _config as cell_config
from attnzoo.sweep.cell import _explain as cell_error
from attnzoo.sweep.manifest import FILE, read_manifest
from attnzoo.train.checkpoint import find_checkpoint, read_checkpoint
from attnzoo.train.guard import RunFailed
from attnzoo.train.module import LanguageModule
from attnzoo.train.store import write_atomic
from children import run_child, start_ranks
from runs import overrides, train

SECRET = "s3cr3t-of-the-environment"
OUTSIDE = [
    "os.system",
    "subprocess.Popen",
    "builtins.eval",
    "torchvision.io.read_image",
    "attnzoo_evil.Callback",
    "torch",
    "attnzoo..secure.build",
    "",
]
NO_CLASS = [
    "torch.load",
    "torch.hub.load",
    "torch.utils.cpp_extension.load_inline",
    "attnzoo.train.run.os.system",
    "attnzoo.train.run.os",
    "attnzoo.secure.importlib.import_module",
    "torch.serialization.pickle.loads",
    "lightning.pytorch.trainer.trainer.Path",
    "attnzoo.secure.build",
]
NO_CALLBACK = ["torch.package.PackageImporter", "torch.jit.CompilationUnit", "lightning.pytorch.Trainer"]


@pytest.mark.parametrize(
    ("target", "rule"),
    [
        *((target, "is not inside attnzoo, ") for target in OUTSIDE),
        *((target, "is no class of|there is no class") for target in NO_CLASS),
        *((target, "must be a Callback") for target in NO_CALLBACK),
    ],
)
def test_a_target_that_is_no_callback_of_ours(target: str, rule: str) -> None:
    with pytest.raises(ValueError, match=rf"^callbacks\.x\._target_: .*({rule})"):
        build({"_target_": target, "file": "x"}, pl.Callback, "callbacks.x")


@pytest.mark.parametrize(
    "more",
    [
        {"_partial_": True},
        {"_args_": ["x"]},
        {"every": {"_target_": "os.system", "command": "id"}},
        {"every": [{"deep": {"_target_": "torch.package.PackageImporter", "file_or_buffer": "x"}}]},
        {"every": {"_target_": ["os", "system"]}},
    ],
)
def test_what_hides_in_arguments(more: dict) -> None:
    with pytest.raises(ValueError, match=r"^callbacks\.x\."):
        build({"_target_": "attnzoo.train.callbacks.Checkpoint"} | more, pl.Callback, "callbacks.x")


def test_what_the_user_adds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_zoo.py").write_text(
        "import os\nfrom subprocess import Popen\nfrom lightning.pytorch import Callback\n"
        "class Inner: pass\n"
        "class Mine(Callback):\n    def __init__(self, inner=None):\n        self.inner = inner\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    node = {"_target_": "mine_zoo.Mine", "inner": {"_target_": "mine_zoo.Inner"}}
    with pytest.raises(ValueError, match=f"allow_targets=.*{VARIABLE}"):
        build(node, pl.Callback, "callbacks.x")
    assert "mine_zoo" not in sys.modules  # not so much as imported
    assert type(build(node, pl.Callback, "callbacks.x", ("mine_zoo",)).inner).__name__ == "Inner"
    with pytest.raises(ValueError, match="_target_"):
        build({"_target_": "mine_zoo.os"}, pl.Callback, "callbacks.x", ("mine_zoo",))
    foreign = node | {"inner": {"_target_": "mine_zoo.Popen", "args": ["touch", str(tmp_path / "bad")]}}
    with pytest.raises(ValueError, match=r"^callbacks\.x\.inner\._target_: .* is no class of mine_zoo"):
        build(foreign, pl.Callback, "callbacks.x", ("mine_zoo",))
    assert not (tmp_path / "bad").exists()
    with pytest.raises(ValueError, match="must be a Logger"):
        build({"_target_": "mine_zoo.Mine"}, Logger, "logger.x", ("mine_zoo",))
    monkeypatch.setenv(VARIABLE, "mine_zoo,other")
    assert allowed_targets() == ("mine_zoo", "other")
    for wrong in ("mine_zoo", [3], ["*"], ["os;id"]):
        with pytest.raises(ValueError, match=r"^allow_targets: "):
            allowed_targets(wrong)


def test_the_command_line_and_what_a_checkpoint_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    options = overrides(
        tmp_path, "+callbacks.x._target_=os.system", f"+callbacks.x.command=touch {tmp_path / 'bad'}"
    )
    assert main(["train", *options]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: callbacks.x._target_: 'os.system' is not inside") and err.count("\n") == 1
    assert not (tmp_path / "bad").exists()


def test_a_folders_name_leads_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    for option in ("attention.name=../../../bad", "seed='../../../bad'", "attention.name=/tmp/bad"):
        assert main(["train", *overrides(tmp_path, option)]) == 2
        err = capfd.readouterr().err
        assert "hydra.run.dir" in err and err.count("\n") == 1, err
    assert [path.name for path in tmp_path.iterdir()] == ["a"] or not (tmp_path / "bad").exists()
    assert not list(inside.iterdir())
    for value in ("..", ".hidden", "a/b", "", "a b", "-x"):
        with pytest.raises(ValueError, match=r"hydra\.run\.dir"):
            path_part(value)
    assert path_part("gated_deltanet") == "gated_deltanet" and path_part(3) == "3"


def test_a_manifest_leads_nowhere_else(tmp_path: Path) -> None:
    cell = {"stage": "run", "arm": "a", "setting": "", "seed": 1, "overrides": [], "config": {}}
    rest = {"created": "", "cwd": ".", "command": [], "baseline": None, "match": None, "tune": None}
    rest |= {"launcher": {"name": "local", "jobs": None}, "format": 1}

    def write(name: str, *ids: str) -> None:
        cells = [cell | {"id": id} for id in ids]
        (tmp_path / FILE).write_text(json.dumps(rest | {"name": name, "cells": cells}))

    write("s", "mha-s1-0123abcd")
    found = read_manifest(tmp_path)
    assert found.run_folder(found.cells[0]).parent == tmp_path / "cells"
    for name, *ids in (
        ("s", "../../bad"),
        ("s", "/tmp/bad"),
        ("s", ".."),
        ("s", "a\nb"),
        ("../s", "a"),
        ("s", "a", "a"),
    ):
        write(name, *ids)
        with pytest.raises(ValueError, match="must"):
            read_manifest(tmp_path)


def test_a_manifest_allows_itself_nothing(tmp_path: Path) -> None:
    cell = {"id": "a", "stage": "run", "arm": "a", "setting": "", "seed": 1, "overrides": []}
    cell["config"] = {"launcher": {"devices": 1}, "allow_targets": ["os"]}
    content = {
        "name": "s",
        "created": "",
        "cwd": ".",
        "command": [],
        "baseline": None,
        "match": None,
        "tune": None,
    }
    content |= {"launcher": {"name": "local", "jobs": None}, "format": 1, "cells": [cell]}
    (tmp_path / FILE).write_text(json.dumps(content))
    manifest = read_manifest(tmp_path)
    assert cell_config(manifest, manifest.cells[0], None)["allow_targets"] == []


class Bomb:
    def __reduce__(self) -> tuple:
        return os.system, ("touch bad",)


def test_checkpoints_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "step-00000001.pt").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="ckpt_path"):
        read_checkpoint(folder / "step-00000001.pt")
    torch.save(Bomb(), folder / "step-00000001.pt")  # an archive as a checkpoint is, with a pickle inside
    with pytest.raises(ValueError, match="no checkpoint of plain tensors"):
        read_checkpoint(folder / "step-00000001.pt")
    assert not (tmp_path / "bad").exists()
    for pointer in ("../../etc/passwd", "/etc/passwd", "step-00000001.pt/../../x", ""):
        (folder / "last").write_text(pointer)
        with pytest.raises(ValueError, match="damaged"):
            find_checkpoint(tmp_path)
    (folder / "last").unlink()
    (folder / "last").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="damaged"):
        find_checkpoint(tmp_path)


def test_a_tokenizers_folder_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "code.py").write_text("open('bad', 'w')\nclass T: pass\n")
    remote = {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["code.T", "code.T"]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(remote))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t", "auto_map": remote["auto_map"]}))
    with pytest.raises(ValueError, match=r"tokenizer\.path"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "bad").exists()


def test_secrets_are_hidden_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZOO_API_KEY", SECRET)
    hostile = {
        "api_key": "abc",
        "nested": [{"dbPassword": "x", "HF_TOKEN": "y"}],
        "url": "https://me:pass@host/x?token=abc&n=3",
        "note": f"before {SECRET} after",
        "harmless": {
            "num_kv_heads": 2,
            "tokenizer": "bpe",
            "max_tokens": 5,
            "key": 3,
            "keys": "a",
            "key_dim": "b",
        },
    }
    shown = redact(hostile)
    assert shown["harmless"] == hostile["harmless"]
    assert shown["url"] == "https://***@host/x?token=***&n=3" and shown["note"] == "before *** after"
    assert shown["api_key"] == "***" and shown["nested"] == [{"dbPassword": "***", "HF_TOKEN": "***"}]
    assert hostile["api_key"] == "abc"  # the run keeps it
    assert redact_arguments(["logger.x.api_key=abc", "seed=1", "-m"]) == [
        "logger.x.api_key=***",
        "seed=1",
        "-m",
    ]
    assert redact_text("step 3: https://host/a@b") == "step 3: https://host/a@b"


def test_no_secret_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """A run with W&B, offline, whose configuration resolves a secret: no file of the run folder holds it."""
    pytest.importorskip("wandb")
    for name, value in (("ZOO_API_KEY", SECRET), ("WANDB_MODE", "offline"), ("WANDB_SILENT", "true")):
        monkeypatch.setenv(name, value)
    options = ("logger=wandb", "trainer.sample_prompt=${oc.env:ZOO_API_KEY}")
    monkeypatch.setattr(sys, "argv", ["attnzoo", "train", f"logger.x.api_key={SECRET}", f"x={SECRET}"])
    run, _ = train(tmp_path, *options, "trainer.max_steps=1")
    assert run.config["trainer"]["sample_prompt"] == run.trainer.sample_prompt == SECRET  # the run has it
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    found = {path.name for path in files if SECRET.encode() in path.read_bytes()}
    assert not found
    assert "sample_prompt: '***'" in (tmp_path / "run" / "config.yaml").read_text()
    assert SECRET not in "".join(capfd.readouterr())


def test_no_error_says_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """The command's line, the summary's, and that of a cell of a sweep."""

    def fails(*args: object) -> None:
        raise RunFailed(f"no room at {SECRET}")

    monkeypatch.setenv("ZOO_API_KEY", SECRET)
    monkeypatch.setattr(LanguageModule, "training_step", fails)
    assert main(["train", *overrides(tmp_path, f"hydra.run.dir={tmp_path / 'run'}")]) == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["error"] == "no room at ***"
    assert cell_error(RunFailed(f"no room at {SECRET}")) == "no room at ***"
    said = "".join(capfd.readouterr())
    assert said.count("error: no room at ***") == 2 and SECRET not in said


HOSTILE = [  # a secret of the environment, and what says it
    (SECRET, f"GET https://me:pw@host/x?token=tok3n&n=1 failed with {SECRET}"),
    (SECRET, {SECRET: 1}),
    ("it's \"\\ hard/to+hide", "it's \"\\ hard/to+hide"),
    ("it's \"\\ hard/to+hide", ("it's \"\\ hard/to+hide",)),
    ("it's hard/to+hide", "https://host/it%27s%20hard/to%2Bhide and it%27s%20hard%2Fto%2Bhide"),
    ('{"key": "ab\\ncd"}', json.dumps({"sent": '{"key": "ab\\ncd"}'})),
    ("-- BEGIN --\n  AAAABBBBCCCC\n-- END --\n", "cannot read\n-- BEGIN --\n  AAAABBBBCCCC\n-- END --\n."),
    ("-- BEGIN --\n  AAAABBBBCCCC\n-- END --\n", "| -- BEGIN --\n|   AAAABBBBCCCC\n| -- END --"),
]
LEFT = (SECRET, "me:pw", "tok3n", "hard", "ncd", "AAAA", "BEGIN")  # none of it may be said


@pytest.mark.parametrize(("secret", "said"), HOSTILE)
def test_a_trace_holds_no_secret(
    secret: str, said: object, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Of an error, of its cause, and in one line."""
    monkeypatch.setenv("ZOO_API_KEY", secret)
    monkeypatch.setenv("ATTNZOO_TRACEBACK", "1")
    try:
        try:
            raise LookupError(said)
        except LookupError as cause:
            raise RuntimeError(said) from cause
    except RuntimeError as error:
        code, line = explain(error)
    err = capfd.readouterr().err
    assert code == 1 and err.count("Traceback (most recent call last):") == 2
    assert "raise LookupError(said)\nLookupError: " in err and "***" in err and "***" in line
    for part in LEFT:
        assert part not in err and part not in line


BROKEN = f"""
import sys, threading
import attnzoo.cli as cli

class Gone:
    def __del__(self):
        raise OSError("closed by {SECRET}")

def thread():
    raise LookupError("read by {SECRET}")

def report(error):
    Gone()
    other = threading.Thread(target=thread, name="reader")
    other.start()
    other.join()
    silent = threading.Thread(target=sys.exit)
    silent.start()
    silent.join()
    raise MemoryError("said by {SECRET}") from error

cli.report = report
sys.exit(cli.main())
"""


def test_what_nobody_catches_says_no_secret(tmp_path: Path) -> None:
    """In the main thread, in another one, and where an exception can only be printed."""
    (tmp_path / "broken_zoo.py").write_text(BROKEN)
    ended = subprocess.run(
        [sys.executable, "-m", "broken_zoo", "nothing"],
        cwd=tmp_path,
        env=os.environ
        | {"ZOO_API_KEY": SECRET, "PYTHONPATH": os.pathsep.join(["", *filter(None, sys.path)])},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 1 and SECRET not in ended.stdout + ended.stderr
    for line in (
        "OSError: closed by ***",
        "Exception in thread reader:",
        "LookupError: read by ***",
        "MemoryError: said by ***",
    ):
        assert ended.stderr.splitlines().count(line) == 1, ended.stderr
    assert ended.stderr.count("Exception in thread ") == 1  # one that only ends is no error
    assert ', in thread\n    raise LookupError("read by ***")\n' in ended.stderr


def breaks(where: str, arguments: list[str]) -> None:
    """`attnzoo`, with a bug whose message holds the secret, in a data worker or in rank 1."""
    from attnzoo.train import batches

    def fails(*args: object) -> None:
        raise LookupError(f"asked https://{SECRET}@host and {SECRET}")

    if where == "worker":
        batches.collate = fails
    elif os.environ["RANK"] == "1":
        LanguageModule.training_step = fails
    sys.exit(main([*arguments, "--traceback"]))


@pytest.mark.multi
def test_a_data_worker_says_no_secret(tmp_path: Path) -> None:
    arguments = ["train", *overrides(tmp_path, "data.num_workers=1", f"hydra.run.dir={tmp_path / 'run'}")]
    ended = run_child(breaks, "worker", arguments, env={"ZOO_API_KEY": SECRET}, cwd=tmp_path)
    assert ended.returncode == 1 and "LookupError: asked https://***@host and ***" in ended.stderr, ended
    assert "Caught LookupError in DataLoader worker process 0" in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("error: step 1: data worker 0: LookupError: asked ")
    assert not said_in(tmp_path, ended.stdout, ended.stderr)


@pytest.mark.multi
@pytest.mark.slow
def test_no_rank_says_a_secret(tmp_path: Path) -> None:
    options = (
        "launcher.devices=2",
        "launcher.strategy=ddp",
        "launcher.accelerator=cpu",
        "launcher.timeout=6",
    )
    arguments = ["train", *overrides(tmp_path, *options, f"hydra.run.dir={tmp_path / 'run'}")]
    ranks = start_ranks(breaks, "rank", arguments, env={"ZOO_API_KEY": SECRET}, cwd=tmp_path)
    for end in [rank.wait() for rank in ranks]:
        assert end.returncode == 1 and "asked https://***@host and ***" in end.stderr, end
        assert "Traceback (most recent call last):" in end.stderr
        assert not said_in(tmp_path, end.stdout, end.stderr)


def said_in(folder: Path, *texts: str) -> list[str]:
    """Where the secret is: files of a folder, and texts."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    found = [path.name for path in files if SECRET.encode() in path.read_bytes()]
    return found + [text for text in texts if SECRET in text]


def test_a_run_folder_from_elsewhere_gets_nothing_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZOO_API_KEY", SECRET)
    train(tmp_path, "trainer.max_steps=1")
    file = tmp_path / "run" / "config.yaml"
    file.write_text(file.read_text().replace("seed: 1", "seed: 1\nleak: ${oc.env:ZOO_API_KEY}"))
    assert SECRET not in json.dumps(_config(file))


def test_temporary_files_are_private(tmp_path: Path) -> None:
    seen = []

    def write(file: object) -> None:
        (path,) = tmp_path.glob(".x.json.*.tmp")
        seen.append((path.name, stat.S_IMODE(path.stat().st_mode)))
        file.write(b"{}")

    for mode, final in ((0o755, 0o644), (0o700, 0o600)):
        tmp_path.chmod(mode)
        write_atomic(tmp_path / "x.json", write)
        assert stat.S_IMODE((tmp_path / "x.json").stat().st_mode) == final
    assert [mode for _, mode in seen] == [0o600, 0o600] and seen[0][0] != seen[1][0]

"""The commands as a user types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import attnzoo
from attnzoo import registry
from attnzoo.attention.draft import Draft
from attnzoo.cli import main
from attnzoo.cli.overrides import order
from attnzoo.cli.train import config_folder
from runs import overrides, train

HEAVY = ("lightning", "hydra", "omegaconf", "datasets", "transformers", "triton", "rich", "wandb")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, its cache and a finished run."""
    folder = tmp_path_factory.mktemp("made")
    train(folder, "trainer.max_steps=1")
    return folder


def shell(*arguments: str, cwd: Path, program: str = "sys.exit(main())") -> subprocess.CompletedProcess:
    """`attnzoo` in a process of its own."""
    command = [sys.executable, "-c", f"import sys; from attnzoo.cli import main; {program}", *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_list_and_show_load_nothing_heavy(tmp_path: Path) -> None:
    look = f"print([name for name in {HEAVY} if name in sys.modules])"
    done = shell(cwd=tmp_path, program=f"main(['list']); main(['show', 'mla']); {look}")
    assert done.stdout.splitlines()[-1] == "[]"


def test_list_filters(capsys: pytest.CaptureFixture) -> None:
    assert main(["list", "m?a"]) == 0
    found = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert found == ["mfa", "mha", "mla", "mqa"]
    assert main(["list", "--family", "sparse"]) == 0
    assert all(" sparse " in line for line in capsys.readouterr().out.splitlines())


@pytest.mark.parametrize("name", ["mla", "gated_deltanet"])
def test_show_compares_with_mha(name: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["show", name, "--dim", "64", "--num-heads", "4", "--seq-len", "100"]) == 0
    out = capsys.readouterr().out
    card = attnzoo.card(name)
    assert card.title in out and card.arxiv in out and registry.equations(name) in out
    assert all(option in out for option in card.defaults)
    rows = {line.rsplit(maxsplit=2)[0].strip(): line.split()[-2:] for line in out.splitlines()[-6:]}
    costs = [attnzoo.create(variant, 64, 4).cost(100) for variant in (name, "mha")]
    for title, field in (
        ("parameters", "params"),
        ("cache bytes/token", "cache_bytes_per_token"),
        ("forward FLOPs/token", "forward_flops"),
        ("state bytes", "state_bytes"),
    ):
        assert rows[title] == [f"{getattr(cost, field):,.0f}" for cost in costs]


def test_doctor_names_every_implementation(capsys: pytest.CaptureFixture) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in attnzoo.list_variants():
        mixer = attnzoo.create(name, 64, 4)
        assert any(line.split()[:2] == [name, mixer.impl] and mixer.impl_reason in line for line in lines)
    assert any(line.startswith("torch ") for line in lines)


def test_generate_continues_prompts_of_unequal_length(made: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["generate", str(made / "run"), "--max-new-tokens", "5", "--seed", "1"]
    assert main([*command, "--prompt", "def a", "--prompt", "", "--top-k", "5", "--top-p", "0.9"]) == 0
    both = capsys.readouterr().out
    first, second = both.split(f"\n{'-' * 40}\n")
    assert first.startswith("def a") and len(second) >= 1
    assert main([*command, "--prompt", "def a", "--temperature", "0"]) == 0
    likeliest = capsys.readouterr().out
    assert main([*command, "--prompt", "def a", "--temperature", "0", "--stop", likeliest[5]]) == 0
    assert capsys.readouterr().out == "def a\n"
    assert main([*command, "--prompt", "x", "--temperature", "-1"]) == 2
    assert "temperature" in capsys.readouterr().err


def test_train_from_the_shell(made: Path, tmp_path: Path) -> None:
    options = overrides(
        made, "attention=kha", "attention.window=8", "trainer.sample_tokens=9", "trainer.val_every=2"
    )
    done = shell("train", *options, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("kha · ")
    assert [line.split(" · ")[0] for line in lines if line.startswith("step")] == [
        "step 1/4",
        "step 2/4",
        "step 4/4",
    ]
    assert "bits/byte" in done.stdout and "tokens/s" in done.stdout and "left" in done.stdout
    assert "bits per byte" in done.stdout and "sample: def " in done.stdout
    folder = tmp_path / lines[-1].removeprefix("run folder: ")
    assert json.loads((folder / "summary.json").read_text())["status"] == "completed"
    assert "window: 8" in (folder / "config.yaml").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"] and folder.parent == tmp_path / "runs"


def test_a_terminal_gets_a_bar(
    made: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["train", *overrides(made, f"hydra.run.dir={made / 'bar'}", "trainer.val_every=2")]) == 0
    out = capsys.readouterr().out
    assert "━" in out and "100%" in out and "step 4/4 · loss" in out and "tokens/s" in out
    assert out.count("validation ") == 2  # above the bar, one line each


def test_multirun(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = ("trainer.max_steps=1", "attention=gqa", "attention.num_kv_heads=1,3", "hydra.sweep.dir=sweep")
    assert main(["train", *overrides(made, *sweep), "-m"]) == 2
    err = capfd.readouterr().err
    assert err.startswith("error: num_kv_heads") and err.count("\n") == 1
    summaries = [json.loads(path.read_text()) for path in tmp_path.glob("sweep/*/summary.json")]
    assert [summary["status"] for summary in summaries] == ["completed"]
    assert sorted(path.name for path in (tmp_path / "sweep").iterdir()) == ["0-gqa-s1", "multirun.yaml"]


def test_cfg_shows_the_composition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "attention=moh", "attention.add=[kha]", "--cfg", "job"]) == 0
    out = capfd.readouterr().out
    assert "name: moh" in out and "add:" in out and "max_steps: null" in out and not list(tmp_path.iterdir())


def test_variants_of_other_packages_are_choices(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    attnzoo.list_variants()
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    monkeypatch.chdir(tmp_path)

    @attnzoo.register(attnzoo.Card("foreign", "Foreign", "test", "Changes nothing."))
    def foreign(draft: Draft, *, strength: float = 1.0) -> None:
        assert strength == 2.0

    options = overrides(made, "attention=foreign", "attention.strength=2", "hydra.run.dir=out")
    assert main(["train", *options]) == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["variant"] == "foreign"


def test_arguments_are_put_in_order() -> None:
    assert order(["a=1", "-m", "attention.x=1,2", "~b", "--cfg", "job", "attention=mha"]) == [
        "-m",
        "--cfg",
        "job",
        "a=1",
        "++attention.x=1,2",
        "~b",
        "attention=mha",
    ]


def test_the_tree_is_where_the_wheel_puts_it() -> None:
    assert (config_folder() / "config.yaml").is_file()

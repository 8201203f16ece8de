"""What Hydra builds by itself is what the user has allowed; what it writes by itself holds no secret."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from attnzoo.cli import main
from attnzoo.secure import VARIABLE
from runs import overrides

EVIL = """\
import logging
import pathlib
from hydra.experimental.callback import Callback
from hydra._internal.core_plugins.basic_launcher import BasicLauncher
pathlib.Path("imported").touch()

def run(*args, **more):
    pathlib.Path("built").touch()

class Inner:
    def __init__(self):
        run()

class Mine(Callback):
    def __init__(self, inner=None):
        pathlib.Path("mine").write_text(type(inner).__name__)

class Handler(logging.StreamHandler):
    def __init__(self):
        super().__init__(stream=open("mine", "w"))
"""
NODE = {"_target_": "evil_zoo.run"}
RULE = "is not inside hydra._internal.core_plugins; add its package by allow_targets=[...]"
LOGS = {"version": 1, "root": {"handlers": ["x"]}}
# the hydra node of a configuration, what it gets, and of which field
REFUSED = [
    ({"launcher": NODE}, "launcher._target_", RULE),
    ({"sweeper": NODE}, "sweeper._target_", RULE),
    ({"sweeper": {"params": {"seed": NODE}}}, "sweeper.params.seed._target_", "what the user allows"),
    ({"sweeper": {"params": {"seed": [{"a": NODE}]}}}, "sweeper.params.seed[0].a._target_", "user allows"),
    ({"callbacks": {"x": NODE}}, "callbacks.x._target_", RULE),
    ({"callbacks": {"x": {"_target_": "torch.hub.load"}}}, "callbacks.x._target_", RULE),
    ({"callbacks": {"x": {"_target_": "pathlib.Path.touch"}}}, "callbacks.x._target_", RULE),
    ({"callbacks": {"x": {"_target_": ["evil_zoo", "run"]}}}, "callbacks.x", "must name a class"),
    ({"callbacks": {"x": {"command": "id"}}}, "callbacks.x", "must name a class"),
    ({"callbacks": {"x": "${evil}"}}, "callbacks.x", "write it without ${...}"),
    ({"callbacks": "${evil}"}, "callbacks", "write it without ${...}"),
    ({"launcher": {"_target_": "${evil._target_}"}}, "launcher._target_", "write it without ${...}"),
    ({"launcher": {"_target_": "evil_zoo.${name}"}}, "launcher._target_", "write it without ${...}"),
    ({"sweeper": {"params": {"seed": "${evil}"}}}, "sweeper.params.seed", "write it without ${...}"),
    ({"sweeper": {"params": {"a": "${hydra.job.env_set}"}}}, "sweeper.params.a", "write it without"),
    ({"job": {"env_set": {VARIABLE: "evil_zoo"}}}, f"job.env_set.{VARIABLE}", "set it in the environment"),
    ({"job": {"env_set": {"PYTHONPATH": "from"}}}, "job.env_set.PYTHONPATH", "set it in the environment"),
    ({"job": {"env_set": {"A_TOKEN": "xyz"}}}, "job.env_set.A_TOKEN", "got '***'"),
    ({"job": {"env_set": "${evil}"}}, "job.env_set", "write it without ${...}"),
    ({"launcher": {"_target_": "hydra_plugins.evil_zoo.run"}}, "launcher._target_", RULE),
    ({"callbacks": "${oc.create:{x:{_target_:evil_zoo.run}}}"}, "callbacks", "write it without"),
    ({"callbacks": {"x": {"_target_": "${oc.env:HOME}"}}}, "callbacks.x._target_", "write it without"),
    ({"job_logging": "${oc.create:{version:1}}"}, "job_logging", "write it without ${...}"),
    ({"hydra_logging": LOGS | {"filters": {"x": {"()": "evil_zoo.run"}}}}, "hydra_logging.filters.x.()", ""),
    *(
        ({"job_logging": LOGS | {kind: {"x": {key: target}}}}, f"job_logging.{kind}.x.{key}", rule)
        for kind, key, target, rule in (
            ("handlers", "()", "evil_zoo.run", "logging.Filter; add its package by allow_targets=[...]"),
            ("handlers", "class", "evil_zoo.run", "is not inside logging.StreamHandler, "),
            ("handlers", "class", "logging.config.fileConfig", "is not inside logging.StreamHandler, "),
            ("handlers", "class", "logging.handlers.SMTPHandler", "is not inside logging.StreamHandler, "),
            ("handlers", "class", "logging.os.system", "is not inside logging.StreamHandler, "),
            ("handlers", "filename", "run.log", "NAME.log only"),
            ("handlers", "filename", "${hydra.runtime.output_dir}/../x.log", "NAME.log only"),
            ("handlers", "filename", "${hydra.runtime.output_dir}/config.yaml", "NAME.log only"),
            ("handlers", "filename", "${hydra.runtime.output_dir}/${hydra.job.num}/../../x.log", "NAME.log"),
            ("handlers", "queue", "evil_zoo.run", "is not inside logging"),
            ("handlers", "class", "${name}", "write it without ${...}"),
            ("handlers", "stream", "ext://evil_zoo.run", "must be ext://sys.stdout or ext://sys.stderr"),
            ("handlers", "stream", "${name}", "write it without ${...}"),
            ("handlers", "stream", "ext${name}", "write it without ${...}"),
            ("handlers", "stream", "ext:/${name}", "write it without ${...}"),
            ("formatters", "()", "evil_zoo.run", "is not inside logging"),
            ("formatters", "class", "evil_zoo.run", "is not inside logging"),
            ("filters", "()", "evil_zoo.run", "is not inside logging"),
        )
    ),
    (
        {
            "job_logging": LOGS
            | {"handlers": {"x": {"()": "logging.FileHandler", ".": {"baseFilename": "/x"}}}}
        },
        "job_logging.handlers.x...baseFilename",
        "NAME.log only",
    ),
    ({"job": {"name": "../../run"}}, "job.name", "must be no path in a file"),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder whose module tells when it is imported, and logging as it was, afterwards."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "evil_zoo.py").write_text(EVIL)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(VARIABLE, raising=False)
    root, known = logging.getLogger(), logging.Logger.manager.loggerDict
    level, handlers = root.level, root.handlers[:]
    yield tmp_path
    root.setLevel(level)
    root.handlers[:] = handlers
    logging.getLogger("hydra").setLevel(logging.NOTSET)
    for logger in known.values():
        logger.disabled = False
    sys.modules.pop("evil_zoo", None)


def trains(folder: Path, content: dict, *more: str) -> int:
    """`attnzoo train` with a folder of configurations from elsewhere, for one step."""
    (folder / "from" / "experiment").mkdir(parents=True, exist_ok=True)
    text = "# @package _global_\n" + json.dumps({"evil": NODE, "name": "run"} | content)  # which is YAML
    (folder / "from" / "experiment" / "evil.yaml").write_text(text)
    short = ("trainer.max_steps=1", "trainer.decode_tokens=0", "hydra.run.dir=run", "hydra.sweep.dir=runs")
    return main(["train", "--config-dir", "from", *overrides(folder, *short), "experiment=evil", *more])


@pytest.mark.parametrize(("content", "field", "rule"), REFUSED)
def test_a_folder_builds_nothing(
    content: dict, field: str, rule: str, here: Path, capfd: pytest.CaptureFixture
) -> None:
    for more in ((), ("-m",)):
        assert trains(here, {"hydra": content}, *more) == 2
        err = capfd.readouterr().err
        assert err.startswith(f"error: hydra.{field}: ") and rule in err and err.count("\n") == 1, err
    assert {path.name for path in here.iterdir()} <= {"from", "modules", "text"}  # not so much as imported
    assert "evil_zoo" not in sys.modules


@pytest.mark.parametrize(
    "given",
    [
        ["hydra.launcher=${evil}", "++evil.x=1"],
        ["hydra.launcher._target_=evil_zoo.run"],
        ["hydra.sweeper._target_=evil_zoo.run"],
        ["+hydra.callbacks.x._target_=evil_zoo.run"],
        ["+hydra.callbacks.x={_target_:evil_zoo.run}"],
        ["hydra.callbacks=${evil}", "++evil.x._target_=evil_zoo.run"],
        ["++hydra.job_logging.handlers.x.class=evil_zoo.run"],
        ["+hydra.new._target_=evil_zoo.run"],
    ],
)
def test_a_command_line_builds_nothing(given: list[str], here: Path, capfd: pytest.CaptureFixture) -> None:
    for more in (overrides(here), [*overrides(here), "-m"], ["--help"], ["--hydra-help"], ["--cfg", "job"]):
        assert main(["train", *given, *more]) == 2
        err = capfd.readouterr().err
        assert err.startswith("error: hydra.") and err.count("\n") == 1, err
    assert {path.name for path in here.iterdir()} <= {"modules", "text"} and "evil_zoo" not in sys.modules


def test_what_the_user_adds_is_built(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    own = {"callbacks": {"x": {"_target_": "evil_zoo.Mine", "inner": {"_target_": "evil_zoo.Inner"}}}}
    assert trains(here, {"hydra": own}) == 2 and "evil_zoo" not in sys.modules
    assert trains(here, {"hydra": own}, "allow_targets=[evil_zoo]") == 0
    assert (here / "mine").read_text() == "Inner" and (here / "built").exists()
    (here / "mine").unlink()
    logs = LOGS | {"handlers": {"x": {"class": "evil_zoo.Handler"}}}
    monkeypatch.setenv(VARIABLE, "evil_zoo")
    assert trains(here, {"hydra": {"job_logging": logs}}, "hydra.run.dir=run2") == 0
    assert (here / "mine").exists()
    capfd.readouterr()
    # what is allowed must still be a class of the right kind
    for target, rule in (("evil_zoo.run", "is no class of"), ("evil_zoo.Inner", "must be a Callback")):
        assert trains(here, {"hydra": {"callbacks": {"x": {"_target_": target}}}}) == 2
        assert rule in capfd.readouterr().err
    assert trains(here, {"hydra": {"launcher": {"_target_": "evil_zoo.Mine"}}}, "-m") == 2
    assert "hydra.launcher._target_: must be a Launcher" in capfd.readouterr().err


SEARCHES = [
    ["hydra.searchpath=[pkg://evil_zoo]"],
    ["hydra.searchpath=['pkg://evil_zoo/configs/']"],
    ["hydra.searchpath=[structured://evil_zoo]"],
    ["hydra.searchpath=['file://from','pkg://evil_zoo']"],
    ["hydra.searchpath=[pkg://evil_zoo]", "allow_targets=[evil_zoo.inner,evil]"],
    ["hydra.searchpath=[pkg://evil_zoo]", "allow_targets=[evil_zoo]", "allow_targets=[]"],
    ["--config-path", "pkg://evil_zoo"],
    ["-cp=pkg://evil_zoo"],
    ["--config-path", "../../evil_zoo"],  # of the package that the command is in
    ["--config-dir", "from", "--config-name", "named"],
    ["--config-dir", "from", "--config-name", "referring", "allow_targets=${allow_targets_of_file}"],
    ["--config-dir", "from", "-cn", "allowing"],
]


@pytest.mark.parametrize("given", SEARCHES)
def test_no_package_is_imported_for_its_configurations(
    given: list[str], here: Path, capfd: pytest.CaptureFixture
) -> None:
    searches = {"name": "evil_zoo", "hydra": {"searchpath": ["pkg://evil_zoo"]}}
    (here / "from").mkdir()
    for name, more in (
        ("named", {}),
        ("referring", {"hydra": {"searchpath": ["pkg://${name}"]}, "allow_targets_of_file": ["evil_zoo"]}),
        ("allowing", {"allow_targets": ["evil_zoo"]}),
    ):
        content = {"defaults": ["config", "_self_"]} | searches | more
        (here / "from" / f"{name}.yaml").write_text(json.dumps(content))
    before = {path.name for path in here.iterdir()}
    for more in ([], ["--cfg", "job"], ["--info", "searchpath"]):
        assert main(["train", *given, *more]) == 2
        err = capfd.readouterr().err
        assert err.startswith(("error: hydra.searchpath: ", "error: --config-path: ")), err
        assert "evil_zoo" in err and "' is not inside attnzoo, " in err and err.count("\n") == 1, err
    assert {path.name for path in here.iterdir()} == before and "evil_zoo" not in sys.modules


COMMANDS = [  # and what each says
    (["train", "--dry-run"], "'evil_zoo' is not inside attnzoo, "),
    (["plan"], "'evil_zoo' is not inside attnzoo, "),
    (["tokenize", "out"], "'evil_zoo' is not inside attnzoo, "),
    (["sweep"], "a sweep sets it for each of its cells"),
    (["compare", "attention=mha,mla"], "a sweep sets it for each of its cells"),
]


@pytest.mark.parametrize(("command", "rule"), COMMANDS)
def test_no_command_imports_one(
    command: list[str], rule: str, here: Path, capfd: pytest.CaptureFixture
) -> None:
    assert main([*command, "hydra.searchpath=[pkg://evil_zoo]"]) == 2
    err = capfd.readouterr().err
    assert err.startswith(f"error: hydra.searchpath: {rule}") and err.count("\n") == 1, err
    assert {path.name for path in here.iterdir()} == {"modules"} and "evil_zoo" not in sys.modules


def test_what_may_be_searched(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Folders, packages of ours, and those that the user adds."""
    packages = here / "modules" / "mine_zoo"
    for folder in (here / "from", packages):
        (folder / "experiment").mkdir(parents=True)
        (folder / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 77\n")
    (packages / "__init__.py").write_text("")

    def shows(path: str, *more: str) -> bool:
        given = [f"hydra.searchpath=['{path}']", "experiment=mine", *more]
        code = main(["train", *given, "--cfg", "job"])
        return code == 0 and "seed: 77" in capfd.readouterr().out

    for path in (f"file://{here / 'from'}", str(here / "from"), "from"):
        assert shows(path)
    assert main(["train", "hydra.searchpath=[pkg://attnzoo.cli]", "--cfg", "job"]) == 0
    assert not shows("pkg://mine_zoo")
    assert shows("pkg://mine_zoo", "allow_targets=[other,mine_zoo]")
    monkeypatch.setenv(VARIABLE, "mine_zoo")
    assert shows("pkg://mine_zoo") and shows("pkg://mine_zoo/")
    sys.modules.pop("mine_zoo", None)


def test_no_command_lets_a_file_allow_itself(here: Path, capfd: pytest.CaptureFixture) -> None:
    (here / "from" / "experiment").mkdir(parents=True)
    content = {"allow_targets": ["evil_zoo"], "callbacks": {"x": {"_target_": "evil_zoo.Mine"}}}
    (here / "from" / "experiment" / "evil.yaml").write_text("# @package _global_\n" + json.dumps(content))
    for command in (["train", "--dry-run"], ["plan"]):
        given = overrides(here, f"hydra.searchpath=['file://{here / 'from'}']", "experiment=evil")
        assert main([*command, *given]) == 2
        assert capfd.readouterr().err.startswith("error: allow_targets: is for the command line")
        assert "evil_zoo" not in sys.modules


def test_a_file_allows_itself_nothing(here: Path, capfd: pytest.CaptureFixture) -> None:
    """Neither for Hydra's own node nor for the run's callbacks."""
    own = {"callbacks": {"x": {"_target_": "evil_zoo.Mine"}}}
    for content in ({"hydra": own}, own, {"allow": ["evil_zoo"]}):
        given = "${allow}" if "allow" in content else ["evil_zoo"]
        assert trains(here, content | {"allow_targets": given}) == 2
        err = capfd.readouterr().err
        assert err.startswith("error: allow_targets: is for the command line or ATTNZOO_ALLOW_TARGETS to say")
        assert err.count("\n") == 1 and "evil_zoo" not in sys.modules
    assert trains(here, {"allow_targets": []}) == 0


@pytest.mark.parametrize(
    "given",
    [
        ("hydra/job_logging=default",),
        ("hydra/job_logging=stdout", "hydra/hydra_logging=hydra_debug"),
        ("hydra/job_logging=disabled", "hydra/hydra_logging=disabled"),
        ("hydra/hydra_logging=default", "-m", "seed=2,3", "hydra.sweeper.max_batch_size=1"),
        ("hydra/launcher=basic", "hydra/sweeper=basic", "-m"),
        ("+hydra.job.env_set.ZOO=1", "hydra.job.env_copy=[HOME]", "hydra.output_subdir=.hydra"),
    ],
)
def test_hydras_own_goes_through(given: tuple[str, ...], here: Path, capfd: pytest.CaptureFixture) -> None:
    assert trains(here, {}, *given) == 0, capfd.readouterr().err


def test_no_pickle_is_read(here: Path, capfd: pytest.CaptureFixture) -> None:
    for flag in ("--experimental-rerun", "--experimental-rerun=x.pickle", "--exp"):
        assert main(["train", flag, "x.pickle"]) == 2
        err = capfd.readouterr().err
        assert "no such flag of attnzoo train" in err and err.count("\n") == 1


@pytest.mark.parametrize("full", [None, "1"])
def test_hydra_prints_no_command_line(
    full: str | None, here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """Its own words for a job that failed hold all of it, whatever HYDRA_FULL_ERROR is."""
    if full:
        monkeypatch.setenv("HYDRA_FULL_ERROR", full)
    wrong = ("+logger.x.api_key=abcdefgh", "run_dir=${nope}")
    assert main(["train", *overrides(here), *wrong]) == 2
    said = "".join(capfd.readouterr())
    assert said == "error: Interpolation key 'nope' not found; full_key: run_dir\n"


def test_the_file_of_a_multirun_keeps_no_secret(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("ZOO_API_KEY", "abcdefgh")
    for wrong in ("+logger.x.api_key=xyz", "trainer.sample_prompt=abcdefgh", "+logger.x.api_key=xyz,uvw"):
        for more in ("-m", "hydra.mode=MULTIRUN"):
            assert trains(here, {}, wrong, more) == 2
            err = capfd.readouterr().err
            key = wrong.partition("=")[0].lstrip("+")
            assert err.startswith(f"error: {key}: holds a secret") and err.count("\n") == 1, err
            assert "abcdefgh" not in err and "xyz" not in err and not (here / "runs").exists()
    for more in ("-m", "hydra.output_subdir=.hydra"):  # which Hydra fills with all of it, too
        assert trains(here, {}, "+hydra.job.env_set.A_TOKEN=xyz", more) == 2
        assert capfd.readouterr().err.startswith("error: hydra.job.env_set.A_TOKEN: holds a secret")
        assert not (here / "runs").exists() and not (here / "run").exists()
    assert trains(here, {}, "trainer.sample_prompt=${oc.env:ZOO_API_KEY}", "-m") == 0
    assert "${oc.env:ZOO_API_KEY}" in (here / "runs" / "multirun.yaml").read_text()
    written = [path for path in (here / "runs").rglob("*") if path.is_file()]
    assert not [path.name for path in written if b"abcdefgh" in path.read_bytes()]

"""Several processes of one run: who they are told to be, by torchrun, srun or over ssh."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from attnzoo.cli import main
from attnzoo.cluster import run as cluster_run
from attnzoo.cluster.jobs import AGAIN, REQUEUE, _executor, queued
from attnzoo.cluster.ranks import Place, first_host, from_slurm, join, launcher_here, place, quoted
from attnzoo.cluster.run import RunTask
from attnzoo.cluster.settings import read_slurm
from attnzoo.cluster.task import PASSED, STOPPED, Task
from attnzoo.parallel.layout import LauncherSettings
from attnzoo.train.guard import RunFailed
from children import Child, free_port, run_child, until
from runs import overrides, train

SCRIPTS = Path(__file__).parents[1] / "scripts" / "cluster"
RANK = {"TORCHELASTIC_RUN_ID": "x", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
TASK = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
LAUNCHER = {"accelerator": "gpu", "devices": 1, "num_nodes": 1, "strategy": "auto"}


def test_a_rank_knows_its_place() -> None:
    assert place({}) is None and place(RANK) == Place(5, 8, 4)
    for wrong in ({"RANK": ""}, {"RANK": "8"}, {"LOCAL_WORLD_SIZE": "3"}, {"WORLD_SIZE": "many"}):
        with pytest.raises(ValueError, match=r"^torchrun: "):
            place(RANK | wrong)


def test_the_environment_says_how_many_ranks_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launcher_here(LAUNCHER | {"slurm": {}}) == LAUNCHER
    for key, value in RANK.items():
        monkeypatch.setenv(key, value)
    for devices in (1, 4, "auto", -1):
        assert launcher_here(LAUNCHER | {"devices": devices}) == LAUNCHER | {"devices": 4, "num_nodes": 2}
    with pytest.raises(
        ValueError, match=r"launcher\.devices: .* 4 processes on this node, got 3; leave it out"
    ):
        launcher_here(LAUNCHER | {"devices": 3})
    with pytest.raises(ValueError, match=r"launcher\.num_nodes: .* 2 nodes, got 4"):
        launcher_here(LAUNCHER | {"num_nodes": 4})


def test_a_task_of_srun_is_a_rank_and_a_batch_script_is_none() -> None:
    joined = dict(TASK)
    join(joined)
    assert place(joined) == Place(3, 4, 2) and joined["MASTER_ADDR"] == "gpu03"
    assert (joined["LOCAL_RANK"], joined["GROUP_RANK"]) == ("1", "1")
    others = [from_slurm(TASK | change) for change in ({"SLURM_STEP_ID": "1"}, {"SLURM_JOB_ID": "8"})]
    assert len({joined["MASTER_PORT"], *(other["MASTER_PORT"] for other in others)}) == 3
    script = {key: value for key, value in TASK.items() if "STEP" not in key}
    join(script)
    assert place(script) is None and "SLURM_NTASKS" not in script
    torchrun = TASK | RANK
    join(torchrun)
    assert torchrun == TASK | RANK


@pytest.mark.parametrize(
    ("names", "first"),
    [("vm", "vm"), ("a,b", "a"), ("gpu[03-05,9],x", "gpu03"), ("n[7,9]-ib", "n7-ib"), ("r1n[1-2]", "r1n1")],
)
def test_the_first_host_of_a_list(names: str, first: str) -> None:
    assert first_host(names) == first


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"partitoin": "x"}, "did you mean partition"),
        ({"time": "1:00"}, "launcher.slurm.time: must be an integer of at least 1"),
        ({"requeue": -1}, "launcher.slurm.requeue"),
        ({"partition": "a\n#SBATCH --uid=0"}, "one line of text"),
        ({"setup": "module load cuda"}, "a list of texts"),
        ({"container_mounts": ["/a:/a"]}, "container_image"),
    ],
)
def test_wrong_settings_of_a_job(setting: dict, words: str) -> None:
    with pytest.raises(ValueError, match=r"launcher\.slurm") as caught:
        read_slurm(LAUNCHER | {"slurm": setting})
    assert words in str(caught.value)


def test_what_a_job_asks_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit.SlurmExecutor, "affinity", classmethod(lambda kind: 2))
    slurm = {"account": "a", "qos": "q", "constraint": "c", "requeue": 3, "command": "python3", "mem": 8}
    slurm |= {
        "container_image": "zoo.sqsh",
        "container_mounts": ["/a:/b", "/c:/d"],
        "setup": ["module load x"],
    }
    executor = _executor(tmp_path, "name", LAUNCHER | {"devices": 8, "num_nodes": 2, "slurm": slurm})
    script = executor._make_submission_file_text(executor._submitit_command_str, "uid")
    options = "nodes=2 ntasks-per-node=8 gpus-per-node=8 account=a qos=q constraint=c time=240 mem=8G requeue"
    for option in options.split():
        assert f"#SBATCH --{option}\n" in script
    assert "--container-image=zoo.sqsh --container-mounts=/a:/b,/c:/d python3 -u -m submitit" in script
    lines = script.splitlines()
    run = next(i for i, line in enumerate(lines) if line.startswith("srun "))
    assert lines.index("module load x") < run < lines.index("code=$?") and "-lt 3 ]" in script
    assert all(not line or line.startswith("#") for line in lines[run + 1 : lines.index("code=$?")])
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("launcher.devices=3",), "data.batch_size: must be a multiple of accumulate x ranks = 3, got 4"),
        (("launcher.devices=2", "launcher.tensor_parallel=2", "optim=muon"), "optim.name: muon needs whole"),
        (("launcher.devices=2", "launcher.tensor_parallel=4"), "must divide the 2 ranks"),
        (
            ("launcher.strategy=ddp_spawn",),
            "launcher.strategy: must be one of auto, ddp, fsdp, got 'ddp_sp",
        ),
        (("launcher.devices=foo",), "launcher.devices: must be "),
    ],
    ids=str,
)
@pytest.mark.parametrize("way", [(), ("--dry-run",), ("launcher=slurm",)], ids=["run", "dry-run", "slurm"])
def test_what_cannot_run_is_refused_before_it_is_queued(
    way: tuple[str, ...],
    options: tuple[str, ...],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    """In the words of the run itself; sbatch would be called if it were accepted."""
    monkeypatch.setattr("attnzoo.cluster.run.submit", None)
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "run"
    command = ["train", *way, *overrides(tmp_path, *options), f"hydra.run.dir={folder}"]
    assert main(command) == 2
    said = capfd.readouterr().err
    assert words in said and said.count("error: ") == 1 and not folder.exists(), said


@pytest.mark.parametrize(
    ("devices", "world"),
    [
        (2, 4),
        ("2", 4),
        ("0,1,5", 6),
        ([0, 3], 4),
        ("auto", 2),
        (-1, 2),
        (0, None),
        (True, None),
    ],
)
def test_the_ranks_of_a_run(devices: Any, world: int | None) -> None:
    """On two nodes without a GPU."""
    if world is None:
        with pytest.raises(ValueError, match=r"launcher\.devices: .*; give the processes of a node"):
            LauncherSettings(devices=devices, num_nodes=2)
        return
    assert LauncherSettings(accelerator="cpu", devices=devices, num_nodes=2).world == world


def test_a_job_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "it's"
    task = RunTask(str(folder), ["attention=mla", "init_from=x"])
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "slurm").mkdir()
    (folder / "config.yaml").touch()
    assert task.command()[3:] == ["attention=mla", "init_from=x", f"hydra.run.dir={quoted(str(folder))}"]
    assert [path.name for path in folder.iterdir()] == ["slurm"]  # what never got to a checkpoint is gone
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step-00000002.pt").touch()
    assert task.command()[-1] == f"hydra.run.dir={quoted(str(folder))}"  # killed before `last` named it
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step-00000002.pt").touch()
    (folder / "checkpoints" / "last").write_text("step-00000002.pt")
    assert task.command()[-2:] == [f"ckpt_path={quoted(str(folder))}", "init_from=null"]


def test_signals_and_codes_of_a_stopped_rank() -> None:
    assert {129, 130, 138, 143, -1, -2, -10, -15} == STOPPED
    assert {number.name: passed.name for number, passed in PASSED.items()} == {
        "SIGUSR1": "SIGUSR1",
        "SIGUSR2": "SIGUSR1",
        "SIGTERM": "SIGTERM",
    }


def test_a_multirun_has_no_ranks_and_a_run_here_nothing_to_wait_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *overrides(tmp_path), "--wait"]) == 2
    assert "--wait: is for launcher=slurm" in capfd.readouterr().err
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize(
    ("error", "code"),
    [(KeyboardInterrupt(), 130), (RunFailed("x"), 1), (OSError("x"), 1), (ValueError("x"), 2), (None, 0)],
)
def test_the_codes_of_a_command(
    error: BaseException | None, code: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    def command(arguments: list[str]) -> int:
        if error:
            raise error
        return 0

    monkeypatch.setattr("attnzoo.cli.sweep.sweep", command)
    assert main(["sweep"]) == code
    assert capfd.readouterr().err.count("error: ") == (code in (1, 2))


def test_a_signal_stops_the_jobs_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a multirun, whose code is that of the worst."""
    seen, codes = [], [2, 143, 0]

    def job(config: object) -> int:
        seen.append(config.seed)
        return codes[len(seen) - 1]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("attnzoo.cli.train._train_one", job)
    given = [*overrides(tmp_path), "hydra.sweep.dir=x", "-m", "seed=1,2,3"]
    assert main(["train", *given]) == 143 and seen == [1, 2]
    seen[:], codes[:] = [], [2, 0, 1]
    assert main(["train", *given]) == 2 and seen == [1, 2, 3]


class Rank(Task):
    """A task whose rank is a line of Python; ``early`` is a signal that comes before it starts."""

    def __init__(self, program: str, early: int = 0) -> None:
        self.program, self.early = program, early

    def command(self) -> list[str]:
        if self.early:
            os.kill(os.getpid(), self.early)
        return ["-c", f"import os, signal, sys, time; {self.program}"]


def runs_task(rank: int, *task: object) -> None:
    os.environ.update(TASK | {"SLURM_PROCID": str(rank)})
    print(Rank(*task)())


KILL = "os.kill(os.getpid(), signal.{})".format


@pytest.mark.multi
@pytest.mark.parametrize(
    ("program", "first", "other"),
    [
        ("sys.exit(0 if 'TORCHELASTIC_RUN_ID' in os.environ else 3)", 0, 0),
        ("sys.exit(1)", 1, 1),
        ("sys.exit(2)", 2, 2),
        *((f"sys.exit({code})", AGAIN, 0) for code in (130, 138, 143)),
        (KILL("SIGTERM"), AGAIN, 0),
        (KILL("SIGUSR1"), AGAIN, 0),
        (KILL("SIGUSR2"), 0, 0),  # SLURM's, to all processes
        (KILL("SIGKILL"), 128 + 9, 128 + 9),
    ],
)
def test_a_task_ends_as_its_rank(tmp_path: Path, program: str, first: int, other: int) -> None:
    for rank, code in ((0, first), (1, other)):
        ended = run_child(runs_task, rank, program, cwd=tmp_path)
        assert ended.returncode == code, ended
        assert code or f"rank {rank} ended with " in ended.stdout


@pytest.mark.multi
def test_a_task_passes_signals_on(tmp_path: Path) -> None:
    wait = "open('ready', 'w').close(); time.sleep(60)"
    known = "signal.signal(signal.SIGUSR1, lambda *a: sys.exit(5)); "
    known += "signal.signal(signal.SIGTERM, lambda *a: sys.exit(6)); "
    for number, code in ((signal.SIGUSR2, 5), (signal.SIGUSR1, 5), (signal.SIGTERM, 6)):
        child = Child(runs_task, 0, known + wait, cwd=tmp_path)
        until(lambda child=child: (tmp_path / "ready").exists() or not child.alive)
        child.kill(number)
        assert child.wait(50).returncode == code
        (tmp_path / "ready").unlink()
    # one that comes before there is a rank
    ended = run_child(runs_task, 0, "time.sleep(60)", signal.SIGTERM, timeout=50, cwd=tmp_path)
    assert ended.returncode == AGAIN, ended


def commands(folder: Path, **programs: str) -> str:
    """A PATH with stand-ins for SLURM's commands, which write down how they are called."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, line in programs.items():
        path = folder / "bin" / name
        path.write_text(f'#!/bin/bash\necho {name} "$@" >> {folder}/calls\n{line}\n')
        path.chmod(0o755)
    return f"{folder / 'bin'}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("code", "state", "more", "called", "says"),
    [
        (75, "RUNNING", {}, "requeue 7", ""),
        (75, "RUNNING", {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}, "requeue 7_3", ""),
        (75, "RUNNING", {"SLURM_RESTART_COUNT": "1"}, "requeue 7", ""),
        (75, "RUNNING", {"SLURM_RESTART_COUNT": "2"}, "", "launcher.slurm.requeue=2"),
        (75, "COMPLETING", {}, "", ""),  # it was cancelled
        (143, "RUNNING", {}, "", ""),
        (1, "RUNNING", {}, "", ""),
        (0, "RUNNING", {}, "", ""),
    ],
)
def test_a_job_is_requeued(code: int, state: str, more: dict, called: str, says: str, tmp_path: Path) -> None:
    path = commands(tmp_path, squeue=f"echo {state}", scontrol="true")
    done = subprocess.run(
        ["bash", "-c", f"(exit {code})\n{REQUEUE.format(again=AGAIN, times=2)}"],
        env={"PATH": path, "SLURM_JOB_ID": "7"} | more,
        capture_output=True,
        text=True,
    )
    calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
    assert [call for call in calls if call.startswith("scontrol")] == (
        [f"scontrol {called}"] if called else []
    )
    assert done.returncode == code and says in done.stdout and bool(says) == bool(done.stdout), done


def test_the_queue_as_far_as_it_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = "echo '7 RUNNING'; echo '8 COMPLETED'; echo '9_1 PENDING'; echo '10 RUNNING'"
    monkeypatch.setenv("PATH", commands(tmp_path, squeue=listed))
    assert queued(["7", "8", "9_1"]) == {"7": "RUNNING", "9_1": "PENDING"}
    (tmp_path / "calls").unlink()
    assert queued([]) == {} and not (tmp_path / "calls").exists()


@pytest.mark.parametrize(("status", "code"), [("completed", 0), ("stopped", 1), ("failed", 1), (None, 1)])
def test_a_job_is_followed_to_its_end(
    status: str | None,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    log, looks = tmp_path / "log", []

    def look(jobs: list[str]) -> dict[str, str]:
        looks.append(jobs)
        with log.open("a") as file:
            file.write(f"line {len(looks)}\n")
        return {"7": "RUNNING"} if len(looks) < 3 else {}

    if status:
        (tmp_path / "summary.json").write_text(json.dumps({"status": status}))
    monkeypatch.setattr(cluster_run, "queued", look)
    monkeypatch.setattr(cluster_run, "POLL", 0.0)
    assert cluster_run._follow("7", tmp_path, log) == code
    assert capfd.readouterr().out == "line 1\nline 2\nline 3\n"

    def interrupt(jobs: list[str]) -> dict[str, str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster_run, "queued", interrupt)
    assert cluster_run._follow("7", tmp_path, log) == 130
    assert "job 7 goes on" in capfd.readouterr().out


def torchrun(folder: Path, *options: str) -> subprocess.CompletedProcess:
    """Two ranks of `attnzoo train` on this machine."""
    start = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "attnzoo.cli",
        "train",
    ]
    return subprocess.run(
        [sys.executable, *start, *options],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.multi
@pytest.mark.slow
def test_torchrun_starts_one_run(tmp_path: Path) -> None:
    """Without hydra.run.dir the folder's name holds the time: rank 0's holds for both."""
    options = overrides(tmp_path, "data.isolate=true", "launcher.accelerator=cpu")
    done = torchrun(tmp_path, *options)
    assert done.returncode == 0, done.stderr
    for line in ("run folder: ", "validation: ", "step 4/4"):
        assert done.stdout.count(line) == 1, done.stdout
    (folder,) = (tmp_path / "runs").iterdir()
    assert json.loads((folder / "environment.json").read_text())["ranks"] == 2
    summary = json.loads((folder / "summary.json").read_text())
    _, alone = train(tmp_path, "data.isolate=true", name="alone")
    assert summary["val_bpb"] == pytest.approx(alone["val_bpb"], rel=1e-5)


@pytest.mark.multi
@pytest.mark.slow
@pytest.mark.parametrize("option", ["launcher.devices=3", "attention=mlla", "optim.lr=fast"])
def test_torchrun_reports_an_error_once(tmp_path: Path, option: str) -> None:
    done = torchrun(tmp_path, *overrides(tmp_path, "launcher.accelerator=cpu", option))
    assert done.returncode == 1, done.stderr  # torchrun's own
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and option.partition("=")[0] in lines[0], done.stderr
    assert "exitcode  : 2" in done.stderr  # that of the ranks


@pytest.mark.multi
@pytest.mark.slow
def test_a_list_of_hosts(tmp_path: Path) -> None:
    """`ssh` is a stand-in here that runs the command on this machine."""
    (tmp_path / "bin").mkdir()
    stand_in = tmp_path / "bin" / "ssh"
    stand_in.write_text(
        '#!/bin/bash\necho "$@" >> calls\n'
        'while [[ $1 == -* ]]; do [ "$1" = -o ] && shift; shift; done\nshift\nexec bash -c "$*"\n'
    )
    stand_in.chmod(0o755)
    (tmp_path / "hosts").write_text("# two\nlocalhost\nlocalhost  # again\n")
    paths = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": os.pathsep.join(sys.path)}
    options = overrides(tmp_path, "data.isolate=true", "launcher.accelerator=cpu", "hydra.run.dir=out put")
    command = ["bash", str(SCRIPTS / "hosts.sh"), "--port", str(free_port()), "hosts", *options]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | paths | {"PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "calls").read_text().splitlines()) == 2
    assert json.loads((tmp_path / "out put" / "environment.json").read_text())["ranks"] == 2


def test_a_list_of_hosts_can_be_looked_at_first(tmp_path: Path) -> None:
    def look(hosts: str, *options: str) -> subprocess.CompletedProcess:
        (tmp_path / "hosts").write_text(hosts)
        command = ["bash", str(SCRIPTS / "hosts.sh"), "--print", *options, "hosts", "attention=mla"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    shown = look("a\nme@b\n", "--gpus", "4").stdout.splitlines()
    assert [line.split()[2] for line in shown] == ["a", "me@b"]
    for part in ("--nnodes=2", "--nproc-per-node=4", "--rdzv-endpoint=a:29500", "attention=mla"):
        assert all(part in line for line in shown)
    for hosts, *options in (("-oProxyCommand=id\n",), ("\n",), ("a\n", "--gpus", "0"), ("a\n", "--colour")):
        assert look(hosts, *options).returncode == 2


@pytest.mark.parametrize("name", ["train.sbatch", "hosts.sh"])
def test_scripts_are_shell(name: str) -> None:
    subprocess.run(["bash", "-n", str(SCRIPTS / name)], check=True)

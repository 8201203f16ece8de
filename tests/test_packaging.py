"""What is shipped: the wheel's content and metadata, and that it works away from the source tree.

The wheel is built from a copy of the tree and installed into an environment of its own, without an index.
That environment sees the packages of the running one through a `.pth` file, but neither the tree nor an
editable install of it, since a `.pth` file inside a directory that another `.pth` file names is not read.
"""

from __future__ import annotations

import email
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
MALICIOUS = ("2.6.2", "2.6.3")
LIGHTNING = {"lightning", "pytorch-lightning"}
EXTRAS = {"train", "compare", "wandb", "triton", "xformers", "hf", "slurm", "dev", "all"}
HEAVY = {
    *("lightning", "pytorch_lightning", "hydra", "omegaconf", "datasets", "tokenizers", "transformers"),
    *("triton", "xformers", "wandb", "rich", "submitit", "scipy", "statsmodels", "plotly", "pandas"),
}


def run(command: list[str | Path], cwd: Path) -> str:
    """Standard output of a command in `cwd`, which must succeed, with the tree kept off its path."""
    hidden = {"PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP"}
    environment = {key: value for key, value in os.environ.items() if key not in hidden}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def needed(requirement: Requirement, extra: str = "") -> bool:
    """Whether the requirement holds on this machine, under one extra or none."""
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def closure(name: str) -> set[str]:
    """Names of a distribution and of all that it requires here, without extras."""
    found, todo = set(), [name]
    while todo:
        if (name := canonicalize_name(todo.pop())) not in found:
            found.add(name)
            required = map(Requirement, importlib.metadata.requires(name) or [])
            todo += [each.name for each in required if needed(each)]
    return found


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the tree as it is, built from a copy: an old build/ or egg-info cannot add to it."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    tree.mkdir()
    leftovers = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "kernels", "configs"):
        shutil.copytree(ROOT / name, tree / name, ignore=leftovers)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    run([sys.executable, "-m", "pip", "wheel", *options, tree], cwd=folder)
    (built,) = folder.glob("attnzoo-*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that holds the wheel and sees the running environment's packages."""
    folder = tmp_path_factory.mktemp("installed") / "env"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    options = ["--no-index", "--no-deps", "--quiet"]
    run([sys.executable, "-m", "pip", "--python", python, "install", *options, wheel], cwd=folder)
    (own,) = folder.glob("lib/python*/site-packages")
    seen = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (own / "pinned_dependencies.pth").write_text("".join(f"{path}\n" for path in sorted(seen)))
    return folder


@pytest.fixture(scope="session")
def requirements(installed: Path) -> list[Requirement]:
    """Every requirement in the installed package's metadata, of the core and of all extras."""
    (site,) = installed.glob("lib/python*/site-packages")
    (distribution,) = importlib.metadata.distributions(name="attnzoo", path=[str(site)])
    return [Requirement(line) for line in distribution.requires or []]


def test_the_wheel_holds_the_packages_the_configs_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sources = {ROOT / "src": "*.py", ROOT / "kernels": "*.py", ROOT / "configs": "*.yaml"}
    expected = {
        ("attnzoo/configs/" if base.name == "configs" else "") + path.relative_to(base).as_posix()
        for base, pattern in sources.items()
        for path in base.rglob(pattern)
    }
    assert any(name.startswith("attnzoo/configs/attention/") for name in expected)
    assert any(name.startswith("attnzoo_kernels/") for name in expected)
    shipped = {name for name in names if ".dist-info/" not in name and not name.endswith("/")}
    page = ROOT / "src" / "attnzoo" / "compare" / "page"
    data = [path for folder in ("assets", "templates") for path in (page / folder).iterdir()]
    assert len(data) > 5
    report = {path.relative_to(ROOT / "src").as_posix() for path in data}
    assert shipped == expected | report | {"attnzoo/py.typed"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_metadata_promise_torch_alone_and_the_documented_extras(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
        entry_points = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    core = [Requirement(line) for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert [(each.name, str(each.specifier)) for each in core] == [("torch", ">=2.10")]
    assert metadata["Requires-Python"] == ">=3.10"
    assert set(metadata.get_all("Provides-Extra")) == EXTRAS
    assert "attnzoo = attnzoo.cli:main" in entry_points


def test_no_range_accepts_the_malicious_lightning_releases(requirements: list[Requirement]) -> None:
    ranges = [each for each in requirements if canonicalize_name(each.name) in LIGHTNING]
    assert {canonicalize_name(each.name) for each in ranges} == LIGHTNING
    for each in ranges:
        assert each.url is None
        for version in MALICIOUS:
            for variant in (version, f"{version}.post1", f"{version}rc1", f"{version}+local"):
                assert not each.specifier.contains(variant, prereleases=True), f"{each} accepts {variant}"


def test_an_extra_that_brings_lightning_bounds_pytorch_lightning_too(requirements: list[Requirement]) -> None:
    """lightning asks for pytorch-lightning without bounds, so an extra that names one must name both."""
    for extra in EXTRAS:
        named = {canonicalize_name(each.name) for each in requirements if needed(each, extra)}
        assert named & LIGHTNING == (LIGHTNING if extra == "train" else set())


def test_the_constraints_pin_exact_and_safe_versions(requirements: list[Requirement]) -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for pin in pins:
        assert re.fullmatch(r"==[^*,]+", str(pin.specifier)), f"{pin} is not an exact version"
        if canonicalize_name(pin.name) in LIGHTNING:
            assert pin.marker is None, f"{pin}: a pin with a marker leaves some machines without it"
            assert not any(pin.specifier.contains(version) for version in MALICIOUS)
    versions = {pin.name: pin.specifier for pin in pins if pin.marker is None or pin.marker.evaluate()}
    assert versions.keys() >= LIGHTNING
    assert str(versions["torch"]) == "==2.13.0"
    for each in requirements:
        if each.name != "attnzoo":
            pinned = str(versions[canonicalize_name(each.name)]).removeprefix("==")
            assert each.specifier.contains(pinned), f"{each} does not accept the pinned {pinned}"


def test_the_import_is_light(installed: Path, tmp_path: Path) -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import attnzoo; print(attnzoo.__file__)\n"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    place, loaded = run([installed / "bin" / "python", "-c", code], cwd=tmp_path).splitlines()
    assert Path(place).is_relative_to(installed)
    assert not HEAVY & set(loaded.split())


def test_every_variant_works_with_torch_alone(wheel: Path, tmp_path: Path) -> None:
    """Only the wheel, torch and what torch itself requires are importable: as after a plain `pip install`."""
    packages = tmp_path / "packages"
    packages.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    for name in closure("torch"):
        files = importlib.metadata.distribution(name).files or []
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            (packages / top).symlink_to(Path(importlib.metadata.distribution(name).locate_file(top)))
    code = (
        f"import sys; sys.path.insert(0, {str(packages)!r})\n"
        "import attnzoo, torch\n"
        "for name in attnzoo.list_variants():\n"
        "    mixer = attnzoo.create(name, dim=32, num_heads=4)\n"
        "    assert mixer(torch.randn(1, 5, 32)).shape == (1, 5, 32), name\n"
        "model = attnzoo.create_model(dim=32, depth=1, num_heads=4)\n"
        "assert model(torch.zeros(1, 5, dtype=torch.long)).shape == (1, 5, 256)\n"
        f"found = {HEAVY!r} & {{name.partition('.')[0] for name in sys.modules}}\n"
        "assert not found, found\n"
    )
    run([sys.executable, "-I", "-S", "-c", code], cwd=tmp_path)


def test_the_installed_wheel_trains_from_an_empty_directory(installed: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 400)
    empty = tmp_path / "empty"
    empty.mkdir()
    tiny = ["model.dim=16", "model.depth=1", "model.num_heads=2", "data.seq_len=32", "data.batch_size=2"]
    where = ["data=text", f"data.path={text}", f"hydra.run.dir={tmp_path / 'out'}"]
    run([installed / "bin" / "attnzoo", "train", *tiny, *where, "trainer.max_steps=2"], cwd=empty)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["steps"] == 2
    assert summary["val_bpb"] > 0

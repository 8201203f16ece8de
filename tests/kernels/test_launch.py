"""The choice of implementation, the memory of tiles and the self-check."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from attnzoo_kernels import launch
from attnzoo_kernels.launch import Kernel, Tile, Tuner

CUDA = torch.device("cuda", 0)
KERNEL = Kernel("op_forward", None, (Tile({"BLOCK": 16}), Tile({"BLOCK": 32}), Tile({"BLOCK": 64})), {}, {})


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    """A made-up device on which the second tile is the fastest."""
    monkeypatch.setenv("ATTNZOO_CACHE", str(tmp_path))
    monkeypatch.setattr(launch, "chip", lambda device: "sm_90")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    import triton.testing

    times = {16: 3.0, 32: 1.0, 64: 2.0}
    monkeypatch.setattr(triton.testing, "do_bench", lambda run, **_: times[run()])


def size(tile: Tile) -> int:
    return tile.meta["BLOCK"]


def test_the_fastest_tile_is_kept_on_disk(gpu: None, tmp_path) -> None:
    assert size(Tuner().pick(KERNEL, 512, CUDA, size)) == 32
    (file,) = tmp_path.rglob("*.json")
    assert "Some-GPU" in file.name and sys.modules["triton"].__version__ in file.name
    assert json.loads(file.read_text()) == {"op_forward 512": KERNEL.tiles[1].name}
    again = Tuner().pick(KERNEL, 512, CUDA, lambda tile: pytest.fail("timed again"))
    assert size(again) == 32


def test_another_bucket_is_timed_on_its_own(gpu: None) -> None:
    tuner = Tuner()
    tuner.pick(KERNEL, 512, CUDA, size)
    timed = []
    tuner.pick(KERNEL, 1024, CUDA, lambda tile: timed.append(tile) or size(tile))
    assert len(timed) == 3


def test_deterministic_takes_the_first_tile(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse = lambda tile: pytest.fail("timed")  # noqa: E731
    assert size(Tuner(deterministic=True).pick(KERNEL, 512, CUDA, refuse)) == 16
    monkeypatch.setenv("ATTNZOO_TUNE", "0")
    assert size(Tuner().pick(KERNEL, 512, CUDA, refuse)) == 16
    monkeypatch.delenv("ATTNZOO_TUNE")
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert size(Tuner().pick(KERNEL, 512, CUDA, refuse)) == 16


def test_a_broken_or_stale_cache_is_tuned_again(gpu: None, tmp_path) -> None:
    Tuner().pick(KERNEL, 512, CUDA, size)
    (file,) = tmp_path.rglob("*.json")
    for text in ("{ cut", '{"op_forward 512": "gone"}'):
        file.write_text(text)
        assert size(Tuner().pick(KERNEL, 512, CUDA, size)) == 32


def test_only_tiles_of_the_chip_run(gpu: None) -> None:
    small = Kernel("op_forward", None, (Tile({"BLOCK": 32}, chips=("sm_80",)), Tile({"BLOCK": 16})), {}, {})
    assert size(Tuner().pick(small, 512, CUDA, size)) == 16
    none = Kernel("op_forward", None, (Tile({"BLOCK": 32}, chips=("sm_80",)),), {}, {})
    with pytest.raises(RuntimeError, match="no configuration fits sm_90; use impl='reference'"):
        Tuner().pick(none, 512, CUDA, size)


def test_a_failed_self_check_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(launch, "_checked", set())
    for _ in range(2):  # and again at the next call
        with pytest.raises(RuntimeError, match=r"off by 1.00e-01 on Some GPU.*use impl='reference'"):
            launch.self_check("op", CUDA, lambda device: (0.1, 0.01))
    with pytest.raises(RuntimeError, match="off by nan"):
        launch.self_check("op", CUDA, lambda device: (float("nan"), 0.01))
    calls = []
    for _ in range(2):
        launch.self_check("op", CUDA, lambda device: calls.append(device) or (0.001, 0.01))
    assert calls == [CUDA]


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2)
    assert launch.choose("op", "auto", x) == "reference"
    assert launch.choose("op", "reference", x, None) == "reference"
    with pytest.raises(ValueError, match="impl: needs one of auto, reference, triton, got 'fast'"):
        launch.choose("op", "fast", x)
    with pytest.raises(
        ValueError, match="'triton' cannot run op: the kernels work in fp32 and below, got float64"
    ):
        launch.choose("op", "triton", x.double())
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(
        ValueError, match="'triton' cannot run op: the kernels need a GPU, got tensors on cpu"
    ):
        launch.choose("op", "triton", x)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert launch.choose("op", "triton", x) == "triton"
    monkeypatch.setattr(launch, "has_triton", lambda: False)
    with pytest.raises(ValueError, match="triton is not installed"):
        launch.choose("op", "triton", x)


def test_ops_load_without_triton() -> None:
    import subprocess

    code = (
        "import sys; import attnzoo_kernels.launch, attnzoo_kernels.scan, attnzoo_kernels.span;"
        "assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

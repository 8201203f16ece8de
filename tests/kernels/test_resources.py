"""The resource table: what the kernels use on each chip, compiled here and compared with the file."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the table is made with triton, which has no wheel here")

ROOT = Path(__file__).resolve().parents[2]
LIMITS = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}


def check(*options: str) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT / "kernels")}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(ROOT / "scripts/resources.py"), "--check", "--chip", "sm_90", *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def test_first_row_of_every_kernel() -> None:
    check("--first")


@pytest.mark.slow
def test_all_rows() -> None:
    check()


def test_no_row_spills_or_exceeds_its_chip() -> None:
    rows = list(csv.DictReader((ROOT / "kernels/resources.csv").open()))
    assert {row["chip"] for row in rows} == set(LIMITS)
    for row in rows:
        assert int(row["stack"]) == int(row["spills"]) == 0, row
        assert int(row["shared"]) <= LIMITS[row["chip"]], row

"""What holds for every test: one thread, no network, a fixed seed; `gpu` tests are skipped without a GPU."""

from __future__ import annotations

import os

# Read when torch and the hub's client are imported. The workers of xdist would otherwise start a thread pool
# each over the same cores, and a test that needs a download would pass on some machines only.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import random

import pytest
import torch

# Read when triton is imported, by whatever test comes first.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds Python's and torch's generators before each test, whatever ran before it; returns the seed."""
    random.seed(0)
    torch.manual_seed(0)
    return 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))

"""kill -9 again and again; `scripts/faults.py --kills 50` does it more often."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from killing import PHASES, compare, kill_again

from runs import metrics

KILLS = 8
pytestmark = [pytest.mark.multi, pytest.mark.slow]


def test_a_run_killed_again_and_again_is_the_undisturbed_one(tmp_path: Path) -> None:
    found = list(kill_again(tmp_path, KILLS))
    assert len(found) == KILLS and set(Counter(kill.phase for kill in found)) == set(PHASES)
    assert compare(tmp_path) == []
    steps = [[line["step"] for line in metrics(tmp_path / name)] for name in ("run", "straight")]
    assert steps[0] == steps[1] == list(range(1, len(steps[0]) + 1))

"""Kill a tiny run with SIGKILL, many times, and compare what it becomes with an undisturbed one.

    python scripts/faults.py --kills 50

prints every kill and a summary by phase; exits with 1 where a weight, optimiser state or report differs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "faults")]

from killing import compare, kill_again  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the points at which it is killed")
    options = parser.parse_args()
    phases: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for kill in kill_again(Path(folder), options.kills, options.seed):
            phases[f"{kill.phase} {kill.moment}".strip()] += 1
            print(
                f"{kill.number:4} {kill.phase:10} {kill.moment:8} step {kill.step:4}, left {kill.left}",
                flush=True,
            )
        different = compare(Path(folder))
    for phase, number in sorted(phases.items()):
        print(f"{phase:20} {number:4} kills")
    print(f"{len(different)} differences to the undisturbed run", *different, sep="\n")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())

"""What `import attnzoo` adds to `import torch`, and how long `attnzoo list` takes: fresh processes in turn.

python scripts/bench_startup.py [--rounds 11]
"""

from __future__ import annotations

import argparse
import csv
import datetime
import pathlib
import platform
import statistics
import subprocess
import sys
import time

import torch

OUT = pathlib.Path(__file__).parents[1] / "benchmarks" / "results" / "start-up.csv"
COMMANDS = {
    "import torch": "import torch",
    "import torch, attnzoo": "import torch, attnzoo",
    "attnzoo list": "import sys; from attnzoo.cli import main; sys.exit(main(['list']))",
}


def seconds(code: str) -> float:
    """Wall time of one fresh process."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    times = {name: [] for name in COMMANDS}
    for i in range(-1, rounds):
        for name in COMMANDS if i % 2 else reversed(COMMANDS):
            taken = seconds(COMMANDS[name])
            if i >= 0:
                times[name].append(taken)
    with OUT.open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["command", "q1", "median", "q3", "over_torch", "rounds", "torch", "python", "date"])
        for name, values in times.items():
            over = statistics.median(a - b for a, b in zip(values, times["import torch"], strict=True))
            row = [name, *(f"{q:.3f}" for q in statistics.quantiles(values, n=4)), f"{over:.3f}", rounds]
            row += [torch.__version__, platform.python_version(), datetime.date.today().isoformat()]
            table.writerow(row)
            print(*row, sep="  ")


if __name__ == "__main__":
    main()

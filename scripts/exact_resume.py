"""Every cell of tests/exact_resume.py, killed and resumed: writes benchmarks/results/exact-resume.csv.

Run again, it goes on with the cells that the file lacks. On two cores a cell takes 4 to 20 seconds.

    python scripts/exact_resume.py [--out FILE] [--limit CELLS]
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from machine import machine  # noqa: E402

from exact_resume import Cell, full_matrix, run_cell  # noqa: E402

CELL = ("variant", "optimiser", "processes", "workers", "first", "second")


def main() -> int:
    """Run what is missing; the exit code is 1 if any cell differs from its reference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "exact-resume.csv")
    parser.add_argument("--limit", type=int, help="cells to run at most")
    options = parser.parse_args()
    rows = _rows(options.out)
    done = {tuple(row[key] for key in CELL) for row in rows}
    missing = [cell for cell in full_matrix() if tuple(map(str, asdict(cell).values())) not in done]
    with tempfile.TemporaryDirectory(prefix="exact-resume-") as folder:
        for cell in missing[: options.limit]:
            rows.append(_row(cell, Path(folder)))
            _write(options.out, rows)
            print(cell.name, rows[-1]["hits"], rows[-1]["differences"] or "the same", flush=True)
    return int(any(row["differences"] for row in rows))


def _row(cell: Cell, folder: Path) -> dict[str, str]:
    result = run_cell(cell, folder)
    told = {key: str(value) for key, value in asdict(cell).items()}
    found = {"hits": result["hits"], "differences": "; ".join(result["differences"])}
    return told | found | machine()


def _rows(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def _write(file: Path, rows: list[dict[str, str]]) -> None:
    part = file.with_name(f".{file.name}.tmp")
    with part.open("w", newline="") as opened:
        table = csv.DictWriter(opened, rows[0].keys())
        table.writeheader()
        table.writerows(rows)
    part.replace(file)


if __name__ == "__main__":
    sys.exit(main())

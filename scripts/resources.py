#!/usr/bin/env python3
"""Compile the kernels for their chips, without a GPU, and write what they use to kernels/resources.csv.

    scripts/resources.py                              compile everything and write the table
    scripts/resources.py --check --chip sm_90 --first  compile one row per kernel, compare with the table

One row per kernel, case (a set of constants), tile and chip: registers per thread, stack and spill bytes
per thread, shared bytes per block, tensor-core instructions (mma on sm_80, wgmma on sm_90, tcgen05 on sm_100,
MFMA on gfx942) and, beside them, older mma ones. A row with stack or spills (ptxas spills to the stack), or
with more shared memory than the chip has, is an error: its tile must leave the kernel's list for that chip.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

TABLE = Path(__file__).resolve().parents[1] / "kernels" / "resources.csv"
KEY = ("kernel", "case", "tile", "chip")


def jobs(pattern: str, chips: list[str], first: bool) -> list[tuple[str, str, int, str]]:
    """(kernel, case, index of the tile, chip) of every row asked for."""
    from attnzoo_kernels import aot

    rows = []
    for kernel in aot.kernels().values():
        if pattern not in kernel.name:
            continue
        own = [
            (kernel.name, case, i, chip)
            for chip in chips
            for case in kernel.cases
            for i, tile in enumerate(kernel.tiles)
            if chip in tile.chips
        ]
        rows += own[:1] if first else own
    return rows


def compile_row(job: tuple[str, str, int, str]) -> dict[str, str]:
    from attnzoo_kernels import aot

    name, case, index, chip = job
    kernel = aot.kernels()[name]
    tile = kernel.tiles[index]
    row = dict(zip(KEY, (name, case, tile.name, chip), strict=True))
    used = aot.compile_kernel(kernel, case, tile, chip)
    row |= {key: str(value) for key, value in used._asdict().items()} | aot.versions()
    return row


def faults(row: dict[str, str]) -> list[str]:
    """Why a row may not be in a tuning list."""
    from attnzoo_kernels import aot

    where, limit = " ".join(row[key] for key in KEY), aot.SHARED_LIMIT[row["chip"]]
    found = [f"{where}: {row[key]} bytes of {key}" for key in ("stack", "spills") if int(row[key])]
    if int(row["shared"]) > limit:
        found.append(f"{where}: {row['shared']} bytes of shared memory, the chip has {limit}")
    return found


def differences(rows: list[dict[str, str]], table: list[dict[str, str]]) -> list[str]:
    """Where the committed table differs; one made by other versions is compared in its keys only."""
    known, found = {tuple(row[key] for key in KEY): row for row in table}, []
    for row in rows:
        old = known.get(tuple(row[key] for key in KEY))
        if old is None:
            found.append(f"{' '.join(row[key] for key in KEY)}: not in the table")
        elif (old["triton"], old["ptxas"]) == (row["triton"], row["ptxas"]) and old != row:
            changed = [f"{key} {old[key]} -> {row[key]}" for key in row if old[key] != row[key]]
            found.append(f"{' '.join(row[key] for key in KEY)}: {', '.join(changed)}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--chip", action="append", help="only this chip (may be repeated)")
    parser.add_argument("--first", action="store_true", help="only the first row of each kernel")
    parser.add_argument("--check", action="store_true", help="compare with the table, write nothing")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    from attnzoo_kernels.launch import CHIPS

    todo = jobs(args.kernel, args.chip or list(CHIPS), args.first)
    with ProcessPoolExecutor(args.jobs) as pool:
        rows = sorted(pool.map(compile_row, todo), key=lambda row: [row[key] for key in KEY])
    wrong = [fault for row in rows for fault in faults(row)]
    table = list(csv.DictReader(TABLE.open())) if TABLE.exists() else []
    if args.check:
        wrong += differences(rows, table)
    else:
        done = {tuple(row[key] for key in KEY) for row in rows}
        whole = not (args.kernel or args.chip or args.first)
        kept = [] if whole else [row for row in table if tuple(row[key] for key in KEY) not in done]
        rows = sorted(kept + rows, key=lambda row: [row[key] for key in KEY])
        with TABLE.open("w", newline="") as out:
            writer = csv.DictWriter(out, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    print(f"{len(todo)} rows compiled, {len(wrong)} wrong")
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()

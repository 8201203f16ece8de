"""Writes benchmarks/results/plan.csv and the table of docs/plan.md: the 1b and 7b sizes from 8 to 1,024 GPUs.

python scripts/plan_table.py                     # all of it, some ten minutes
python scripts/plan_table.py --check             # exit 1 where the files are not what would be written
python scripts/plan_table.py --check --only 1b,mha,4096    # one model at one length
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from attnzoo.plan import Choice, Job, choose, read_hardware
from attnzoo.plan.hardware import GIB
from attnzoo.plan.memory import PARTS as MEMORY
from attnzoo.plan.request import BATCH_TOKENS, GPUS, OVERLAP, VOCABULARY
from attnzoo.plan.show import layout_of
from attnzoo.plan.times import PARTS as TIMES

ROOT = Path(__file__).parents[1]
TABLE, PAGE = ROOT / "benchmarks" / "results" / "plan.csv", ROOT / "docs" / "plan.md"
SIZES = ("1b", "7b")
LAYOUTS = ("mha", "mla", "gated_deltanet", "gated_deltanet*3,mha")
LENGTHS = (4096, 32768, 262144)
HARDWARE = "h100"
START, END = "<!-- table -->", "<!-- end of the table -->"
KEY = ("size", "layout", "seq_len")
COLUMNS = (
    *KEY,
    "params",
    "gpus",
    "ranks",
    *(f"{name}_gib" for name in MEMORY),
    "total_gib",
    *(f"{name}_s" for name in TIMES),
    "step_s",
    "step_all_hidden_s",
    "step_none_hidden_s",
    "tokens_per_s",
    "mfu",
    "bound_by",
    "left_out",
)
SHOWN = ("GPUs", "ranks", "GiB", "step s", "tokens/s", "MFU", "bound by")


def job_of(size: str, layout: str, length: int) -> Job:
    model = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "model" / f"{size}.yaml"))
    return Job(model | {"layout": layout, "vocab_size": VOCABULARY, "max_seq_len": length}, length)


def rows_of(size: str, layout: str, length: int) -> list[dict[str, str]]:
    job, hardware = job_of(size, layout, length), read_hardware(ROOT / "configs" / "hardware", HARDWARE)
    batch = BATCH_TOKENS // length
    return [
        {"size": size, "layout": layout, "seq_len": str(length), "params": str(job.cost.params)}
        | as_columns(choose(job, gpus, batch, hardware, OVERLAP))
        for gpus in GPUS
    ]


def as_columns(choice: Choice) -> dict[str, str]:
    found, row = choice.best, dict.fromkeys(COLUMNS[len(KEY) + 1 :], "")
    left_out = "; ".join(f"{number} by {reason}" for reason, number in choice.left_out.items())
    row |= {"gpus": str(choice.gpus), "left_out": left_out}
    if found is None:
        return row
    low, high = found.times.bounds
    numbers = {f"{name}_gib": getattr(found.memory, name) / GIB for name in (*MEMORY, "total")}
    numbers |= {f"{name}_s": getattr(found.times, name) for name in (*TIMES, "step")}
    numbers |= {"step_all_hidden_s": low, "step_none_hidden_s": high, "mfu": found.mfu}
    return row | {
        **{name: f"{value:.4g}" for name, value in numbers.items()},
        "ranks": layout_of(found),
        "tokens_per_s": f"{found.tokens_per_second:.4g}",
        "bound_by": found.times.bound_by,
    }


def as_csv(rows: Sequence[dict[str, str]]) -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def as_markdown(rows: Sequence[dict[str, str]]) -> str:
    """A table for each size and length, from the rows of the CSV file."""
    lines = []
    for size in SIZES:
        for length in LENGTHS:
            lines += [f"\n**{size}, T = {length:,}**\n", f"| model | {' | '.join(SHOWN)} |"]
            lines.append("|---|---:|---|---:|---:|---:|---:|---|")
            for row in rows:
                if (row["size"], row["seq_len"]) == (size, str(length)):
                    lines.append(f"| {' | '.join(shown(row))} |")
    return "\n".join(lines) + "\n"


def shown(row: dict[str, str]) -> list[str]:
    name = f"`{row['layout']}` {int(row['params']) / 1e9:.2f}B"
    if not row["ranks"]:
        return [name, row["gpus"], "nothing fits", *[""] * (len(SHOWN) - 2)]
    step = f"{float(row['step_s']):.2f} ({float(row['step_all_hidden_s']):.2f} to "
    return [
        name,
        row["gpus"],
        row["ranks"],
        f"{float(row['total_gib']):.0f}",
        f"{step}{float(row['step_none_hidden_s']):.2f})",
        f"{float(row['tokens_per_s']):,.0f}",
        f"{100 * float(row['mfu']):.0f}%",
        row["bound_by"],
    ]


def page(rows: Sequence[dict[str, str]]) -> str:
    """docs/plan.md with the table in its place."""
    text = PAGE.read_text()
    head, rest = text.split(START)
    return f"{head}{START}\n{as_markdown(rows)}{END}{rest.split(END)[1]}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--only", help="size,model,length: with --check")
    options = parser.parse_args(argv)
    with TABLE.open(newline="") if TABLE.exists() else io.StringIO() as file:
        known = list(csv.DictReader(file))
    cells = [(size, layout, length) for size in SIZES for layout in LAYOUTS for length in LENGTHS]
    if options.only:
        size, rest = options.only.split(",", 1)
        layout, length = rest.rsplit(",", 1)
        cells = [(size, layout, int(length))]
    rows = []
    for cell in cells:
        rows += rows_of(*cell)
        print(*cell, flush=True)
    if options.check:
        here = [row for row in known if tuple(row[k] for k in KEY) in {tuple(map(str, c)) for c in cells}]
        return 0 if rows == here and PAGE.read_text() == page(known) else 1
    TABLE.write_text(as_csv(rows))
    PAGE.write_text(page(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

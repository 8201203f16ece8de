"""What a sweep shows: a bar on a terminal and plain lines elsewhere, and a table of its cells."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from datetime import timedelta

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from attnzoo.sweep.manifest import Cell, Manifest
from attnzoo.sweep.state import DONE, FAILED, RUNNING, STATUSES, Outcome, read_summary, states
from attnzoo.sweep.tune import tuned, untuned

COLOURS = {DONE: "green", FAILED: "bold red", RUNNING: "cyan"}
WIDTH = 160  # of a table that is not on a terminal: piped tables must not be cut


class Display:
    """Shows starts and ends of cells.

    Args:
        cells: that are to run; more may come up.
    """

    def __init__(self, cells: int) -> None:
        self.ended, self.total, self.tally = 0, cells, Counter()
        self.bar: Progress | None = None
        if sys.stdout.isatty():
            self.bar = Progress(
                BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
            )

    def __enter__(self) -> Display:
        if self.bar:
            self.task = self.bar.add_task("", total=self.total)
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()

    def grow(self, cells: int) -> None:
        """More cells have come up."""
        self.total += cells

    def show(self, manifest: Manifest, cell: Cell, outcome: Outcome | None) -> None:
        """A cell has started (None) or ended."""
        if outcome is None:
            self.tally[RUNNING] += 1
        else:
            self.tally[RUNNING] -= 1
            self.tally[outcome.status] += 1
            self.ended += 1
            line = f"[{self.ended}/{self.total}] {cell.id} {outcome.status} in {_span(outcome.seconds)}"
            more = outcome.reason or result(read_summary(manifest, cell))
            self._print(f"{line}: {more}" if more else line)
        if self.bar:
            words = " · ".join(f"{count} {status}" for status, count in self.tally.items() if count)
            self.bar.update(self.task, total=self.total, completed=self.ended, description=words)

    def _print(self, line: str) -> None:
        if self.bar:
            self.bar.console.print(line, highlight=False, markup=False)
        else:
            print(line, flush=True)


def print_table(manifest: Manifest, found: Mapping[str, Outcome] | None = None) -> None:
    """Every cell with its status, its result or why it has none; then the counts."""
    found = found or states(manifest)
    several = len({cell.setting for cell in manifest.cells}) > 1
    table = Table(box=None, pad_edge=False)
    for column in ("cell", *(["setting"] if several else []), "status", "time", "result"):
        table.add_column(column, overflow="fold")
    for cell in manifest.cells:
        outcome = found[cell.id]
        text = result(read_summary(manifest, cell)) if outcome.status == DONE else outcome.reason
        status = f"[{COLOURS.get(outcome.status, 'default')}]{outcome.status}[/]"
        row = [cell.id, *([cell.setting] if several else []), status]
        table.add_row(*row, _span(outcome.seconds) if outcome.seconds else "", escape(text))
    _console().print(table)
    counts = Counter(outcome.status for outcome in found.values())
    words = ", ".join(f"{counts[status]} {status}" for status in STATUSES if counts[status])
    print(f"{manifest.name}: {len(manifest.cells)} cells, {words}")
    for line in _tuning(manifest):
        print(line)


def print_matched(cells: Iterable[Cell]) -> None:
    """What was solved so that the arms spend the same."""
    rows = {cell.group: cell for cell in reversed(list(cells)) if cell.matched}
    if not rows:
        return
    table = Table(box=None, pad_edge=False)
    for column in ("arm", "setting", "budget", "target", "reached", "deviation", "changed"):
        table.add_column(column)
    for cell in reversed(rows.values()):
        m = cell.matched
        change = f"{m['knob']}: {m['from']} -> {m['to']}" if m["knob"] else "nothing"
        numbers = [f"{m['target']:,.0f}", f"{m['value']:,.0f}", f"{100 * m['deviation']:+.2f} %"]
        table.add_row(cell.arm, cell.setting, m["budget"], *numbers, escape(change))
    _console().print(table)


def result(summary: Mapping[str, object] | None) -> str:
    """A completed run in a few words."""
    parts = []
    for key, words in (("val_bpb", "bits/byte"), ("val_accuracy", "accuracy"), ("val_loss", "loss")):
        value = (summary or {}).get(key)
        if isinstance(value, float):
            parts.append(f"{value:.4f} {words}")
    return parts[0] if parts else ""


def _tuning(manifest: Manifest) -> Iterable[str]:
    for t in tuned(manifest):
        where = " ".join(filter(None, (t.arm, t.setting)))
        edge = ", at the edge of the grid: a better one may lie outside" if t.at_edge else ""
        yield f"{where}: learning rate {t.lr:g} of {', '.join(f'{rate:g}' for rate in t.grid)}{edge}"
    for arm, setting in untuned(manifest):
        yield f"{' '.join(filter(None, (arm, setting)))}: no learning rate completed, so it has no runs"
    if manifest.searching:
        yield "the runs proper come when the learning rates are found"


def _console() -> Console:
    return Console() if sys.stdout.isatty() else Console(width=WIDTH)


def _span(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))

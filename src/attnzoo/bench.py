"""Times the ops against what else could do the work: in one process, in turns, forward and backward.

A side is a function of the operands. Sides that cannot run here (a missing package, a shape that a library
refuses) are listed with the reason instead of a time. Ratios are taken within a round, so that a drifting
clock or a busy neighbour changes both sides alike.
"""

from __future__ import annotations

import csv
import datetime
import importlib
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

ROUNDS = 7
SECONDS = 0.05  # one measurement repeats a call for about this long

Side = Callable[..., Tensor]


@dataclass(frozen=True)
class Case:
    """One measurement: an op at a shape.

    Args:
        op, what, T, d: name of the op, what of it, length, head width.
        operands: made on the device, those that need it with gradients.
        sides: name -> function of the operands; "attnzoo" is ours. Made late: a side that raises is listed.
        bytes_read: memory that the work has to read once, for ops that memory bounds; 0 = not such an op.
        backward: whether forward+backward is timed as well.
    """

    op: str
    what: str
    T: int
    d: int
    operands: Callable[[], tuple[Tensor, ...]]
    sides: dict[str, Callable[[], Side]]
    bytes_read: int = 0
    backward: bool = True


class Row(NamedTuple):
    """One side of one case. Milliseconds; ``ratio`` is this side's time by attnzoo's in the same round, so
    above 1 means that attnzoo is faster; peak_mib beyond the operands, on a GPU.
    """

    op: str
    what: str
    T: int
    d: int
    mode: str
    side: str
    ms: str
    ms_low: str
    ms_high: str
    ratio: str
    peak_mib: str
    gib_per_s: str
    note: str


def measure(case: Case, rounds: int = ROUNDS) -> Iterator[Row]:
    """Rows of all sides, forward and (where it has one) forward+backward."""
    operands = case.operands()
    for mode in ("forward", "forward+backward") if case.backward else ("forward",):
        calls, notes = {}, {}
        for name, make in case.sides.items():
            try:
                calls[name] = _call(make(), operands, mode)
                calls[name]()  # compiles and tunes
            except Exception as error:
                calls.pop(name, None)
                notes[name] = (
                    f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
                )
        yield from _rows(
            case, mode, _times(calls, operands[0].device, rounds), calls, notes, operands[0].device
        )


def _call(side: Side, operands: tuple[Tensor, ...], mode: str) -> Callable[[], None]:
    if mode == "forward":

        def run() -> None:
            with torch.no_grad():
                side(*operands)

        return run
    leaves = [x for x in operands if x.requires_grad]
    grad: list[Tensor] = []

    def run() -> None:
        o = side(*operands)
        if not grad:
            grad.append(torch.randn_like(o))
        torch.autograd.grad(o, leaves, grad[0])

    return run


def _times(calls: dict[str, Callable], device: torch.device, rounds: int) -> dict[str, list[float]]:
    timers = {name: Timer("call()", globals={"call": call}) for name, call in calls.items()}
    repeats = {name: max(1, int(SECONDS / max(t.timeit(1).mean, 1e-7))) for name, t in timers.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds):
        order = list(timers) if i % 2 == 0 else list(reversed(timers))
        for name in order:
            times[name].append(timers[name].timeit(repeats[name]).mean)
    return times


def _peak(call: Callable[[], None], device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return f"{(torch.cuda.max_memory_allocated(device) - before) / 2**20:.1f}"


def _rows(
    case: Case, mode: str, times: dict, calls: dict, notes: dict, device: torch.device
) -> Iterator[Row]:
    ours = times.get("attnzoo")
    for name in case.sides:
        head = (case.op, case.what, case.T, case.d, mode, name)
        if name not in times:
            yield Row(*head, *[""] * 6, notes[name])
            continue
        own = times[name]
        low, _, high = quantiles(own, n=4) if len(own) > 1 else (own[0],) * 3
        ratio = f"{median(a / b for a, b in zip(own, ours, strict=True)):.3f}" if ours else ""
        speed = f"{case.bytes_read / median(own) / 2**30:.1f}" if case.bytes_read else ""
        figures = (f"{1e3 * x:.4f}" for x in (median(own), low, high))
        yield Row(*head, *figures, ratio, _peak(calls[name], device), speed, "")


def write(rows: list[Row], folder: Path, device: torch.device) -> list[Path]:
    """One CSV per op: ``<op>-<device>-torch<version>.csv``, with the machine, the versions and the date."""
    stamp = {
        "device": device_name(device),
        "torch": torch.__version__,
        **{name: version(name) for name in ("triton", "fla")},
        "date": datetime.date.today().isoformat(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for op in dict.fromkeys(row.op for row in rows):
        short = torch.__version__.partition("+")[0]
        files.append(folder / f"{op}-{device_name(device).replace(' ', '-')}-torch{short}.csv")
        with files[-1].open("w", newline="") as out:
            writer = csv.DictWriter(out, [*Row._fields, *stamp], lineterminator="\n")
            writer.writeheader()
            writer.writerows(row._asdict() | stamp for row in rows if row.op == op)
    return files


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu-{platform.machine()}"


def version(module: str) -> str:
    try:
        return str(getattr(importlib.import_module(module), "__version__", "unknown"))
    except ImportError:
        return "absent"

"""Numbers for people: 1.30 M parameters, 2.10 MiB, 4.20 ms, a sign that is a real minus."""

from __future__ import annotations

from math import isfinite
from typing import Any

MISSING = "–"
BINARY = ("B", "KiB", "MiB", "GiB", "TiB")
LOSSES = ("bits/byte", "bits/token", "nats/token")
DECIMAL = ("", "k", "M", "G", "T", "P", "E", "Z")


def quantity(value: float | None, unit: str = "", signed: bool = False) -> str:
    """A value with its unit.

    Args:
        value: None becomes a dash.
        unit: ``bytes`` is written in powers of 1024, ``s`` in minutes and hours where it is long, ``share``
            in per cent, losses with four digits after the point; anything else with k, M, G ... and without
            its unit, which the heading names.
        signed: with a plus, too, as differences are.
    """
    if value is None or not isfinite(value):
        return MISSING
    size = _size(abs(value), unit)
    if signed and unit == "share":
        size = size.replace("%", "pp")  # percentage points: the relative change stands beside it in per cent
    if not size.strip("0. %p"):  # what rounds to nothing has no direction
        return size
    return ("−" if value < 0 else "+" if signed else "") + size


def _size(value: float, unit: str) -> str:
    if unit == "bytes":
        return _scaled(value, 1024, BINARY)
    if unit == "share":
        return f"{100 * value:.1f} %"
    if unit in LOSSES:
        return f"{value:.4f}"
    if unit.startswith("ms"):
        return _size(value / 1000, "s") if value >= 1000 else f"{_digits(value)} ms"
    if unit == "s":
        return _duration(value)
    return _scaled(value, 1000, DECIMAL)


def unit_of(metric: dict[str, Any]) -> str:
    """The unit to write a metric in: accuracies are shares, which have none of their own."""
    return "share" if metric["key"].startswith("accuracy") else metric["unit"]


def _duration(seconds: float) -> str:
    if seconds >= 5400:
        return f"{_digits(seconds / 3600)} h"
    if seconds >= 100:
        whole = round(seconds)
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{_digits(seconds)} s" if seconds >= 0.1 or seconds == 0 else f"{_digits(seconds * 1000)} ms"


def _scaled(value: float, base: int, prefixes: tuple[str, ...]) -> str:
    power = 0
    # 999.5 would be written 1000, which is the next prefix's 1
    while value >= base * (1 - 0.0005) and power < len(prefixes) - 1:
        value /= base
        power += 1
    whole = power == 0 and value == int(value)
    return f"{int(value) if whole else _digits(value)} {prefixes[power]}".strip()


def _digits(value: float) -> str:
    """Three significant digits, never in powers of ten unless it is tiny."""
    if value == 0:
        return "0"
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.2f}" if value >= 10 else f"{value:#.3g}"


def grouped(value: float) -> str:
    """A number in full, its thousands apart: 10 652 160."""
    return f"{value:,}".replace(",", "\u202f")


def percent(ratio: float | None) -> str:
    """How far a ratio is from 1: 0.99 is −1.0 %."""
    if ratio is None or not isfinite(ratio):
        return ""
    change = 100 * (ratio - 1)
    digits = 1 if abs(change) >= 1 else 2
    sign = "−" if change < 0 else "+" if change > 0 else ""
    return f"{sign}{abs(change):.{digits}f} %"


def byte_ticks(low: float, high: float, most: int = 6) -> tuple[list[int], list[str]]:
    """Powers of two that cover a range of bytes, for an axis in logarithms."""
    first, last = max(0, int(low).bit_length() - 1), int(high).bit_length()
    step = max(1, -(-(last - first) // most))
    ticks = [2**power for power in range(first, last + 1, step)]
    return ticks, [_scaled(tick, 1024, BINARY).replace(".00", "") for tick in ticks]

"""Where and when a table was made: the last columns of its rows."""

from __future__ import annotations

import datetime
import platform
from importlib.metadata import version
from pathlib import Path


def machine(*packages: str, **more: object) -> dict[str, str]:
    """The CPU and ``more`` that matters, versions of torch, ``packages``, attnzoo and Python, the date."""
    return {
        "cpu": _cpu(),
        **{name: str(value) for name, value in more.items()},
        **{name: version(name) for name in ("torch", *packages, "attnzoo")},
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())

"""The README's Python runs as it stands, and its shell commands exist."""

from __future__ import annotations

import pathlib
import re

import pytest

from attnzoo import registry
from attnzoo.cli import _parser

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", BLOCKS, ids=lambda code: code.splitlines()[-1][:40])
def test_python_runs(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    registry._load()
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})


def test_the_worked_example_is_there() -> None:
    assert any("attnzoo.register" in code and "testing.check" in code for code in BLOCKS)


def test_commands_exist() -> None:
    commands = set(re.findall(r"^attnzoo (\w+)", README, re.MULTILINE))
    known = set(_parser()._subparsers._group_actions[0].choices)
    assert commands and commands <= known

"""Hydra's command line in this project's terms: what it is given, and its errors in one line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from attnzoo.train.settings import nearest

FREE = ("attention.", "trainer.aux_weights=", "data.sources")


def order(arguments: Iterable[str]) -> list[str]:
    """Command-line arguments as Hydra wants them: flags first, then overrides.

    ``attention.x=1`` becomes ``++attention.x=1``: which options exist is for the card to say, not the tree;
    likewise the names of auxiliary losses and of a mixture's sources.
    """
    flags, overrides = [], []
    for argument in arguments:
        if argument.startswith("-") or ("=" not in argument and not argument.startswith("~")):
            flags.append(argument)
        else:
            overrides.append(f"++{argument}" if argument.startswith(FREE) else argument)
    return flags + overrides


def describe(error: Exception, keys: Iterable[str], nested: Iterable[str] = ()) -> str:
    """Hydra's or OmegaConf's error in one line, with the nearest names.

    Args:
        keys: the keys and groups of the default configuration.
        nested: choices that stand in a folder of their group, as "group/folder/name"; Hydra lists the others.
    """
    text = str(error)
    override = getattr(error, "override", None)
    if match := re.search(r"Could not override '([^']+)'", text):
        return f"{match[1]}: no such key; {nearest(match[1], keys)}"
    if match := re.search(r"Could not find '([^']+)'", text):
        listed = re.search(r"Available options in '([^']+)':((?:\n\t.+)*)", text)
        if not listed:
            return f"{match[1].rpartition('/')[0].strip('/')}: no such group"
        group, choice = listed[1], match[1].strip("/").removeprefix(f"{listed[1]}/")
        inside = (path.removeprefix(f"{group}/") for path in nested if path.startswith(f"{group}/"))
        return f"{group}: no choice {choice!r}; {nearest(choice, [*listed[2].split(), *inside])}"
    if match := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return f"{match[1]}: several values; add -m to run each of them, or write a list as key=[a,b]"
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("See http")]
    if override:
        return f"{override}: cannot be read as key=value; {lines[-1].partition(' expecting')[0]}"
    return "; ".join(lines[:2])


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of a nested mapping, inner nodes included."""
    for key, value in tree.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")

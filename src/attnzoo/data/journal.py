"""How far `attnzoo tokenize` has come: a line for every pair of shards that is finished."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from attnzoo.train.store import write_atomic

from .manifest import Shard, check_sizes, read_shard
from .split import SPLITS

JOURNAL = "progress.jsonl"


@dataclasses.dataclass(frozen=True)
class Done:
    """A line of the journal: what is finished.

    Attributes:
        documents: of the source read so far.
        chain: hash over their digests.
        train, val: the shards of this number, None where no document went there.
    """

    documents: int = 0
    chain: str = ""
    train: Shard | None = None
    val: Shard | None = None


def check_plan(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raise a ValueError unless the folder was begun in the same way."""
    changed = [key for key in here if there.get(key) != here[key]]
    if changed:
        raise ValueError(
            f"out: '{folder}' was begun with another {' and '.join(changed)}; give a new folder, or the same "
            "options and unchanged text"
        )


def read_journal(folder: Path, dtype: np.dtype) -> list[Done]:
    """What is finished. A line that is damaged, or whose shards are, is cut with all after it."""
    first, *rest = (folder / JOURNAL).read_text().splitlines(keepends=True)
    done = []
    for line in rest:
        try:
            found = _read_line(line)
            check_sizes(folder, [shard for shard in (found.train, found.val) if shard], dtype)
        except (ValueError, TypeError, KeyError):
            break
        done.append(found)
    kept = "".join([first, *rest[: len(done)]])
    write_atomic(folder / JOURNAL, lambda file: file.write(kept.encode()))
    return done


def begin_journal(folder: Path, plan: dict[str, Any]) -> None:
    """Write the plan, or compare it with the one that is there."""
    file = folder / JOURNAL
    if not file.exists():
        write_atomic(file, lambda out: out.write((json.dumps(plan) + "\n").encode()))
        return
    with open(file) as lines:
        check_plan(folder, json.loads(lines.readline()), plan)


def add_to_journal(folder: Path, line: Done) -> None:
    """Note what is finished, once its shards are on the disk."""
    with open(folder / JOURNAL, "a") as file:
        file.write(json.dumps(dataclasses.asdict(line)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _read_line(line: str) -> Done:
    if not line.endswith("\n"):
        raise ValueError("cut")
    content = json.loads(line)
    found = {split: read_shard(content[split], split) if content[split] else None for split in SPLITS}
    return Done(content["documents"], content["chain"], **found)

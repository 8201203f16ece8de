"""Checkpoints that every rank writes its own part of: a folder ``step-N/`` instead of a file.

`rank-R.pt` holds what rank R has of weights and optimiser, `run.pt` the rest, how heads were cut and which
names are of one tensor, and `SHA256SUMS` the checksum of each. All are plain tensors and values: torch's own
distributed checkpoints keep a pickled index, which would run whatever it holds. Read back, the parts are put
together, so any layout of ranks can go on from it. The folder must be one that all ranks see.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from attnzoo.parallel.layout import Layout
from attnzoo.parallel.pieces import Block, Shards
from attnzoo.parallel.ranks import tied_names
from attnzoo.train.guard import RunFailed, check_finite
from attnzoo.train.store import (
    NAME,
    SUMS,
    forget,
    point,
    remove,
    saving,
    sync_folder,
    write_atomic,
    write_checked,
)

REST = "run.pt"
TENSORS = ("model", "optimizer")


def is_sharded(path: Path) -> bool:
    """Whether a path is a folder of shards."""
    return path.is_dir() and NAME.fullmatch(path.name) is not None


def save_sharded(
    folder: Path,
    step: int,
    content: dict[str, Any],
    cuts: Mapping[str, Shards],
    layout: Layout,
    keep: int,
    keep_every: int | None = None,
) -> Path:
    """As `attnzoo.train.store.save_checkpoint`; all ranks call it together.

    Args:
        content: with this rank's parts under "model" and "optimizer".
        cuts: how ranks that share heads cut parameters, by name.

    Raises:
        RunFailed: on all ranks alike, where one of them could not write its part.
    """
    path = folder / f"step-{step:08d}"
    making = folder / f".{path.name}.tmp"
    lead = layout.rank == 0

    def write() -> str:
        check_finite(content, step)
        own = {name: content[name] for name in TENSORS}
        return write_checked(making / f"rank-{layout.rank:05d}.pt", own)

    def finish() -> None:
        rest = {name: value for name, value in content.items() if name not in TENSORS}
        rest["parts"] = {
            "batches": layout.batches,
            "tensor": layout.tensor,
            "cuts": {
                name: [cut.dim, [list(b) for b in cut.blocks]] for name, cut in cuts.items() if cut.blocks
            },
            "tied": tied_names(content["model"]),
        }
        names = [f"rank-{rank:05d}.pt" for rank in range(layout.world)]
        lines = [*zip(sums, names, strict=True), (write_checked(making / REST, rest), REST)]
        text = "".join(f"{found}  {name}\n" for found, name in lines)
        write_atomic(making / SUMS, lambda file: file.write(text.encode()))
        if path.exists():  # of a course that was given up
            remove(path)
        making.replace(path)
        sync_folder(folder)
        point(path)
        forget(folder, step, keep, keep_every)

    _together(layout, lambda: _saving(folder, step, making.mkdir) if lead else None)
    sums = _together(layout, lambda: _saving(folder, step, write, clean=False))
    _together(layout, lambda: _saving(folder, step, finish, clean=False) if lead else None)
    return path


def _saving(folder: Path, step: int, work: Callable[[], Any], clean: bool = True) -> Any:
    with saving(folder, step, clean):
        return work()


def _together(layout: Layout, work: Callable[[], Any]) -> list[Any]:
    """What ``work`` gives on every rank; where it fails on one it fails on all."""
    try:
        mine = (work(), None)
    except RunFailed as error:
        mine = (None, f"rank {layout.rank}: {error}" if layout.world > 1 else str(error))
    every = [mine]
    if layout.world > 1:
        every = [None] * layout.world
        dist.all_gather_object(every, mine)
    failed = [reason for _, reason in every if reason is not None]
    if failed:
        raise RunFailed(failed[0])
    return [result for result, _ in every]


def read_sharded(folder: Path) -> dict[str, Any]:
    """The content of the checkpoint, as that of a file; its sums have been compared.

    Raises:
        RuntimeError, OSError, KeyError: as torch's and the system's reading.
    """
    read = lambda name: torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)  # noqa: E731
    content = read(REST)
    parts = content.pop("parts")
    batches, tensor = parts["batches"], parts["tensor"]
    files = [read(f"rank-{rank:05d}.pt") for rank in range(batches * tensor)]
    cuts = {name: _shards(cut, tensor) for name, cut in parts["cuts"].items()}
    join = lambda found, name: _joined(found, tensor, cuts.get(name))  # noqa: E731
    model, tied = files[0]["model"], parts.get("tied", {})  # which earlier versions did not write
    content["model"] = {
        name: join([file["model"].get(name) for file in files], name) for name in model if name not in tied
    }
    content["model"] |= {name: content["model"][first] for name, first in tied.items()}
    content["optimizer"] = {
        name: {
            key: join([file["optimizer"][name].get(key) for file in files], name if value.ndim else "")
            for key, value in entry.items()
        }
        for name, entry in files[0]["optimizer"].items()
    }
    return content


def _shards(cut: Sequence[Any], ranks: int) -> Shards:
    dim, blocks = cut
    return Shards(0, ranks, dim, tuple(Block(start, length, n, tuple(of)) for start, length, n, of in blocks))


def _joined(found: Sequence[Tensor | None], tensor: int, cut: Shards | None) -> Tensor:
    """The full tensor from the parts of all ranks, of whom some leave out what another has."""
    columns = [[part for part in found[t::tensor] if part is not None] for t in range(tensor)]
    rows = [column[0] if len(column) == 1 else torch.cat(column) for column in columns if column]
    return rows[0] if cut is None else cut.join(rows)

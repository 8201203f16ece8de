"""The documents of a dataset that is read as a stream, from any epoch, shard and row on."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Iterator
from typing import Any

from .config import DataConfig
from .corpora import field_texts, files_below, hf_rows, local_folder, progress_on_terminals_only
from .files import first_line
from .sampler import permute
from .split import digest, is_held_out


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a document stands: the shard that has this turn in this epoch, and the row in it."""

    epoch: int = 0
    turn: int = 0
    row: int = 0


START = Place()


class Source:
    """A dataset's rows as documents. Opened when first read from; pickled without what is open.

    Args:
        cfg: of a dataset that cannot change: a folder, or a name with a commit.
    """

    def __init__(self, cfg: DataConfig) -> None:
        self.cfg = cfg
        self._rows = None

    def __getstate__(self) -> dict[str, Any]:
        return {"cfg": self.cfg, "_rows": None}

    @property
    def rows(self) -> Any:
        """The `datasets.IterableDataset`."""
        if self._rows is None:
            import datasets

            with progress_on_terminals_only():
                self._rows = hf_rows(self.cfg)
            if not isinstance(self._rows, datasets.IterableDataset):
                raise ValueError(
                    f"data.path: '{self.cfg.path}' is a dataset saved as a whole, which needs no streaming; "
                    "use data=hf or attnzoo tokenize"
                )
        return self._rows

    def shard(self, number: int, row: int = 0) -> Iterator[tuple[int, str]]:
        """(row, text) of one shard's documents that are not empty, from `row` on."""
        shard = self.rows.shard(num_shards=self.rows.num_shards, index=number)
        for i, text in enumerate(field_texts(shard.skip(row) if row else shard, self.cfg), row):
            if text:
                yield i, text

    def once(self) -> Iterator[tuple[str, bool]]:
        """(text, whether it is held out) of every document, in the order of the files."""
        for number in range(self.rows.num_shards):
            for _, text in self.shard(number):
                yield text, is_held_out(digest(text), self.cfg.val_fraction)

    def endless(self, place: Place, key: str) -> Iterator[tuple[Place, bytes, str]]:
        """(place, digest, text) of the training documents from `place` on, epoch after epoch; `key` and the
        epoch name the order of the shards.

        Raises:
            ValueError: a whole epoch holds no training document.
        """
        shards, epoch, first, row = self.rows.num_shards, place.epoch, place.turn, place.row
        while True:
            found = bool(first or row)  # what was before may have held some
            for turn in range(first, shards):
                number = permute(turn, shards, f"{key} {epoch} shards".encode())
                for at, text in self.shard(number, row):
                    name = digest(text)
                    if not is_held_out(name, self.cfg.val_fraction):
                        found = True
                        yield Place(epoch, turn, at), name, text
                row = 0
            if not found:
                raise ValueError(
                    f"data.path: '{self.cfg.path}' holds no text to train on; give more rows or lower "
                    f"data.val_fraction"
                )
            epoch, first = epoch + 1, 0


def pinned(cfg: DataConfig) -> DataConfig:
    """The configuration with the commit that a dataset of the Hub is read at.

    Raises:
        ValueError: the commit cannot be looked up, so nothing would say what was read.
    """
    if local_folder(cfg) or re.fullmatch("[0-9a-f]{40}", cfg.revision or ""):
        return cfg
    try:
        from huggingface_hub import HfApi

        commit = HfApi().dataset_info(cfg.path, revision=cfg.revision).sha
    except Exception as error:  # of the network, of the Hub, or of a switch that forbids both
        raise ValueError(
            f"data.revision: the commit of '{cfg.path}' cannot be looked up ({type(error).__name__}: "
            f"{first_line(error)}), so a later run could not know that it reads the same; give the commit"
        ) from None
    warnings.warn(
        f"data.revision: '{cfg.path}' is read at commit {commit}, and resuming will refuse another one; "
        f"set data.revision={commit} to stay with it",
        stacklevel=2,
    )
    return dataclasses.replace(cfg, revision=commit)


def identity(cfg: DataConfig) -> list[Any]:
    """What names the source across machines: its files with their sizes, or its name and commit."""
    folder = local_folder(cfg)
    files = (
        [[f.relative_to(folder).as_posix(), f.stat().st_size] for f in files_below(folder)] if folder else []
    )
    return [files or [cfg.path, cfg.revision], cfg.subset, cfg.split, cfg.field]

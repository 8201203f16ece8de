"""The manifest of a folder of shards: it names, counts and checks them.

Sizes are compared with it when a folder is opened; `damaged` compares every byte.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .checksums import SUM
from .checksums import count as sums_of
from .split import SPLITS

FORMAT = 3  # of the manifest and of the bytes of a shard
MANIFEST = "manifest.json"
INDEX = np.dtype("<i8")
_DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_NAME = r"-\d{5,9}\.bin"


@dataclasses.dataclass(frozen=True)
class Shard:
    """What the manifest says of one shard file."""

    name: str
    tokens: int
    documents: int
    sha256: str

    def size(self, dtype: np.dtype) -> int:
        """Bytes of the file."""
        content = self.content(dtype)
        return content + sums_of(content) * SUM.itemsize

    def content(self, dtype: np.dtype) -> int:
        """Bytes of the file that the sums at its end are of."""
        return self.index_at(dtype) + 2 * self.documents * INDEX.itemsize

    def index_at(self, dtype: np.dtype) -> int:
        """Where `stops` begins in the file."""
        return -(-self.tokens * dtype.itemsize // INDEX.itemsize) * INDEX.itemsize


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The description of a folder of shards.

    Attributes:
        fingerprint: of the content, equal across machines and however it is cut into shards.
        dtype: of the tokens.
        shards: of each split, in order.
        plan: what the folder was made from, for a reader and for `attnzoo tokenize` to go on.
    """

    fingerprint: str
    dtype: np.dtype
    shards: dict[str, list[Shard]]
    plan: dict[str, Any] = dataclasses.field(default_factory=dict)

    def text(self) -> str:
        """The content of the file `manifest.json`."""
        entries = {
            split: ",\n  ".join(json.dumps(dataclasses.asdict(shard)) for shard in self.shards[split])
            for split in SPLITS
        }
        head = {"format": FORMAT, "fingerprint": self.fingerprint, "dtype": self.dtype.name}
        lines = [
            f"{json.dumps(key)}: {json.dumps(value)}" for key, value in {**head, "plan": self.plan}.items()
        ]
        lines += [f"{json.dumps(split)}: [\n  {entries[split]}\n ]" for split in SPLITS]
        return "{\n " + ",\n ".join(lines) + "\n}\n"


def key_of(*parts: Any) -> str:
    """32 hexadecimal digits that name what JSON says of `parts`."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def dtype_for(vocab_size: int) -> np.dtype:
    """The smallest type that holds every id."""
    return _DTYPES["uint16" if vocab_size <= 1 << 16 else "uint32"]


def shard_name(split: str, number: int) -> str:
    """The file name of a split's shard."""
    return f"{split}-{number:05}.bin"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of `folder`, every entry checked; names cannot leave the folder.

    Raises:
        ValueError: none there, or one that breaks a rule; the message names it.
    """
    file = folder / MANIFEST
    try:
        content = json.loads(file.read_text())
        return _manifest(content)
    except FileNotFoundError:
        unfinished = " (attnzoo tokenize has not finished there; run it again)" * folder.is_dir()
        raise ValueError(
            f"data.path: no '{file}'{unfinished}; give a folder that attnzoo tokenize wrote"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, ValueError) else str(error)
        raise ValueError(f"data.path: '{file}' is no manifest of shards ({reason}); tokenise again") from None


def _manifest(content: dict[str, Any]) -> Manifest:
    if content["format"] != FORMAT:
        raise ValueError(f"format must be {FORMAT}, is {content['format']!r}")
    if content["dtype"] not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, is {content['dtype']!r}")
    if not isinstance(content["fingerprint"], str):
        raise ValueError(f"fingerprint must be text, is {content['fingerprint']!r}")
    if not isinstance(content["plan"], dict):
        raise ValueError(f"plan must be a table, is {content['plan']!r}")
    shards = {split: _shards(split, content[split]) for split in SPLITS}
    return Manifest(content["fingerprint"], _DTYPES[content["dtype"]], shards, content["plan"])


def _shards(split: str, entries: list[dict[str, Any]]) -> list[Shard]:
    shards = [read_shard(entry, split) for entry in entries]
    names = [shard.name for shard in shards]
    if len(set(names)) < len(names):
        raise ValueError(f"{split} names a shard twice")
    return shards


def read_shard(entry: dict[str, Any], split: str) -> Shard:
    """A shard from its entry in a manifest or journal. Raises ValueError where it breaks a rule."""
    shard = Shard(**entry)
    if not isinstance(shard.name, str) or not re.fullmatch(split + _NAME, shard.name):
        raise ValueError(f"a shard's name must be {split}-NUMBER.bin, is {shard.name!r}")
    for field, least in (("documents", 1), ("tokens", shard.documents)):
        value = getattr(shard, field)
        if type(value) is not int or not least <= value < 1 << 48:
            raise ValueError(f"{field} of {shard.name} must be a number of at least {least}, is {value!r}")
    if not isinstance(shard.sha256, str) or not re.fullmatch("[0-9a-f]{64}", shard.sha256):
        raise ValueError(f"sha256 of {shard.name} must be 64 hexadecimal digits, is {shard.sha256!r}")
    return shard


def check_sizes(folder: Path, shards: Sequence[Shard], dtype: np.dtype) -> None:
    """Raise a ValueError that names the first shard which is missing, cut or too long; one `stat` each."""
    for shard in shards:
        size = None
        with contextlib.suppress(FileNotFoundError):
            size = os.stat(folder / shard.name).st_size
        if size != shard.size(dtype):
            found = "is missing" if size is None else f"has {size} bytes instead of {shard.size(dtype)}"
            raise ValueError(f"data.path: shard '{folder / shard.name}' {found}; copy or tokenise it again")


def damaged(folder: Path, shards: Sequence[Shard]) -> list[str]:
    """Names of the shards whose bytes are not those that were written: each is read once, whole."""
    return [shard.name for shard in shards if _sha256(folder / shard.name) != shard.sha256]


def _sha256(path: Path) -> str | None:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    except OSError:
        return None
    return digest.hexdigest()

"""Where the blocks of a stream begin, kept on disk."""

from __future__ import annotations

import dataclasses
import json
import os
import zlib
from contextlib import suppress
from pathlib import Path

from .places import START, Place


@dataclasses.dataclass(frozen=True)
class Bookmark:
    """Where a block of samples begins.

    Attributes:
        block: its number.
        place: of the document that its first token is from.
        token: which one of the document's tokens.
        key: the document's digest, to notice a source that has changed; "" where nothing is known.
    """

    block: int = 0
    place: Place = START
    token: int = 0
    key: str = ""


class Bookmarks:
    """The bookmarks of a stream on disk, so that going on need not read from the start.

    A file of lines that several processes may append to. It is a short cut and no more: a damaged line is
    passed over, a file that is missing or cannot be written costs time.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._known: dict[int, Bookmark] = {}

    def before(self, block: int) -> Bookmark:
        """The last known one up to `block`."""
        with suppress(OSError):
            for line in self.file.read_text(errors="replace").splitlines():
                with suppress(ValueError, TypeError, KeyError):
                    mark = _read(line)
                    self._known[mark.block] = mark
        known = (mark for number, mark in self._known.items() if number <= block)
        return max(known, key=lambda mark: mark.block, default=Bookmark())

    def add(self, mark: Bookmark) -> None:
        """Keep a bookmark."""
        if mark.block in self._known:
            return
        self._known[mark.block] = mark
        body = json.dumps(dataclasses.asdict(mark))
        with suppress(OSError):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            try:
                os.write(handle, f"{zlib.crc32(body.encode()):08x} {body}\n".encode())  # one write: one line
            finally:
                os.close(handle)


def _read(line: str) -> Bookmark:
    crc, _, body = line.partition(" ")
    if int(crc, 16) != zlib.crc32(body.encode()):
        raise ValueError("damaged")
    content = json.loads(body)
    return Bookmark(**{**content, "place": Place(**content["place"])})

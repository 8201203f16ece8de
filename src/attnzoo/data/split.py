"""Which documents are held out: a choice by content, so that no validation text is seen in training."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator

SPLITS = ("train", "val")


def digest(text: str) -> bytes:
    """16 bytes that name a document by its content."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def is_held_out(key: bytes, fraction: float) -> bool:
    """Whether the document of this digest belongs to the held-out `fraction` of a source that is too long to
    be read twice: a function of the document alone, where `plan_split` looks at all of them.
    """
    return int.from_bytes(key[:8], "little") < fraction * 2**64


@dataclasses.dataclass(frozen=True)
class Split:
    """The held-out documents by digest or, for a single document, the share of its text to train on."""

    held_out: frozenset[bytes]
    cut: float | None = None

    def parts(self, text: str) -> Iterator[tuple[str, str]]:
        """(split, text) for each part of a document: one, or two where the only document is divided."""
        if self.cut is None:
            yield ("val" if digest(text) in self.held_out else "train"), text
            return
        at = int(len(text) * self.cut)
        at = text.rfind("\n", max(0, at - 1000), at) + 1 or at  # between two lines, where one ends nearby
        yield from (("train", text[:at]), ("val", text[at:]))


def plan_split(documents: Iterable[tuple[bytes, int]], fraction: float) -> Split:
    """Holds out about `fraction` of the bytes, by whole documents.

    Documents are taken in the order of their digests, which has nothing to do with their names or places, as
    long as they fit; at least the smallest one is. Copies of a document share its digest, hence its split.
    Only where all documents are the same one is its text divided.

    Args:
        documents: (digest, bytes) of each document.
        fraction: in (0, 1).
    """
    sizes: dict[bytes, int] = {}
    for key, size in documents:
        sizes[key] = sizes.get(key, 0) + size
    if len(sizes) == 1:
        return Split(frozenset(), cut=1 - fraction)
    room = fraction * sum(sizes.values())
    held_out = set()
    for key in sorted(sizes):
        if sizes[key] <= room:
            held_out.add(key)
            room -= sizes[key]
    return Split(frozenset(held_out or {min(sizes, key=lambda key: (sizes[key], key))}))

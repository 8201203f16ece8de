"""Documents to ids, in pieces of bounded size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np

from .tokenizer import Tokenizer

T = TypeVar("T")
PIECE = 1 << 20  # characters encoded at once: tokenizers need some hundred bytes of memory per token
_VOCABULARY_BYTES = 100_000_000  # of training text that a BPE is trained on: more hardly changes it


def encoded(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[np.ndarray, int | None]]:
    """Ids of `texts`, in pieces of bounded length. The last piece of each ends with the end token and comes
    with the bytes of its text beyond those of its tokens, the others with None.
    """
    missing = 0  # of the current document
    for batch in _batches(_pieces(texts)):
        for (piece, last), ids in zip(batch, tokenizer.encode_batch([p for p, _ in batch]), strict=True):
            missing += len(piece.encode()) - tokenizer.byte_length(ids)
            if last:
                yield np.append(ids, tokenizer.eos_id), missing
                missing = 0
            else:
                yield ids, None


def encode_documents(
    texts: Iterable[str], tokenizer: Tokenizer, dtype: np.dtype
) -> Iterator[tuple[np.ndarray, int]]:
    """(ids with the end token, bytes of text beyond those of the tokens) of each document."""
    parts = []
    for ids, extra in encoded(texts, tokenizer):
        parts.append(ids.astype(dtype))
        if extra is not None:
            yield (parts[0] if len(parts) == 1 else np.concatenate(parts)), extra
            parts = []


def gathered(items: Iterable[T], size: Callable[[T], int], limit: int) -> Iterator[list[T]]:
    """Lists of consecutive items; each is full with the item that brings it above `limit`."""
    batch, total = [], 0
    for item in items:
        batch.append(item)
        total += size(item)
        if total > limit:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def start_of(texts: Iterable[str]) -> Iterator[str]:
    """The training text that a vocabulary is learnt from: the first of `texts`, as much as it takes."""
    room = _VOCABULARY_BYTES
    for piece, _ in _pieces(texts):
        yield piece
        room -= len(piece.encode())
        if room < 0:
            return


def _pieces(texts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """(piece, is the document's last one): pieces of bounded length, cut behind a line where there is one."""
    for text in texts:
        at = 0
        while at < len(text):
            end = at + PIECE
            if end < len(text):
                end = text.rfind("\n", at, end) + 1 or end
            yield text[at:end], end >= len(text)
            at = end


def _batches(pieces: Iterable[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """Pieces gathered to a few times the largest one: enough for a tokenizer's threads to share."""
    return gathered(pieces, lambda piece: len(piece[0]), 4 * PIECE)

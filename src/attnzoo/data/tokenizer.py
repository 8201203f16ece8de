"""Text to token ids and back: bytes, a trained byte-level BPE, or any saved Hugging Face tokenizer.

Every tokenizer has one id that no text encodes to, `eos_id`, the end of a document; it counts zero bytes.
Bits per byte is then the summed loss in bits over the summed `byte_length` of the targets, in any vocabulary.
"""

from __future__ import annotations

import abc
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .config import TokenizerConfig
from .files import first_line

_META = "attnzoo_tokenizer.json"
# Mixed case, runs of blanks, line ends, several scripts: what a tokenizer that normalises text would lose.
_PROBE = "If A:  b\n\treturn 'naïve 東京 🙂'\n"


class Tokenizer(abc.ABC):
    """What the models and the packing need of a tokenizer.

    Attributes:
        vocab_size: one more than the largest id, `eos_id` included.
        eos_id: the end of a document.
        fingerprint: equal for tokenizers that encode equally, across machines.
        token_bytes: (vocab_size,) int64, the UTF-8 bytes that each id stands for.
    """

    vocab_size: int
    eos_id: int
    fingerprint: str
    token_bytes: np.ndarray

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, as integer arrays."""

    @abc.abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; `eos_id` stands for none, bytes that are not UTF-8 become U+FFFD."""

    @abc.abstractmethod
    def save(self, folder: str | Path) -> None:
        """Writes what `load_tokenizer(folder)` reads."""

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; never `eos_id`."""
        return self.encode_batch([text])[0].tolist()

    def byte_length(self, ids: Any) -> int:
        """UTF-8 bytes that `ids` (a sequence, array or tensor of any shape) stand for."""
        return int(self.token_bytes[np.asarray(ids, dtype=np.int64)].sum())


class ByteTokenizer(Tokenizer):
    """One id per UTF-8 byte, and 256 for the end of a document."""

    vocab_size = 257
    eos_id = 256
    fingerprint = "bytes"

    def __init__(self):
        self.token_bytes = np.ones(self.vocab_size, dtype=np.int64)
        self.token_bytes[self.eos_id] = 0

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) for i in ids if i != self.eos_id).decode("utf-8", "replace")

    def save(self, folder: str | Path) -> None:
        _write_meta(folder, {"kind": "bytes"})


class SymbolTokenizer(Tokenizer):
    """Symbols without a spelling, of a synthetic task: ids as numbers with blanks between; no bytes of text.

    Args:
        num_symbols: ids 0 to ``num_symbols - 1``; the end of a document follows.
    """

    def __init__(self, num_symbols: int):
        self.eos_id, self.vocab_size = num_symbols, num_symbols + 1
        self.fingerprint = f"symbols {num_symbols}"
        self.token_bytes = np.zeros(self.vocab_size, dtype=np.int64)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array([self._id(word) for word in text.split()], dtype=np.int64) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(str(int(i)) for i in ids if i != self.eos_id)

    def save(self, folder: str | Path) -> None:
        _write_meta(folder, {"kind": "symbols", "num_symbols": self.eos_id})

    def _id(self, word: str) -> int:
        if not (word.isascii() and word.isdigit()) or int(word) >= self.eos_id:
            raise ValueError(
                f"text: symbols are numbers from 0 to {self.eos_id - 1} with blanks between, got {word!r}"
            )
        return int(word)


class HFTokenizer(Tokenizer):
    """A `tokenizers.Tokenizer` without its templates, truncation and special tokens: text and nothing else.

    Args:
        backend: the tokenizer; its settings for special tokens, truncation and padding are changed in place.
        eos_id: the end of a document; a new id after the last one when None.
    """

    def __init__(self, backend: Any, eos_id: int | None = None):
        backend.no_truncation()
        backend.no_padding()
        # A special token spelled out in a document is text like any other; it must not end the document.
        backend.encode_special_tokens = True
        pieces = backend.get_vocab(with_added_tokens=True)
        size = 1 + max(pieces.values(), default=-1)
        self.backend = backend
        self.eos_id = size if eos_id is None else eos_id
        self.vocab_size = max(size, self.eos_id + 1)
        self.token_bytes = _token_bytes(json.loads(backend.to_str()), pieces, self.vocab_size)
        self.token_bytes[self.eos_id] = 0
        self.fingerprint = hashlib.blake2b(
            f"{self.eos_id} {backend.to_str()}".encode(), digest_size=16
        ).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        found = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int64) for encoding in found]

    def decode(self, ids: Iterable[int]) -> str:
        return self.backend.decode([int(i) for i in ids if i != self.eos_id], skip_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        _write_meta(folder, {"kind": "hf", "eos_id": self.eos_id})
        self.backend.save(str(Path(folder) / "tokenizer.json"))


def train_bpe(texts: Iterable[str], vocab_size: int) -> HFTokenizer:
    """A byte-level BPE of at most `vocab_size` ids, end of document included; fewer where `texts` are short.

    The result is a function of the texts and the size, on any number of threads.
    """
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return HFTokenizer(backend)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer saved in a folder (by `save` or by Hugging Face) or in a `tokenizer.json`.

    Raises:
        ValueError: nothing there, an unreadable one, or one that loses text (bits per byte would be wrong).
    """
    given = Path(path).expanduser()
    folder = given if given.is_dir() else given.parent
    if not given.exists():
        raise ValueError(
            f"tokenizer.path: '{path}' does not exist; give a tokenizer.json or the folder that holds it"
        )
    try:
        meta = json.loads((folder / _META).read_text()) if (folder / _META).is_file() else {}
        if meta.get("kind") == "bytes":
            return ByteTokenizer()
        if meta.get("kind") == "symbols":
            return SymbolTokenizer(meta["num_symbols"])
        backend = _backend(given)
        eos_id = meta["eos_id"] if meta else _eos_id(folder, backend)
    except Exception as error:  # the libraries raise anything from KeyError to a bare Exception here
        raise ValueError(
            f"tokenizer.path: no tokenizer could be read from '{path}' ({type(error).__name__}: "
            f"{first_line(error)}); give a tokenizer.json or the folder that holds it"
        ) from None
    tokenizer = HFTokenizer(backend, eos_id)
    back = tokenizer.decode(tokenizer.encode(_PROBE))
    if back.removeprefix(" ") != _PROBE:
        raise ValueError(
            f"tokenizer.path: '{path}' loses text ({_PROBE!r} comes back as {back!r}), so bits per byte "
            "would mean nothing; give a byte-level or byte-fallback tokenizer, or use tokenizer=bpe"
        )
    return tokenizer


def ready_tokenizer(cfg: TokenizerConfig) -> Tokenizer | None:
    """The tokenizer that `cfg` names; None for "bpe", which needs the training text first (`train_bpe`)."""
    if cfg.name == "bytes":
        return ByteTokenizer()
    return load_tokenizer(cfg.path) if cfg.name == "saved" else None


def _backend(path: Path) -> Any:
    from tokenizers import Tokenizer as Backend

    if path.is_file() or (path / "tokenizer.json").is_file():
        return Backend.from_file(str(path if path.is_file() else path / "tokenizer.json"))
    # Older folders hold other files (vocab.json, tokenizer.model): transformers knows how to convert them.
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        str(path), local_files_only=True, trust_remote_code=False
    ).backend_tokenizer


def _eos_id(folder: Path, backend: Any) -> int | None:
    """The id of the end token that the folder's configuration names, None without one."""
    file = folder / "tokenizer_config.json"
    token = json.loads(file.read_text()).get("eos_token") if file.is_file() else None
    token = token["content"] if isinstance(token, dict) else token
    return None if token is None else backend.token_to_id(token)


def _token_bytes(spec: dict, pieces: dict[str, int], vocab_size: int) -> np.ndarray:
    """(vocab_size,) int64: bytes of text behind each id, read from how the tokenizer spells its pieces."""
    # The byte-level alphabet spells every byte as one character; elsewhere a piece is the text itself, but
    # for the visible blank of SentencePiece and its <0xAB> for single bytes.
    byte_level = "ByteLevel" in json.dumps([spec.get("pre_tokenizer"), spec.get("decoder")])
    special = {token["id"]: token["special"] for token in spec.get("added_tokens", ())}
    lengths = np.zeros(vocab_size, dtype=np.int64)
    for piece, i in pieces.items():
        if i in special:
            lengths[i] = 0 if special[i] else len(piece.encode())
        elif byte_level:
            lengths[i] = len(piece)
        else:
            single = re.fullmatch("<0x[0-9A-F]{2}>", piece)
            lengths[i] = 1 if single else len(piece.replace("▁", " ").encode())
    return lengths


def _write_meta(folder: str | Path, meta: dict[str, Any]) -> None:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _META).write_text(json.dumps(meta) + "\n")

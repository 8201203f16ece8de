"""What the `data` and `tokenizer` groups may say, checked before anything is read."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .mix import MixConfig
    from .synthetic import SyntheticConfig

# Keys that only some corpora read. Set anywhere else they are refused: a silently ignored option misleads.
READ_BY = {
    "path": ("text", "hf", "tokens", "stream"),
    "field": ("text", "hf", "stream"),
    "errors": ("text",),
    "subset": ("hf", "stream"),
    "split": ("hf", "stream"),
    "revision": ("hf", "stream"),
    "streaming": ("hf",),
    "window": ("stream",),
    "max_documents": ("stdlib", "text", "hf"),
    "max_bytes": ("stdlib", "text", "hf"),
    "val_fraction": ("stdlib", "text", "hf", "stream"),
    "cache_dir": ("stdlib", "text", "hf", "stream"),
}
TEXT_SOURCES = ("stdlib", "text", "hf")
NAMES = (*TEXT_SOURCES, "tokens", "stream", "mix")
_AT_LEAST_ONE = ("seq_len", "batch_size", "pack", "val_samples", "max_documents", "max_bytes", "window")
_MAY_BE_NULL = ("val_samples", "max_documents", "max_bytes")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The `data` group; `configs/data/*.yaml` says what each key means."""

    name: str = "stdlib"
    path: str | tuple[str, ...] | None = None
    field: str = "text"
    errors: str = "strict"
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    streaming: bool = False
    window: int = 1024
    max_documents: int | None = None
    max_bytes: int | None = None
    seq_len: int = 256
    batch_size: int = 8
    isolate: bool = False
    pack: int = 1
    val_fraction: float = 0.05
    val_samples: int | None = 256
    cache_dir: str | None = None
    num_workers: int = 0
    worker_timeout: int = 300

    def __post_init__(self):
        check_choice("data.name", self.name, NAMES)
        check_choice("data.errors", self.errors, ("strict", "replace"))
        for key, readers in READ_BY.items():
            if self.name not in readers and getattr(self, key) != getattr(DataConfig, key):
                raise ValueError(
                    f"data.{key}: data={self.name} does not read it, got {getattr(self, key)!r}; "
                    f"leave it out or use data={' or data='.join(readers)}"
                )
        for key in _AT_LEAST_ONE:
            check_whole_number(f"data.{key}", getattr(self, key), 1, null=key in _MAY_BE_NULL)
        check_whole_number("data.num_workers", self.num_workers, 0)
        check_whole_number("data.worker_timeout", self.worker_timeout, 0)
        if self.batch_size % self.pack:
            raise ValueError(
                f"data.pack: must divide data.batch_size={self.batch_size}, got {self.pack}; change one"
            )
        if self.window % self.pack:
            raise ValueError(f"data.pack: must divide data.window={self.window}, got {self.pack}; change one")
        for key in ("isolate", "streaming"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"data.{key}: must be true or false, got {getattr(self, key)!r}")
        if not isinstance(self.val_fraction, float) or not 0 < self.val_fraction < 1:
            raise ValueError(
                f"data.val_fraction: must lie strictly between 0 and 1, got {self.val_fraction!r}; "
                "0.05 holds one twentieth of the text out"
            )
        if self.name in _PATH_HELP and not self.path:
            raise ValueError(
                f"data.path: data={self.name} needs one, got {self.path!r}; {_PATH_HELP[self.name]}"
            )
        if self.name in _SINGLE_PATH and not isinstance(self.path, str):
            what = "folder" if self.name == "tokens" else "name or folder"
            raise ValueError(f"data.path: data={self.name} takes a single {what}, got {list(self.path)!r}")
        if self.name == "stream" and self.val_samples is None:
            raise ValueError(
                "data.val_samples: data=stream reads until it has so many held-out samples, got None; "
                "give a number"
            )


_PATH_HELP = {
    "text": "give a file, a directory, a glob, or a list of these",
    "hf": "give a dataset's name or a local folder",
    "tokens": "give a folder that attnzoo tokenize wrote",
    "stream": "give a dataset's name or a local folder",
}
_SINGLE_PATH = ("hf", "tokens", "stream")


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """The `tokenizer` group; `configs/tokenizer/*.yaml` says what each key means."""

    name: str = "bytes"
    vocab_size: int | None = None
    path: str | None = None

    def __post_init__(self):
        check_choice("tokenizer.name", self.name, ("bytes", "bpe", "saved"))
        for key, reader in (("vocab_size", "bpe"), ("path", "saved")):
            value = getattr(self, key)
            if self.name != reader and value is not None:
                raise ValueError(
                    f"tokenizer.{key}: tokenizer={self.name} does not read it, got {value!r}; "
                    f"leave it out or use tokenizer={reader}"
                )
        if self.name == "bpe":
            why = "256 bytes and the end of document"
            check_whole_number("tokenizer.vocab_size", self.vocab_size, 257, why=why)
        if self.name == "saved" and not self.path:
            raise ValueError(
                f"tokenizer.path: tokenizer=saved needs one, got {self.path!r}; "
                "give a tokenizer.json or the folder that holds it"
            )


def parse_data(values: Mapping[str, Any]) -> DataConfig | MixConfig | SyntheticConfig:
    """The checked `data` group. Raises ValueError on an unknown key or an illegal value."""
    if str(values.get("name")).startswith("synthetic/"):
        from .synthetic import parse_synthetic

        return parse_synthetic(values)
    if values.get("name") == "mix":
        from .mix import parse_mix

        return parse_mix(values)
    values = _known("data", DataConfig, values)
    path = values.get("path")
    if path is not None and not isinstance(path, str):
        values["path"] = tuple(map(str, path)) if isinstance(path, Sequence) else str(path)
    return DataConfig(**values)


def parse_tokenizer(values: Mapping[str, Any]) -> TokenizerConfig:
    """The checked `tokenizer` group. Raises ValueError on an unknown key or an illegal value."""
    return TokenizerConfig(**_known("tokenizer", TokenizerConfig, values))


def _known(group: str, schema: type, values: Mapping[str, Any]) -> dict[str, Any]:
    check_keys(group, values, [field.name for field in dataclasses.fields(schema)])
    return dict(values)


def check_keys(group: str, values: Mapping[str, Any], legal: Sequence[str]) -> None:
    """Raise a ValueError unless every key is a legal one of ``group``."""
    for key in values:
        if key not in legal:
            near = difflib.get_close_matches(str(key), legal, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(legal)}"
            raise ValueError(f"{group}.{key}: no such key, got {values[key]!r}; {hint}")


def check_choice(field: str, value: Any, legal: Sequence[str]) -> None:
    """Raise a ValueError unless ``value`` is one of ``legal``."""
    if value not in legal:
        raise ValueError(f"{field}: must be one of {', '.join(legal)}, got {value!r}")


def check_whole_number(field: str, value: Any, least: int, null: bool = False, why: str = "") -> None:
    """Raise a ValueError unless ``value`` is a whole number of at least ``least``, or None where ``null``."""
    if value is None and null:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"{field}: must be a whole number of at least {least}{f' ({why})' if why else ''}"
            f"{' or null' if null else ''}, got {value!r}"
        )

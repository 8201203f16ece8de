"""From the `data` and `tokenizer` groups to a corpus."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .cache import open_cache
from .config import DataConfig, TokenizerConfig, parse_data, parse_tokenizer
from .corpus import Corpus
from .stream import open_streams
from .text import TextCorpus
from .tokenizer import Tokenizer, load_tokenizer, ready_tokenizer


def build_data(data: Mapping[str, Any], tokenizer: Mapping[str, Any], seed: int = 0) -> Corpus:
    """Reads, splits and tokenises a corpus, or opens it where that has been done.

    A synthetic task needs neither: its samples are drawn when asked for, in a vocabulary of its own.

    Args:
        data: the keys of `configs/data/*.yaml`.
        tokenizer: the keys of `configs/tokenizer/*.yaml`.
        seed: of the order of the training samples; the split and the held-out set do not depend on it.

    Raises:
        ValueError: an unknown key, an illegal value, or text that is missing, unreadable or too short.
    """
    cfg, vocabulary = parse_data(data), parse_tokenizer(tokenizer)
    if not isinstance(cfg, DataConfig):
        if data["name"] == "mix":
            from .mix import build_mix

            return build_mix(cfg, vocabulary, seed)
        from .synthetic import PREFIX, build_synthetic

        _check_default(f"{PREFIX}{cfg.task.name}", vocabulary)
        return build_synthetic(cfg, seed)
    return build_source(cfg, vocabulary, seed)


def build_source(cfg: DataConfig, vocabulary: TokenizerConfig, seed: int) -> Corpus:
    """A corpus of text. Raises ValueError as `build_data` does."""
    if cfg.name == "stream":
        from .streaming import build_stream

        return build_stream(cfg, vocabulary, seed)
    found = _open_tokens(cfg, vocabulary) if cfg.name == "tokens" else _open_cached(cfg, vocabulary)
    return TextCorpus(
        **found,
        seed=seed,
        seq_len=cfg.seq_len,
        isolate=cfg.isolate,
        val_samples=cfg.val_samples,
        pack=cfg.pack,
    )


def _open_cached(cfg: DataConfig, vocabulary: TokenizerConfig) -> dict[str, Any]:
    cache = open_cache(cfg, vocabulary)
    return {name: getattr(cache, name) for name in ("tokenizer", "fingerprint", "train", "val")}


def _open_tokens(cfg: DataConfig, vocabulary: TokenizerConfig) -> dict[str, Any]:
    folder = Path(cfg.path).expanduser()
    manifest, train, val = open_streams(folder)
    tokenizer = load_tokenizer(folder / "tokenizer")
    if tokenizer.vocab_size - 1 > 2 ** (8 * manifest.dtype.itemsize) - 1:
        raise ValueError(
            f"data.path: the shards of '{folder}' are {manifest.dtype.name} and its tokenizer has "
            f"{tokenizer.vocab_size} ids; tokenise again"
        )
    _check_same(folder, tokenizer, vocabulary)
    return {"tokenizer": tokenizer, "fingerprint": manifest.fingerprint, "train": train, "val": val}


def _check_same(folder: Path, own: Tokenizer, vocabulary: TokenizerConfig) -> None:
    """The folder's own tokenizer is used; one that is asked for must be the same."""
    if vocabulary.name == "saved":
        asked = ready_tokenizer(vocabulary)
        if asked.fingerprint != own.fingerprint:
            raise ValueError(
                f"tokenizer.path: '{folder}' was tokenised with another one, got '{vocabulary.path}'; "
                f"leave the tokenizer out or give '{folder / 'tokenizer'}'"
            )
    else:
        _check_default("tokens", vocabulary)


def _check_default(name: str, vocabulary: TokenizerConfig) -> None:
    if vocabulary.name != TokenizerConfig.name:
        raise ValueError(
            f"tokenizer: {name} has a vocabulary of its own, got {vocabulary.name!r}; leave it out"
        )

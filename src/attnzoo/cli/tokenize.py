"""`attnzoo tokenize`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from omegaconf import OmegaConf

from attnzoo.cli.overrides import order
from attnzoo.cli.tree import compose, opened, plain_errors
from attnzoo.data.config import check_whole_number, parse_data, parse_tokenizer
from attnzoo.data.manifest import Manifest, Shard
from attnzoo.data.tokenize import check, tokenize
from attnzoo.train.guard import RunFailed


def tokenize_command(options: argparse.Namespace) -> int:
    """Write a folder of shards, or check the one that is there."""
    folder = Path(options.out).expanduser()
    if options.check:
        return _check(folder, options.option)
    check_whole_number("--shard-tokens", options.shard_tokens, 1)
    check_whole_number("--processes", options.processes, 1)
    with plain_errors(), opened():
        config = compose(order(options.option))
    data, vocabulary = (
        OmegaConf.to_container(config[group], resolve=True) for group in ("data", "tokenizer")
    )
    manifest = tokenize(
        folder,
        parse_data(data),
        parse_tokenizer(vocabulary),
        options.shard_tokens,
        options.processes,
        _report if sys.stderr.isatty() else lambda shard: None,
    )
    print(f"{_counts(manifest)} in {folder}; train on it with data=tokens data.path={folder}")
    return 0


def _check(folder: Path, overrides: list[str]) -> int:
    if overrides:
        raise ValueError(f"--check: reads the folder alone, got {overrides[0]!r}; leave it out")
    bad = check(folder)
    if bad:
        raise RunFailed(f"{folder}: damaged: {', '.join(bad)}; copy or tokenise again")
    print("every shard is as it was written")
    return 0


def _report(shard: Shard) -> None:
    print(f"{shard.name}  {shard.tokens:,} tokens  {shard.documents:,} documents", file=sys.stderr)


def _counts(manifest: Manifest) -> str:
    parts = [
        f"{split}: {sum(s.tokens for s in shards):,} tokens, {sum(s.documents for s in shards):,} documents, "
        f"{len(shards):,} shards"
        for split, shards in manifest.shards.items()
    ]
    return "; ".join(parts)

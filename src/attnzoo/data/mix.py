"""Several sources by weight: where sample n comes from is a function of n."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch.utils.data import Dataset

from .config import DataConfig, TokenizerConfig, check_keys, parse_data
from .corpus import Corpus, Sample, TrainStream
from .manifest import key_of
from .schedule import Schedule
from .tokenizer import Tokenizer

_LONGEST = 100_000  # samples of a period
_SHARED = (  # of the mixture alone
    "seq_len",
    "batch_size",
    "pack",
    "isolate",
    "val_samples",
    "num_workers",
    "worker_timeout",
)


@dataclasses.dataclass(frozen=True)
class MixConfig:
    """The `data` group of a mixture; `configs/data/mix.yaml` says what each key means."""

    sources: Mapping[str, DataConfig]
    shares: Mapping[str, int]
    seq_len: int = 256
    batch_size: int = 8
    pack: int = 1
    isolate: bool = False
    val_samples: int | None = 256
    num_workers: int = 0
    worker_timeout: int = 300


def parse_mix(values: Mapping[str, Any]) -> MixConfig:
    """The checked `data` group of a mixture. Raises ValueError on an unknown key or an illegal value."""
    check_keys("data", values, ["name", "sources", *_SHARED])
    common = {key: values[key] for key in _SHARED if key in values}
    DataConfig(**common)  # which says what is wrong with them
    given = values.get("sources")
    if not isinstance(given, Mapping) or not given:
        raise ValueError(
            f"data.sources: data=mix needs at least one, got {given!r}; write "
            "data.sources={a:{weight:7,data:{name:tokens,path:...}},b:{weight:3,data:{...}}}"
        )
    # by name, since the order of a configuration's keys must not change the samples
    entries = {str(name): given[name] for name in sorted(given, key=str)}
    for name, entry in entries.items():
        field = f"data.sources.{name}"
        if not isinstance(entry, Mapping) or not {"weight", "data"} <= set(entry):
            raise ValueError(f"{field}: must be {{weight: number, data: {{name: ..., ...}}}}, got {entry!r}")
        check_keys(field, entry, ["weight", "data"])
    shares = _shares({name: entry["weight"] for name, entry in entries.items()})
    total = common.get("val_samples", MixConfig.val_samples)
    counts = Schedule(list(shares.values())).counts(total) if total else [None] * len(shares)
    parts = [
        1 if count == 0 else count for count in counts
    ]  # a source of no validation still has to be opened
    sources = {
        name: _parse_source(f"data.sources.{name}.data", entry["data"], common, part)
        for (name, entry), part in zip(entries.items(), parts, strict=True)
    }
    return MixConfig(sources, shares, **common)


def _parse_source(field: str, values: Any, common: Mapping[str, Any], val_samples: int | None) -> DataConfig:
    if not isinstance(values, Mapping) or "name" not in values:
        raise ValueError(f"{field}: must name a source, as {{name: text, path: ...}}, got {values!r}")
    if values["name"] == "mix" or str(values["name"]).startswith("synthetic/"):
        raise ValueError(f"{field}.name: must be a source of text, got {values['name']!r}")
    for key in values:
        if key in _SHARED:
            raise ValueError(f"{field}.{key}: belongs to the mixture, got {values[key]!r}; set data.{key}")
    try:
        return parse_data({**values, **common, "val_samples": val_samples})
    except ValueError as error:
        raise ValueError(str(error).replace("data.", f"{field}.", 1)) from None


def _shares(weights: Mapping[str, Any]) -> dict[str, int]:
    """Turns of each source in the shortest period that has their proportions exactly."""
    exact = {}
    for name, weight in weights.items():
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool) and math.isfinite(weight)
        if not number or weight <= 0:
            raise ValueError(f"data.sources.{name}.weight: must be a number above 0, got {weight!r}")
        exact[name] = Fraction(str(weight))
    total = sum(exact.values())
    parts = {name: weight / total for name, weight in exact.items()}
    period = math.lcm(*(part.denominator for part in parts.values()))
    if period > _LONGEST:
        raise ValueError(
            f"data.sources: weights must be whole shares of at most {_LONGEST} samples, got "
            f"{', '.join(str(w) for w in weights.values())}, which are exact after {period}; round them"
        )
    return {name: int(part * period) for name, part in parts.items()}


@dataclasses.dataclass(frozen=True)
class MixCorpus:
    """A `Corpus` of others. Packs, not samples, take turns: what reads on comes from one source."""

    names: tuple[str, ...]
    sources: tuple[Corpus, ...]
    schedule: Schedule
    pack: int = 1
    val_samples: int | None = None
    labelled: ClassVar[bool] = False

    @property
    def tokenizer(self) -> Tokenizer:
        """The one that all sources have."""
        return self.sources[0].tokenizer

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the names, the weights and the sources."""
        prints = [source.fingerprint for source in self.sources]
        return key_of("mix 1", list(zip(self.names, self.schedule.shares, prints, strict=True)))

    def place(self, n: int) -> tuple[int, int]:
        """(number of the source, which of its samples) of sample `n`."""
        turn, part = divmod(n, self.pack)
        source, k = self.schedule.turn(turn)
        return source, k * self.pack + part

    def sample(self, n: int) -> Sample:
        """Training sample `n`, which counts from 0 over all sources and epochs."""
        source, k = self.place(n)
        return {**self.sources[source].sample(k), "counter": torch.tensor(n)}

    def train_dataset(self, start: int, total: int) -> TrainStream:
        """Samples `start` to `total - 1`, in the order of the counter."""
        return TrainStream(self, start, total)

    def validation(self) -> MixedValidation:
        """Held-out samples of all sources, by the same schedule: their mean loss is the weighted one."""
        return MixedValidation(
            [source.validation() for source in self.sources], self.schedule, self.val_samples
        )


class MixedValidation(Dataset):
    """Item i is from the source that has turn i, as long as every source has samples left."""

    def __init__(self, parts: Sequence[Dataset], schedule: Schedule, samples: int | None) -> None:
        self.parts, self.schedule = parts, schedule
        sizes = [len(part) for part in parts]
        low, high = 0, samples or sum(sizes)
        while low < high:  # the largest number of which no source would have to give more than it has
            middle = (low + high + 1) // 2
            fits = all(n <= size for n, size in zip(schedule.counts(middle), sizes, strict=True))
            low, high = (middle, high) if fits else (low, middle - 1)
        self.samples = low

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, i: int) -> Sample:
        if not 0 <= i < len(self):
            raise IndexError(i)
        source, k = self.schedule.turn(i)
        return {**self.parts[source][k], "counter": torch.tensor(i)}


def build_mix(cfg: MixConfig, vocabulary: TokenizerConfig, seed: int) -> MixCorpus:
    """The corpus that a checked configuration describes. Raises ValueError as the sources do, and where they
    have different vocabularies.
    """
    from .build import build_source

    if vocabulary.name == "bpe":
        raise ValueError(
            "tokenizer: every source of a mixture would train its own, got 'bpe'; use tokenizer=saved, with "
            "one that attnzoo tokenize wrote, or tokenizer=bytes"
        )
    corpora = {name: build_source(source, vocabulary, seed) for name, source in cfg.sources.items()}
    (first, one), *others = corpora.items()
    for name, other in others:
        if other.tokenizer.fingerprint != one.tokenizer.fingerprint:
            raise ValueError(
                f"data.sources: all must have one vocabulary, got {one.tokenizer.vocab_size} ids in {first} "
                f"and {other.tokenizer.vocab_size} in {name} ({other.tokenizer.fingerprint[:8]}); "
                "tokenise them with tokenizer=saved"
            )
    schedule = Schedule(list(cfg.shares.values()))
    return MixCorpus(tuple(corpora), tuple(corpora.values()), schedule, cfg.pack, cfg.val_samples)

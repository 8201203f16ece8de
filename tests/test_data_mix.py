"""`data=mix`: shares exact to within one sample at every n, and both halves of the answer functions of n."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
from omegaconf import OmegaConf

from attnzoo.cli.overrides import order
from attnzoo.data import build_data
from attnzoo.data.config import parse_data
from attnzoo.data.mix import MixCorpus
from attnzoo.data.schedule import Schedule
from data_parts import BYTES, check_served, documents, shards_of, write_texts

CONFIGS = Path(__file__).parents[1] / "configs"


def some_shares() -> list[list[int]]:
    draw = random.Random(7)
    made = [[draw.randrange(1, draw.choice([4, 60])) for _ in range(draw.randrange(2, 9))] for _ in range(60)]
    return [[1], [5], [1, 1], [7, 2, 1], [1] * 7, [1, 1, 1, 97], [999, 1], *made]


def test_every_prefix_has_its_shares():
    """Counted turn by turn in whole numbers, over two periods and the edge between them."""
    for shares in some_shares():
        schedule, period = Schedule(shares), sum(shares)
        counts = [0] * len(shares)
        bound = 1 - Fraction(1, max(2, 2 * len(shares) - 2))
        for n in range(2 * period):
            source, before = schedule.turn(n)
            assert before == counts[source]
            counts[source] += 1
            assert schedule.counts(n + 1) == counts
            for share, count in zip(shares, counts, strict=True):
                assert abs(count - Fraction(share * (n + 1), period)) <= bound, (shares, n)
        assert counts == [2 * share for share in shares]


def test_far_turns_cost_nothing():
    schedule = Schedule([7, 2, 1])
    source, before = schedule.turn(10**18 + 3)
    assert (source, before - 10**17 * [7, 2, 1][source]) == schedule.turn(3)


@pytest.fixture
def mix(tmp_path: Path) -> dict:
    """Three sources: a small one that repeats, one of shards, and a stream."""
    caches = {"cache_dir": str(tmp_path / "cache"), "val_fraction": 0.2}
    small = {**write_texts(tmp_path / "small", documents(12, seed=3)), **caches}
    shards_of(tmp_path / "shards", write_texts(tmp_path / "texts", documents(60, seed=4)))
    rows = tmp_path / "rows"
    rows.mkdir()
    for number in range(3):
        lines = (f'{{"text": "row {i} of {number}, {"ab " * i}"}}\n' for i in range(20))
        (rows / f"{number}.jsonl").write_text("".join(lines))
    sources = {
        "small": (0.2, small),
        "shards": (0.7, {"name": "tokens", "path": str(tmp_path / "shards")}),
        "stream": (0.1, {"name": "stream", "path": str(rows), "window": 8, **caches}),
    }
    return {
        "name": "mix",
        "sources": {name: {"weight": weight, "data": data} for name, (weight, data) in sources.items()},
        "seq_len": 16,
        "val_samples": 20,
    }


def test_a_sample_is_one_of_its_source(mix: dict):
    corpus = build_data(mix, BYTES, seed=3)
    assert isinstance(corpus, MixCorpus) and corpus.names == ("shards", "small", "stream")
    alone = {
        name: build_data({**entry["data"], "seq_len": 16}, BYTES, seed=3)
        for name, entry in mix["sources"].items()
    }
    served, steps = {name: [] for name in alone}, 120
    for n in random.Random(1).sample(range(steps), steps):
        source, k = corpus.place(n)
        name = corpus.names[source]
        served[name].append(k)
        wanted, found = alone[name].sample(k), corpus.sample(n)
        assert found["counter"] == n and set(found) == set(wanted)
        assert all(torch.equal(found[key], wanted[key]) for key in found if key != "counter")
    assert {name: len(ks) for name, ks in served.items()} == {"small": 24, "shards": 84, "stream": 12}
    assert all(sorted(ks) == list(range(len(ks))) for ks in served.values())  # none left out, none twice
    assert alone["small"].sampler.samples_per_epoch * 16 < len(alone["small"].train)
    assert [corpus.place(n) for n in range(30)] == [build_data(mix, BYTES, 4).place(n) for n in range(30)]


def test_a_small_source_repeats_as_it_would_alone(mix: dict):
    corpus = build_data(mix, BYTES, seed=3)
    small = corpus.sources[corpus.names.index("small")]
    epoch = small.sampler.samples_per_epoch
    mine = [n for n in range(11 * epoch) if corpus.names[corpus.place(n)[0]] == "small"]
    assert len(mine) > 2 * epoch
    second = [corpus.sample(n)["tokens"].tolist() for n in mine[epoch : 2 * epoch]]
    assert second == [small.sample(k)["tokens"].tolist() for k in range(epoch, 2 * epoch)]
    assert Counter(map(tuple, second)) != Counter(
        tuple(small.sample(k)["tokens"].tolist()) for k in range(epoch)
    )


def test_loaders_serve_the_counters(mix: dict):
    check_served(build_data(mix, BYTES, 4), start=3, steps=3)


def test_packs_read_on_from_one_source(mix: dict):
    corpus = build_data({**mix, "pack": 4}, BYTES, seed=3)
    for pack in range(40):
        places = [corpus.place(4 * pack + i) for i in range(4)]
        assert len({source for source, _ in places}) == 1
        assert [k for _, k in places] == list(range(places[0][1], places[0][1] + 4)) and places[0][1] % 4 == 0
        tokens = [corpus.sample(4 * pack + i)["tokens"] for i in range(4)]
        assert all(a[-1] == b[0] for a, b in itertools.pairwise(tokens))


def test_validation_has_the_weights(mix: dict):
    corpus = build_data(mix, BYTES)
    held_out = corpus.validation()
    own = [source.validation() for source in corpus.sources]
    counts = Counter()
    for i, sample in enumerate(held_out):
        source, k = corpus.schedule.turn(i)
        counts[corpus.names[source]] += 1
        assert sample["counter"] == i and torch.equal(sample["tokens"], own[source][k]["tokens"])
    assert len(held_out) == 20 and counts == {"shards": 14, "small": 4, "stream": 2}
    with pytest.raises(IndexError):
        held_out[20]
    del mix["sources"]["stream"]
    mix["sources"]["small"]["weight"] = 0.7
    everything = build_data({**mix, "val_samples": None}, BYTES)
    sizes = [len(source.validation()) for source in everything.sources]
    assert len(everything.validation()) in (2 * min(sizes), 2 * min(sizes) + 1)


def test_fingerprint(mix: dict, tmp_path: Path):
    first = build_data(mix, BYTES).fingerprint
    backwards = dict(reversed(mix["sources"].items()))
    assert build_data({**mix, "sources": backwards}, BYTES, seed=9).fingerprint == first
    scaled = {name: {**entry, "weight": 10 * entry["weight"]} for name, entry in mix["sources"].items()}
    assert build_data({**mix, "sources": scaled}, BYTES).fingerprint == first
    other = {**mix["sources"], "small": {**mix["sources"]["small"], "weight": 0.3}}
    renamed = {("tiny" if name == "small" else name): entry for name, entry in mix["sources"].items()}
    found = {first, *(build_data({**mix, "sources": s}, BYTES).fingerprint for s in (other, renamed))}
    (tmp_path / "small" / "0000.txt").write_text("changed " * 20)
    assert len(found | {build_data(mix, BYTES).fingerprint}) == 4


def source(weight: Any = 1, **data: Any) -> dict:
    return {"weight": weight, "data": {"name": "stdlib", **data}}


BAD: dict[str, tuple[dict, str]] = {
    "none": ({"sources": {}}, r"data\.sources: data=mix needs at least one, got \{\}; write"),
    "a list": ({"sources": [1]}, r"data\.sources: data=mix needs at least one"),
    "no weight": ({"sources": {"a": {"data": {}}}}, r"data\.sources\.a: must be \{weight: number"),
    "typing slip": ({"sources": {"a": {**source(), "wait": 1}}}, r"data\.sources\.a\.wait: no such key"),
    "negative": (
        {"sources": {"a": source(-1)}},
        r"data\.sources\.a\.weight: must be a number above 0, got -1",
    ),
    "zero": ({"sources": {"a": source(0)}}, r"data\.sources\.a\.weight: must be .* got 0"),
    "infinite": ({"sources": {"a": source(float("inf"))}}, r"a\.weight: must be .* got inf"),
    "text": ({"sources": {"a": source("1")}}, r"a\.weight: must be .* got '1'"),
    "true": ({"sources": {"a": source(True)}}, r"a\.weight: must be .* got True"),
    "too fine": (
        {"sources": {"a": source(1), "b": source(0.1234567)}},
        r"data\.sources: weights must be whole shares of at most 100000 samples, got 1, 0\.1234567, which",
    ),
    "no source": (
        {"sources": {"a": {"weight": 1, "data": {}}}},
        r"data\.sources\.a\.data: must name a source",
    ),
    "mixture": (
        {"sources": {"a": {"weight": 1, "data": {"name": "mix"}}}},
        r"data\.sources\.a\.data\.name: must be a source of text, got 'mix'",
    ),
    "task": ({"sources": {"a": source(name="synthetic/mqar")}}, r"a\.data\.name: must be a source of text"),
    "shared key": (
        {"sources": {"a": source(seq_len=4)}},
        r"data\.sources\.a\.data\.seq_len: belongs to the mixture, got 4; set data\.seq_len",
    ),
    "bad key inside": ({"sources": {"a": source(pth=4)}}, r"data\.sources\.a\.data\.pth: no such key"),
    "bad value inside": (
        {"sources": {"a": source(val_fraction=2)}},
        r"data\.sources\.a\.data\.val_fraction: ",
    ),
    "unread key": ({"sources": {"a": source()}, "max_bytes": 3}, r"data\.max_bytes: no such key"),
    "bad value": ({"sources": {"a": source()}, "seq_len": 0}, r"data\.seq_len: must be a whole number"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_line(case: str):
    values, message = BAD[case]
    with pytest.raises(ValueError, match=message) as caught:
        parse_data({"name": "mix", **values})
    assert "\n" not in str(caught.value)


def test_one_vocabulary(mix: dict, tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"tokenizer: every source of a mixture would train its own, got 'bpe'"
    ):
        build_data(mix, {"name": "bpe", "vocab_size": 300})
    texts = {"name": "text", "path": str(tmp_path / "texts"), "val_fraction": 0.2}
    shards_of(tmp_path / "bpe", texts, tokenizer={"name": "bpe", "vocab_size": 300})
    mix["sources"]["shards"]["data"]["path"] = str(tmp_path / "bpe")
    with pytest.raises(
        ValueError, match=r"data\.sources: all must have one vocabulary, got \d+ ids in shards"
    ):
        build_data(mix, BYTES)
    saved = {"name": "saved", "path": str(tmp_path / "bpe" / "tokenizer")}
    assert len({source.tokenizer.fingerprint for source in build_data(mix, saved).sources}) == 1


def test_the_command_line_names_sources(tmp_path: Path):
    given = "data.sources={a:{weight:7,data:{name:text,path:x}},b:{weight:3,data:{name:tokens,path:y}}}"
    with hydra.initialize_config_dir(str(CONFIGS), version_base=None):
        for words in ([given], [given, "data.sources.a.weight=9"], [given, "data.seq_len=64"]):
            config = hydra.compose("config", order(["data=mix", *words]))
            parsed = parse_data(OmegaConf.to_container(config.data))
            assert list(parsed.sources) == ["a", "b"] and parsed.sources["b"].path == "y"
            assert parsed.shares == {"a": 3 if "9" in words[-1] else 7, "b": 1 if "9" in words[-1] else 3}
            assert parsed.sources["a"].seq_len == parsed.seq_len == (64 if "64" in words[-1] else 256)

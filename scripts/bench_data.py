"""How many samples a second each kind of corpus serves: shards, a stream, a mixture, against the cache.

    python scripts/bench_data.py [--rounds 9] [--megabytes 8] [--shards 200]

The arms are made of the same text, read in one process without a loader's workers, and take turns in an order
that alternates from round to round; a ratio is the median over rounds of the arm's samples a second by the
plain cache's of the same round. Before the rounds every arm has served some samples, so that files are mapped
and verified. A round of the stream is as many blocks as it takes, tokenised as they come, with a tokenizer of
bytes and with a BPE. Results go to ``benchmarks/results/data.csv``.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import pathlib
import statistics
import tempfile
import time
from typing import Any

import datasets
from machine import machine

from attnzoo.data import Corpus, build_data
from attnzoo.data.config import parse_data, parse_tokenizer
from attnzoo.data.corpora import texts_of
from attnzoo.data.tokenize import tokenize

OUT = pathlib.Path(__file__).parents[1] / "benchmarks" / "results" / "data.csv"
SEQ_LEN, WINDOW, SAMPLES = 256, 256, 1024


def arms(root: pathlib.Path, megabytes: int, shards: int, vocabulary: dict[str, Any]) -> dict[str, Corpus]:
    """Every arm by name, of the same documents and vocabulary."""
    source = {"name": "stdlib", "max_bytes": megabytes << 20, "cache_dir": str(root / "cache")}
    texts = list(texts_of(parse_data(source)))
    tokens = root / "tokens"
    whole = build_data(source, vocabulary)
    size = len(whole.train) // shards
    tokenize(tokens, parse_data(source), parse_tokenizer(vocabulary), size)
    rows = root / "rows"
    rows.mkdir()
    for number in range(4):
        part = datasets.Dataset.from_dict({"text": texts[number::4]})
        part.to_parquet(rows / f"{number}.parquet")
    shared = {"seq_len": SEQ_LEN}
    saved = {"name": "saved", "path": str(tokens / "tokenizer")}
    streamed = {"name": "stream", "path": str(rows), "window": WINDOW, "cache_dir": source["cache_dir"]}
    stored = {"name": "tokens", "path": str(tokens)}
    if vocabulary["name"] == "bytes":
        saved = vocabulary
    parts = {
        "cache": {"weight": 7, "data": source},
        "shards": {"weight": 3, "data": stored},
    }
    return {
        "cache": build_data({**source, **shared}, saved),
        f"{len(list(tokens.glob('train-*')))} shards": build_data({**stored, **shared}, saved),
        "mix of both": build_data({"name": "mix", "sources": parts, **shared}, saved),
        "stream": build_data({**streamed, **shared}, saved),
    }


def measure(corpora: dict[str, Corpus], rounds: int) -> dict[str, list[float]]:
    """Samples a second of each arm in each round."""
    at = dict.fromkeys(corpora, 0)
    speeds: dict[str, list[float]] = {name: [] for name in corpora}
    for i in range(-1, rounds):
        for name in corpora if i % 2 else reversed(corpora):
            start = time.perf_counter()
            for n in range(at[name], at[name] + SAMPLES):
                corpora[name].sample(n)
            seconds = time.perf_counter() - start
            at[name] += SAMPLES
            if i >= 0:
                speeds[name].append(SAMPLES / seconds)
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--megabytes", type=int, default=8, help="of text")
    parser.add_argument("--shards", type=int, default=200, help="about so many")
    options = parser.parse_args()
    datasets.disable_progress_bars()
    rows = []
    for vocabulary in ({"name": "bytes"}, {"name": "bpe", "vocab_size": 2048}):
        with tempfile.TemporaryDirectory() as folder:
            corpora = arms(pathlib.Path(folder), options.megabytes, options.shards, vocabulary)
            speeds = measure(corpora, options.rounds)
        base = speeds["cache"]
        for name, values in speeds.items():
            ratios = [a / b for a, b in zip(values, base, strict=True)]
            low, mid, high = statistics.quantiles(ratios, n=4)
            rows.append(
                {
                    "tokenizer": vocabulary["name"],
                    "corpus": name,
                    "ratio": f"{mid:.3f}",
                    "q1": f"{low:.3f}",
                    "q3": f"{high:.3f}",
                    "samples_per_s": round(statistics.median(values)),
                    "seq_len": SEQ_LEN,
                    "megabytes": options.megabytes,
                    "rounds": options.rounds,
                    **machine("numpy", "datasets"),
                }
            )
            print(json.dumps(dict(itertools.islice(rows[-1].items(), 6))), flush=True)
    with OUT.open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    print(f"wrote {OUT}")


if __name__ == "__main__":
    main()

"""Synthetic tasks: their answers by other means, their dials, and samples that are functions of a counter."""

from __future__ import annotations

import itertools
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from attnzoo.cli.tree import config_folder
from attnzoo.data import IGNORED, SymbolTokenizer, build_data, load_tokenizer, targets
from attnzoo.data.synthetic import TASKS, SyntheticCorpus, show
from attnzoo.data.synthetic.copying import Compression, LengthExtrapolation, SelectiveCopying
from attnzoo.data.synthetic.corpus import generator
from attnzoo.data.synthetic.functions import Memorisation, Regression
from attnzoo.data.synthetic.lookup import Induction, Needle
from attnzoo.data.synthetic.recall import MQAR, FuzzyRecall, NoisyRecall
from attnzoo.data.synthetic.states import S3, S5, Parity

# each task at dials that are not the defaults, and a length with room to spare
CASES = [
    (MQAR(pairs=5, distance=3, keys=7, values=3), 25),
    (MQAR(pairs=4, keys=4, values=9), 12),
    (NoisyRecall(pairs=4, keys=6, values=5, noise=3), 21),
    (FuzzyRecall(pairs=3, key_length=2, value_length=3, key_letters=3, value_letters=4), 50),
    (FuzzyRecall(pairs=2, key_length=1, value_length=1, key_letters=2, value_letters=2), 13),
    (Induction(symbols=5), 30),
    (Needle(needles=2, keys=3, symbols=4), 24),
    (Needle(needles=1, depth=0.5, keys=3, symbols=4), 15),
    (SelectiveCopying(items=4, symbols=3), 17),
    (Compression(items=5, symbols=3), 16),
    (LengthExtrapolation(symbols=5), 22),
    (Parity(), 20),
    (Parity(k=3), 20),
    (Parity(k=4, every=False), 11),
    (S3(), 20),
    (S3(moves="all"), 20),
    (S5(), 30),
    (S5(moves="pair", every=False), 12),
    (Memorisation(keys=9, values=4), 30),
    (Regression(dim=2, levels=9), 24),
    (Regression(dim=1, levels=4), 15),
]
IDS = [f"{task.name}-{i}" for i, (task, _) in enumerate(CASES)]
DIAL = {"pairs": 3, "distance": 2, "keys": 21, "values": 23, "noise": 5, "key_length": 3, "value_length": 3,
        "key_letters": 5, "value_letters": 5, "symbols": 13, "needles": 2, "depth": 0.25, "items": 5, "k": 4,
        "every": False, "moves": "all", "dim": 2, "levels": 7}  # fmt: skip


# What is asked, recomputed from the definition: lists of tokens in, {position: answer} out.


def mqar(task: MQAR, tokens: list[int]) -> dict[int, int]:
    told = 2 * task.pairs
    memory = dict(zip(tokens[0:told:2], tokens[1:told:2], strict=True))
    assert len(memory) == task.pairs and all(1 <= key <= task.keys < memory[key] for key in memory)
    assert not any(tokens[told : told + task.distance])
    asked = {i: memory[token] for i, token in enumerate(tokens[told:], told) if token}
    assert len(asked) == task.pairs == len({tokens[i] for i in asked})
    return asked


def noisy_recall(task: NoisyRecall, tokens: list[int]) -> dict[int, int]:
    memory, asked = {}, {}
    for i, token in enumerate(tokens):
        if token < task.keys and token in memory:
            assert len(memory) == task.pairs  # everything was told before anything is asked
            asked[i] = memory[token]
        elif token < task.keys:
            memory[token] = tokens[i + 1]
            assert task.keys <= memory[token] < task.keys + task.values
    assert len(asked) == task.pairs == len({tokens[i] for i in asked})
    return asked


def fuzzy_recall(task: FuzzyRecall, tokens: list[int]) -> dict[int, int]:
    width, memory, asked = task.key_length + task.value_length, {}, {}
    for start in range(0, len(tokens) - width + 1, width):
        word = tokens[start : start + width]
        if word[0] == task.key_letters + task.value_letters:
            break
        key, value = tuple(word[: task.key_length]), word[task.key_length :]
        assert all(letter < task.key_letters <= v for letter in key for v in value)
        if key in memory:
            assert memory[key] == value and len(memory) == task.pairs
            asked |= {start + task.key_length - 1 + j: letter for j, letter in enumerate(value)}
        memory[key] = value
    return asked


def induction(task: Induction, tokens: list[int]) -> dict[int, int]:
    asked = {}
    for i, token in enumerate(tokens):
        before = [j for j in range(i) if tokens[j] == token]
        if before:
            asked[i] = tokens[before[-1] + 1]
    return asked


def needle(task: Needle, tokens: list[int]) -> dict[int, int]:
    mark, question = task.symbols + task.keys, task.symbols + task.keys + 1
    starts = [i for i, token in enumerate(tokens) if token == mark]
    memory = {tokens[i + 1]: tokens[i + 2] for i in starts}
    assert len(memory) == task.needles and all(value < task.symbols <= key for key, value in memory.items())
    if task.depth is not None:
        hay = len(tokens) - 5 * task.needles
        assert abs(starts[0] - task.depth * hay) <= 0.5
    asked = {i + 1: memory[tokens[i + 1]] for i, token in enumerate(tokens) if token == question}
    assert sorted(asked) == list(range(len(tokens) - 2 * task.needles + 1, len(tokens), 2))
    return asked


def selective_copying(task: SelectiveCopying, tokens: list[int]) -> dict[int, int]:
    start = tokens.index(1)
    assert tokens[start:] == [1] * task.items
    return dict(enumerate((token for token in tokens[:start] if token), start))


def compression(task: Compression, tokens: list[int]) -> dict[int, int]:
    start = tokens.index(task.symbols + task.items + 1) + 1
    places = [token - task.symbols for token in tokens[start:]]
    assert sorted(places) == list(range(task.items))
    return {start + i: tokens[place] for i, place in enumerate(places)}


def length_extrapolation(task: LengthExtrapolation, tokens: list[int]) -> dict[int, int]:
    size, most = tokens.index(task.symbols), (len(tokens) - 1) // 2
    assert most // 2 < size <= most
    assert tokens[size + 1 : 2 * size + 1] == tokens[:size]
    assert set(tokens[2 * size + 1 :]) <= {task.symbols + 1}
    return dict(enumerate(tokens[:size], size))


def parity(task: Parity, tokens: list[int]) -> dict[int, int]:
    window = task.k or len(tokens)
    answers = {i: 2 + sum(tokens[max(0, i + 1 - window) : i + 1]) % 2 for i in range(len(tokens))}
    return answers if task.every else dict([answers.popitem()])


def states(task: S3 | S5, tokens: list[int]) -> dict[int, int]:
    things = list("abcde")[: task.size]
    orders = sorted(map("".join, itertools.permutations(things)))
    moves = {
        "swaps": [[*range(i), i + 1, i, *range(i + 2, task.size)] for i in range(task.size - 1)],
        "pair": [[1, 0, *range(2, task.size)], [*range(1, task.size), 0]],
        "all": [["abcde".index(c) for c in order] for order in orders],
    }[task.moves]
    answers = {}
    for i, token in enumerate(tokens):
        things = [things[place] for place in moves[token]]
        answers[i] = len(moves) + orders.index("".join(things))
    return answers if task.every else dict([answers.popitem()])


def regression(task: Regression, tokens: list[int]) -> dict[int, int]:
    """The shown y are asked for, and some w in [-1, 1] explains all of them within their rounding."""
    width, top = task.dim + 1, task.levels - 1
    points = [tokens[i : i + width] for i in range(0, len(tokens) - width + 1, width)]
    x = np.array([[2 * level / top - 1 for level in point[:-1]] for point in points]) / task.dim
    y = np.array([2 * (point[-1] - task.levels) / top - 1 for point in points])
    room = 1 / top + 1e-9
    found = linprog(np.zeros(task.dim), np.vstack([x, -x]), np.hstack([y + room, room - y]), bounds=(-1, 1))
    assert found.success
    return {i * width + task.dim - 1: points[i][-1] for i in range(task.dim, len(points))}


ORACLES = {
    oracle.__name__: oracle
    for oracle in (
        mqar, noisy_recall, fuzzy_recall, induction, needle, selective_copying, compression,
        length_extrapolation, parity, regression,
    )
} | {"s3": states, "s5": states}  # fmt: skip


@pytest.mark.parametrize(("task", "length"), CASES, ids=IDS)
def test_answers_follow_from_the_definition(task, length: int) -> None:
    corpus, table = SyntheticCorpus(task, seed=3, seq_len=length), {}
    for sample in map(corpus.sample, range(60)):
        tokens, labels = sample["tokens"].tolist(), sample["labels"].tolist()
        assert len(tokens) == len(labels) == length
        asked = {i: label for i, label in enumerate(labels) if label != IGNORED}
        assert asked and all(0 <= i < task.num_symbols for i in [*tokens, *asked.values()])
        if task.name == "memorisation":  # one value per key, in all samples
            assert len(asked) == length and all(label >= task.keys for label in labels)
            assert all(
                table.setdefault(key, label) == label for key, label in zip(tokens, labels, strict=True)
            )
        else:
            assert asked == ORACLES[task.name](task, tokens)


@pytest.mark.parametrize("name", sorted(set(TASKS) - {"memorisation", "regression", "s5"}))
def test_no_answer_is_a_good_guess(name: str) -> None:
    """A task with a favourite answer would measure less than it says."""
    corpus = SyntheticCorpus(TASKS[name](), seed=1, seq_len=64)
    labels = torch.cat([corpus.sample(n)["labels"] for n in range(3000)])
    counts = torch.bincount(labels[labels != IGNORED]).float()
    counts = counts[counts > 0]
    assert len(counts) > 1 and counts.max() < 1.5 * counts.mean() and counts.min() > 0.5 * counts.mean()


def test_all_orders_of_five_things_come_up() -> None:
    corpus = SyntheticCorpus(S5(), seed=1, seq_len=64)
    labels = torch.stack([corpus.sample(n)["labels"] for n in range(300)])
    assert len(labels[:, 62:].unique()) == 120  # an even and an odd number of swaps


@pytest.mark.parametrize("name", sorted(TASKS))
def test_docstrings_show_a_real_sample(name: str) -> None:
    kind = TASKS[name]
    pattern = r"Example: sample (\d+) of seed 0 of (.*) at (\d+) tokens\n\n(.*)\n(.*)\n"
    n, made, length, *lines = re.search(pattern, kind.__doc__).groups()
    task = eval(made, {kind.__name__: kind})
    sample = SyntheticCorpus(task, seed=0, seq_len=int(length)).sample(int(n))
    text = show(sample["tokens"].numpy(), sample["labels"].numpy())
    assert [line.strip() for line in lines] == text.splitlines()


@pytest.mark.parametrize(("task", "length"), CASES, ids=IDS)
def test_a_sample_is_a_function_of_task_seed_and_counter(task, length: int) -> None:
    corpus = SyntheticCorpus(task, seed=1, seq_len=length, val_samples=20)
    later = pickle.loads(pickle.dumps(SyntheticCorpus(task, seed=1, seq_len=length)))
    other = SyntheticCorpus(task, seed=2, seq_len=length, val_samples=20)

    def rows(samples) -> set[tuple[int, ...]]:
        return {(*sample["tokens"].tolist(), *sample["labels"].tolist()) for sample in samples}

    ahead = later.sample(17)  # in any order
    first = [corpus.sample(n) for n in range(20)]
    assert all(torch.equal(first[17][key], ahead[key]) for key in ahead) and first[17]["counter"] == 17
    assert rows(corpus.validation()) == rows(other.validation())  # the same whatever the seed


@pytest.mark.parametrize("name", sorted(TASKS))
def test_no_sample_comes_twice(name: str) -> None:
    one, two = (SyntheticCorpus(TASKS[name](), seed, seq_len=64, val_samples=400) for seed in (1, 2))
    samples = [*map(one.sample, range(400)), *map(two.sample, range(400)), *one.validation()]
    assert len({tuple(sample["tokens"].tolist()) for sample in samples}) == 1200


def test_far_counters_are_different_samples() -> None:
    corpus = SyntheticCorpus(MQAR(), seed=1, seq_len=32)
    tokens = {tuple(corpus.sample(n)["tokens"].tolist()) for n in (0, 1, 2**31, 2**33, 2**40, 2**40 + 1)}
    assert len(tokens) == 6


def test_the_draws_of_two_samples_do_not_overlap() -> None:
    key = np.array([1, 2], dtype=np.uint64)
    draws = [set(generator(key, n).integers(2**62, size=1000).tolist()) for n in range(3)]
    assert len(set.union(*draws)) == 3000


def test_longer_validation() -> None:
    corpus = SyntheticCorpus(LengthExtrapolation(symbols=5), seed=1, seq_len=16, val_seq_len=32)
    longest = max((corpus.sample(n)["labels"] != IGNORED).sum() for n in range(200))
    shortest = min((sample["labels"] != IGNORED).sum() for sample in corpus.validation())
    assert corpus.validation()[0]["tokens"].shape == (32,) and longest == 7 < shortest


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_dial_changes_the_fingerprint(name: str) -> None:
    kind = TASKS[name]
    prints = [SyntheticCorpus(kind(), 1, 64).fingerprint, SyntheticCorpus(kind(), 1, 64, 128).fingerprint]
    assert prints[0] == SyntheticCorpus(kind(), 2, 32, val_samples=3).fingerprint
    prints += [SyntheticCorpus(kind(**{dial: DIAL[dial]}), 1, 64).fingerprint for dial in kind().dials()]
    assert len(set(prints)) == len(prints)


def test_tasks_have_different_fingerprints() -> None:
    assert len({SyntheticCorpus(kind(), 1, 64).fingerprint for kind in TASKS.values()}) == len(TASKS)


def test_each_task_has_a_config_and_each_config_its_dials() -> None:
    import yaml

    files = {
        path.stem: yaml.safe_load(path.read_text()) for path in (config_folder() / "data/synthetic").glob("*")
    }
    assert set(files) == set(TASKS)
    for name, values in files.items():
        dials = TASKS[name]().dials()
        assert values["name"] == f"synthetic/{name}" and dials.items() <= values.items()
        build_data(values, {"name": "bytes"}, seed=1).sample(0)  # the length has room for the dials


BAD = [
    ("mqar", {"pairs": 0}, "data.pairs: must be a whole number of at least 1, got 0"),
    ("mqar", {"pairs": 2.5}, "data.pairs: must be a whole number of at least 1, got 2.5"),
    ("mqar", {"pairs": 17}, "data.pairs: must be at most data.keys=16, got 17"),
    ("mqar", {"keys": 10**6}, "data.keys: must be at most 65536, got 1000000"),
    ("mqar", {"seq_len": 20}, "data.seq_len: must be at least 24 for synthetic/mqar at these dials, got 20"),
    ("mqar", {"val_seq_len": 20}, "data.val_seq_len: must be at least 24"),
    ("mqar", {"pears": 3}, "data.pears: no such key, got 3; did you mean 'pairs'?"),
    ("mqar", {"every": True}, "data.every: no such key"),
    ("mqar", {"pack": 2}, "data.pack: no such key"),
    ("mqar", {"val_samples": 0}, "data.val_samples: must be a whole number of at least 1, got 0"),
    ("needle", {"depth": 1.5}, "data.depth: must be a number from 0 to 1 or null, got 1.5"),
    ("needle", {"needles": 9}, "data.needles: must be at most data.keys=8, got 9"),
    ("parity", {"k": 0}, "data.k: must be a whole number of at least 1 or null, got 0"),
    ("parity", {"every": "yes"}, "data.every: must be true or false, got 'yes'"),
    ("s5", {"moves": "swap"}, "data.moves: must be one of swaps, pair, all, got 'swap'"),
    (
        "fuzzy_recall",
        {"pairs": 5, "key_letters": 2},
        "data.pairs: must be at most the 4 words of 2 letters, got 5",
    ),
    ("regression", {"levels": 1}, "data.levels: must be a whole number of at least 2, got 1"),
    ("mqr", {}, "data.name: must be one of synthetic/"),
]


@pytest.mark.parametrize(("name", "values", "message"), BAD, ids=[f"{n}-{'-'.join(v)}" for n, v, _ in BAD])
def test_a_bad_dial_is_one_clear_line(name: str, values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        build_data({"name": f"synthetic/{name}", **values}, {"name": "bytes"})
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_text_is_refused() -> None:
    with pytest.raises(ValueError, match="tokenizer: synthetic/s3 has a vocabulary of its own, got 'bpe'"):
        build_data({"name": "synthetic/s3"}, {"name": "bpe", "vocab_size": 300})


def test_symbols_are_written_as_numbers(tmp_path: Path) -> None:
    tokenizer = SymbolTokenizer(12)
    ids = [0, 11, 3]
    assert tokenizer.decode(ids) == "0 11 3" and tokenizer.encode(" 0 11\n3") == ids
    assert (tokenizer.eos_id, tokenizer.vocab_size, tokenizer.byte_length(ids)) == (12, 13, 0)
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (again.fingerprint, again.vocab_size) == (tokenizer.fingerprint, 13)
    assert again.fingerprint != SymbolTokenizer(13).fingerprint
    for text in ("12", "-1", "a", "1.0", "²"):
        with pytest.raises(ValueError, match="symbols are numbers from 0 to 11"):
            tokenizer.encode(text)


def test_labels_are_the_targets_and_padding_is_none() -> None:
    sample = {"tokens": torch.tensor([1, 2, 3]), "labels": torch.tensor([IGNORED, 5, 6])}
    inputs, labels, segments = targets(sample | {"segment_ids": torch.tensor([1, 1, 0])})
    assert inputs.tolist() == [1, 2, 3] and labels.tolist() == [IGNORED, 5, IGNORED]
    assert segments.tolist() == [1, 1, 0]

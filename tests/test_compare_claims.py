"""The papers' claims beside made-up runs that bear them out, contradict them, or cannot tell."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

import attnzoo
from attnzoo.compare import comparison
from attnzoo.compare.comparison import compare
from attnzoo.compare.select import Selection, from_folders
from attnzoo.compare.statistics import Method
from run_folders import run_folder

BASE = [2.0, 2.02, 1.99]
CLEARLY_LOWER, CLEARLY_HIGHER = [1.9, 1.93, 1.885], [2.1, 2.13, 2.085]
UNCLEAR, CLOSE = [1.9, 2.05, 2.2], [2.001, 2.0215, 1.9905]


@dataclass(frozen=True)
class Claim:
    """As on a card."""

    text: str = "a promise"
    metric: str = ""
    expect: str = ""
    against: str = "mha"
    where: str = "340M, 15B tokens"


def judged(
    monkeypatch: pytest.MonkeyPatch, claim: Any, selection: Selection, baseline: str | None = None
) -> list[dict[str, str]]:
    """The verdicts on a claim of mla's card."""
    card = replace(attnzoo.card("mla"), claims=(claim,))
    monkeypatch.setattr(comparison, "card", lambda name: card if name == "mla" else attnzoo.card(name))
    comparison._card.cache_clear()
    try:
        found = compare(selection, Method(), baseline=baseline)
    finally:
        comparison._card.cache_clear()
    return [one for one in found["claims"] if one["arm"].startswith("mla")]


def runs(folder: Path, mla: list[float], base: str = "mha", **more: Any) -> Selection:
    return from_folders(
        [
            run_folder(folder / f"{name}-{seed}", name, seed, bpb, **(more if name == "mla" else {}))
            for name, values in ((base, BASE), ("mla", mla))
            for seed, bpb in enumerate(values, 1)
        ]
    )


@pytest.mark.parametrize(
    ("expect", "values", "verdict"),
    [
        ("lower", CLEARLY_LOWER, "reproduced"),
        ("lower", CLEARLY_HIGHER, "contradicted"),
        ("lower", UNCLEAR, "not distinguishable"),
        ("higher", CLEARLY_HIGHER, "reproduced"),
        ("higher", CLEARLY_LOWER, "contradicted"),
        ("equal", CLOSE, "reproduced"),
        ("equal", BASE, "reproduced"),
        ("equal", CLEARLY_HIGHER, "contradicted"),
        ("equal", UNCLEAR, "not distinguishable"),
        ("equal", CLEARLY_LOWER, "reproduced"),  # better than equal keeps the promise
    ],
)
def test_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expect: str, values: list[float], verdict: str
) -> None:
    (one,) = judged(monkeypatch, Claim(metric="val_bpb", expect=expect), runs(tmp_path, values))
    assert one["verdict"] == verdict, one
    assert one["where"] == "340M, 15B tokens" and "mha" in one["reason"]


@pytest.mark.parametrize(
    ("expect", "per_token", "verdict"),
    [
        ("lower", 16, "reproduced"),
        ("lower", 256, "contradicted"),
        ("lower", 128, "contradicted"),  # counted: equal is not lower
        ("equal", 128, "reproduced"),
        ("equal", 256, "contradicted"),
    ],
)
def test_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expect: str, per_token: int, verdict: str
) -> None:
    folders = runs(tmp_path, BASE, cache_bytes_per_token=per_token)
    (one,) = judged(monkeypatch, Claim(metric="cache_bytes", expect=expect), folders)
    assert one["verdict"] == verdict, one


@pytest.mark.parametrize(
    ("claim", "reason"),
    [
        (Claim(), "needs what this library does not run"),
        ("a sentence alone", "needs what this library does not run"),
        (Claim(metric="mmlu", expect="higher"), "mmlu is not measured here"),
        (Claim(metric="val_bpb", expect="lower", against="gqa"), "no arm is gqa"),
        (Claim(metric="accuracy:mqar", expect="higher"), "no run measures it here"),
    ],
)
def test_not_tested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, claim: Any, reason: str) -> None:
    (one,) = judged(monkeypatch, claim, runs(tmp_path, CLEARLY_LOWER))
    assert (one["verdict"], one["reason"]) == ("not tested", reason)


def test_a_single_seed_tests_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [run_folder(tmp_path / name, name, 1, bpb) for name, bpb in (("mha", 2.0), ("mla", 1.0))]
    (one,) = judged(monkeypatch, Claim(metric="val_bpb", expect="lower"), from_folders(folders))
    assert (one["verdict"], one["reason"]) == ("not tested", "a single seed")


def test_it_is_judged_against_the_arm_it_names_whatever_the_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = runs(tmp_path, CLEARLY_LOWER, base="gqa")
    claim = Claim(metric="val_bpb", expect="lower", against="gqa")
    for baseline in ("gqa", "mla"):
        (one,) = judged(monkeypatch, claim, folders, baseline)
        assert one["verdict"] == "reproduced" and "gqa" in one["reason"]


def test_what_was_matched_is_no_evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That a budget is met says nothing of a paper that promises it."""
    found = runs(tmp_path, CLEARLY_LOWER)
    members = [
        replace(member, matched={"budget": "params"}) if member.arm == "mla" else member
        for member in found.members
    ]
    selection = replace(found, members=members)
    (one,) = judged(monkeypatch, Claim(metric="params", expect="equal"), selection)
    assert (one["verdict"], one["reason"]) == ("not tested", "params was matched")
    (one,) = judged(monkeypatch, Claim(metric="val_bpb", expect="lower"), selection)
    assert one["verdict"] == "reproduced"


def test_a_composition_is_not_the_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = runs(tmp_path, CLEARLY_LOWER, attention={"add": ["moh"]})
    assert judged(monkeypatch, Claim(metric="val_bpb", expect="lower"), folders) == []


def test_tasks_are_judged_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = {"mqar": {"mha": [0.3, 0.31, 0.29], "mla": [0.9, 0.92, 0.91]},
                  "parity": {"mha": [0.9, 0.92, 0.91], "mla": [0.3, 0.31, 0.29]}}  # fmt: skip
    folders = [
        run_folder(tmp_path / f"{task}-{name}-{seed}", name, seed, None, val_accuracy=value,
                   config={"data.name": f"synthetic/{task}"}, environment={"data_fingerprint": task})
        for task, arms in accuracies.items() for name, values in arms.items()
        for seed, value in enumerate(values, 1)
    ]  # fmt: skip
    selection = from_folders(folders)
    every = judged(monkeypatch, Claim(metric="accuracy", expect="higher"), selection)
    assert [(one["setting"], one["verdict"]) for one in every] == [
        ("data=synthetic/mqar", "reproduced"),
        ("data=synthetic/parity", "contradicted"),
    ]
    (one,) = judged(monkeypatch, Claim(metric="accuracy:parity", expect="higher"), selection)
    assert one["verdict"] == "contradicted"
    (one,) = judged(monkeypatch, Claim(metric="params", expect="equal"), selection)  # the same in both
    assert one["verdict"] == "reproduced" and "all 2 settings" in one["reason"]

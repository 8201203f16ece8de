"""Verdicts on made-up runs: what is measured, what is counted, and what cannot be told."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from scipy import stats

from attnzoo.compare.metrics import METRICS, context_gain, curve
from attnzoo.compare.runs import read_run
from run_folders import EDGES, LOSSES, MHA, MLA, arms, compared, result, run_folder, task_folder


def test_a_verdict_over_seeds(tmp_path: Path) -> None:
    found = compared(*arms(tmp_path, mla=MLA, mha=MHA))
    assert found["baseline"] == "mha" and [arm["label"] for arm in found["arms"]] == ["mha", "mla"]
    row = result(found, "mla")
    assert row["verdict"] == "better" and row["n"] == 3 and row["seeds_needed"] is None
    assert row["values"] == {"1": 1.9, "2": 1.93, "3": 1.885}
    assert row["difference"] == pytest.approx(sum(MLA) / 3 - sum(MHA) / 3)
    assert row["ratio"] == pytest.approx(sum(MLA) / sum(MHA))
    assert row["p"] == row["p_adjusted"] == pytest.approx(stats.ttest_rel(MLA, MHA).pvalue)
    assert row["low"] < row["difference"] < row["high"] < 0
    assert result(found, "mha")["verdict"] == "baseline" and result(found, "mha")["p"] is None
    assert result(compared(*arms(tmp_path / "2", mha=MLA, mla=MHA)), "mla")["verdict"] == "worse"


def test_higher_is_better_where_it_is(tmp_path: Path) -> None:
    speeds = {"mha": [101.0, 102.0, 104.0], "mla": [120.0, 122.0, 123.0]}
    folders = [
        run_folder(tmp_path / f"{name}{seed}", name, seed, tokens_per_second=speed)
        for name, every in speeds.items()
        for seed, speed in enumerate(every, 1)
    ]
    assert result(compared(*folders), "mla", "tokens_per_second")["verdict"] == "better"
    assert result(compared(*folders, baseline="mla"), "mha", "tokens_per_second")["verdict"] == "worse"


def test_a_single_seed_gives_no_verdict(tmp_path: Path) -> None:
    found = compared(*arms(tmp_path, mha=[2.0], mla=[1.0]))
    row = result(found, "mla")
    assert (row["verdict"], row["reason"], row["difference"]) == ("no verdict", "a single seed", -1.0)
    assert row["p"] is row["low"] is row["seeds_needed"] is None
    assert any("single seed" in note for note in found["notes"])
    exact = result(found, "mla", "params")
    assert exact["verdict"] == "equal" and exact["ratio"] == 1.0


def test_counted_metrics_need_no_seeds(tmp_path: Path) -> None:
    folders = [
        run_folder(tmp_path / "a", "mha", cache_bytes_per_token=128, state_bytes=64),
        run_folder(tmp_path / "b", "mla", cache_bytes_per_token=32, state_bytes=0, params=1100),
    ]
    found = compared(*folders)
    cache, params = result(found, "mla", "cache_bytes"), result(found, "mla", "params")
    assert (cache["mean"], cache["ratio"]) == (1024, pytest.approx(1024 / (32 * 128 + 64)))
    assert (cache["verdict"], params["verdict"], params["p"]) == ("better", "worse", None)


def test_unequal_seeds_are_paired_where_they_can_be(tmp_path: Path) -> None:
    folders = arms(tmp_path, mha=[2.0, 2.02, 1.99, 3.0], mla=MLA)
    folders.append(run_folder(tmp_path / "gqa", "gqa", 9, 1.0))
    found = compared(*folders)
    row = result(found, "mla")
    assert row["n"] == 3 and row["ratio"] == pytest.approx(sum(MLA) / sum(MHA))
    assert result(found, "gqa")["reason"] == "no seed in common with the baseline"
    assert any("mla lacks seed 4" in note for note in found["notes"])
    assert any("mha lacks seed 9 of gqa" in note for note in found["notes"])


def test_missing_metrics_are_left_out_or_said(tmp_path: Path) -> None:
    old = {"decode": None, "val_loss_by_position": None, "peak_memory_bytes": math.nan}
    folders = [run_folder(tmp_path / f"mha{s}", "mha", s, **old) for s in (1, 2)]
    folders += [run_folder(tmp_path / f"mla{s}", "mla", s, 1.9, peak_memory_bytes=7 + s) for s in (1, 2)]
    found = compared(*folders)
    assert result(found, "mla", "decode_ms")["reason"] == "the baseline has no value here"
    assert result(found, "mha", "decode_ms")["values"] == {}
    assert result(found, "mla", "peak_memory_bytes")["verdict"] == "no verdict"
    assert "accuracy" not in [metric["key"] for metric in found["settings"][0]["metrics"]]
    swapped = compared(*folders, baseline="mla")
    assert result(swapped, "mha", "context_gain")["reason"] == "not measured"


def test_times_of_different_devices_are_not_judged(tmp_path: Path) -> None:
    folders = arms(tmp_path, mha=MHA)
    folders += [
        run_folder(tmp_path / f"g{s}", "mla", s, b, environment={"device": "H100"}, tokens_per_second=9e9)
        for s, b in enumerate(MLA, 1)
    ]
    found = compared(*folders)
    assert result(found, "mla", "tokens_per_second")["verdict"] == "no verdict"
    assert "H100 in mla" in result(found, "mla", "tokens_per_second")["reason"]
    assert result(found, "mla")["verdict"] == "better"
    assert any("H100" in note for note in found["notes"])


def test_losses_that_measure_different_things_are_not_judged(tmp_path: Path) -> None:
    folders = arms(tmp_path, mha=MHA)
    folders += [
        run_folder(tmp_path / f"d{s}", "mla", s, b, val_measures="a bound") for s, b in enumerate(MLA, 1)
    ]
    found = compared(*folders)
    assert result(found, "mla")["verdict"] == "no verdict" and "a bound" in result(found, "mla")["reason"]
    assert result(found, "mla", "params")["verdict"] == "equal"


def test_the_correction_is_over_the_arms_of_a_metric(tmp_path: Path) -> None:
    shaky = [1.95, 2.01, 1.90]
    alone = result(compared(*arms(tmp_path / "a", mha=MHA, mla=shaky)), "mla")
    others = {name: [b + 0.1 * i for i, b in enumerate(MHA)] for name in ("gqa", "mqa", "kha")}
    crowd = result(compared(*arms(tmp_path / "b", mha=MHA, mla=shaky, **others)), "mla")
    assert crowd["p"] == alone["p"] and crowd["p_adjusted"] > alone["p_adjusted"] == alone["p"]
    assert crowd["seeds_needed"] > alone["seeds_needed"] > 3
    clear = result(compared(*arms(tmp_path / "c", mha=MHA, mla=[1.9, 1.97, 1.92], **others)), "mla")
    assert clear["p"] < 0.05 <= clear["p_adjusted"]
    assert clear["verdict"] == "not distinguishable" and "corrected" in clear["reason"]


def test_synthetic_tasks_are_settings_and_make_a_profile(tmp_path: Path) -> None:
    scores = {("mqar", "mha"): [1.0, 0.98, 0.99], ("mqar", "linear"): [0.3, 0.31, 0.27],
              ("parity", "mha"): [0.5, 0.52, 0.51], ("parity", "linear"): [0.5]}  # fmt: skip
    folders = [
        task_folder(tmp_path, task, variant, seed, accuracy, **({"data.pairs": 16} if task == "mqar" else {}))
        for (task, variant), values in scores.items()
        for seed, accuracy in enumerate(values, 1)
    ]
    found = compared(*folders)
    assert [setting["name"] for setting in found["settings"]] == [
        "data=synthetic/mqar",
        "data=synthetic/parity",
    ]
    profile = found["profile"]
    assert (profile["tasks"], profile["arms"]) == (["mqar", "parity"], ["mha", "linear"])
    assert profile["mean"][1] == pytest.approx([sum(scores["mqar", "linear"]) / 3, 0.5])
    assert profile["seeds"] == [[3, 3], [3, 1]] and profile["low"][1][1] is None
    low, high = stats.t.interval(0.95, 2, 0.99, stats.sem([1.0, 0.98, 0.99]))
    assert (profile["low"][0][0], profile["high"][0][0]) == (pytest.approx(low), 1.0) and high > 1
    assert result(found, "linear", "accuracy")["verdict"] == "worse"
    assert result(found, "linear", "accuracy", setting=1)["verdict"] == "no verdict"
    assert found["settings"][0]["curves"][0]["val_key"] == "accuracy"
    assert compared(*arms(tmp_path / "text", mha=[2.0]))["profile"] is None


def test_the_gain_from_context_by_hand() -> None:
    first = (3.0 + 2.5 + 2 * 2.0 + 4 * 1.8) / 8
    assert context_gain({"edges": EDGES, "loss": LOSSES}) == pytest.approx((first - 1.5) / math.log(2))
    uneven = {"edges": [0, 8, 16, 24], "loss": [2.0, 1.0, 0.5]}  # the last half begins inside a bucket
    assert context_gain(uneven) == pytest.approx((2.0 - (4 * 1.0 + 8 * 0.5) / 12) / math.log(2))
    assert context_gain({"edges": [0, 8, 16], "loss": [None, 1.0]}) is None or math.isnan(
        context_gain({"edges": [0, 8, 16], "loss": [None, 1.0]})
    )
    assert context_gain(None) is None and context_gain({"edges": [0, 1, 2], "loss": [1.0, 1.0]}) is None


def test_positions_and_decoding_are_averaged_over_seeds(tmp_path: Path) -> None:
    folders = [
        run_folder(tmp_path / str(seed), "mha", seed,
                   val_loss_by_position={"edges": [0, 1, 2], "loss": [seed, None if seed == 2 else 1.0]},
                   decode={"context": [8, 32], "ms_per_token": [seed, 4.0], "cache_bytes": [5, 6]})
        for seed in (1, 2)
    ]  # fmt: skip
    setting = compared(*folders)["settings"][0]
    assert setting["positions"] == [
        {"arm": "mha", "edges": [0, 1, 2], "loss": {"1": [1, 1.0], "2": [2, None]}, "mean": [1.5, None]}
    ]
    assert setting["decode"] == [
        {"arm": "mha", "context": [8, 32], "ms_per_token": [1.5, 4.0], "cache_bytes": [5.0, 6.0]}
    ]


def test_curves_are_thinned_and_keep_their_ends(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "a")
    lines = [{"step": i, "tokens": 10 * i, "seconds": i / 2, "train_loss": 1 / i} for i in range(1, 5001)]
    lines[2499]["val_bpb"], lines[-1]["val_bpb"] = 2.5, 2.0
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = curve(read_run(folder))
    assert len(found["tokens"]) == 400 and len(set(found["tokens"])) == 400
    assert (found["tokens"][0], found["tokens"][-1]) == (10, 50000)
    assert found["flops"][-1] == 50000 * 6000.0 and found["seconds"][-1] == 2500
    assert (found["val_tokens"], found["val"], found["val_key"]) == ([25000, 50000], [2.5, 2.0], "val_bpb")
    assert len(found["tokens"]) == len(found["train_loss"])


def test_every_metric_says_what_it_is() -> None:
    assert len({metric.key for metric in METRICS}) == len(METRICS)
    assert all(metric.better in ("lower", "higher") and metric.title for metric in METRICS)
    assert not any(metric.exact and (metric.timed or metric.learned) for metric in METRICS)

"""Runs become arms, arms get verdicts, and what must not be compared is refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from attnzoo.compare.comparison import compare
from attnzoo.compare.metrics import METRICS, context_gain, curve
from attnzoo.compare.runs import read_run
from attnzoo.compare.select import from_folders
from attnzoo.compare.statistics import Method
from run_folders import EDGES, LOSSES, run_folder

MHA, MLA = [2.0, 2.02, 1.99], [1.9, 1.93, 1.885]


def compared(*folders: Path, method: Method | None = None, **options: Any) -> dict[str, Any]:
    found = compare(from_folders(folders), method or Method(), **options)
    json.dumps(found, allow_nan=False)
    return found


def arms(folder: Path, **values: list[float]) -> list[Path]:
    """Runs of seeds 1, 2, ... per variant, with these bits per byte."""
    return [
        run_folder(folder / f"{name}-{seed}", name, seed, bpb)
        for name, every in values.items()
        for seed, bpb in enumerate(every, 1)
    ]


def result(found: dict[str, Any], arm: str, metric: str = "val_bpb", setting: int = 0) -> dict[str, Any]:
    (row,) = (r for r in found["settings"][setting]["results"] if (r["arm"], r["metric"]) == (arm, metric))
    return row


def labels(found: dict[str, Any]) -> list[str]:
    return [arm["label"] for arm in found["arms"]]


def test_a_verdict_over_seeds(tmp_path: Path) -> None:
    found = compared(*arms(tmp_path, mla=MLA, mha=MHA))
    assert found["baseline"] == "mha" and labels(found) == ["mha", "mla"]
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


def test_the_baseline_can_be_chosen_and_must_take_part(tmp_path: Path) -> None:
    folders = arms(tmp_path, gqa=MLA, mla=MHA)
    assert compared(*folders)["baseline"] == "gqa"  # the first, without mha
    found = compared(*folders, baseline="mla")
    assert found["baseline"] == "mla" and result(found, "gqa")["verdict"] == "better"
    with pytest.raises(ValueError, match="--baseline: must be one of the arms gqa, mla, got 'mha'"):
        compared(*folders, baseline="mha")


def test_all_but_the_seed_and_places_makes_an_arm(tmp_path: Path) -> None:
    for seed in (1, 2):
        neutral = {"trainer.log_every": seed, "launcher.devices": seed, "data.cache_dir": f"/{seed}"}
        run_folder(tmp_path / f"mha{seed}", "mha", seed, config=neutral)
        run_folder(tmp_path / f"one{seed}", "gqa", seed, attention={"num_kv_heads": 1})
        run_folder(tmp_path / f"two{seed}", "gqa", seed, attention={"num_kv_heads": 2})
        run_folder(tmp_path / f"lr{seed}", "mla", seed, config={"optim.lr": 0.01})
        default = {"window": None}  # set to what it is anyway
        run_folder(tmp_path / f"window{seed}", "mqa", seed, attention=default if seed == 1 else {})
    found = compared(*sorted(tmp_path.iterdir()))
    assert sorted(labels(found)) == ["gqa num_kv_heads=1", "gqa num_kv_heads=2", "mha", "mla", "mqa"]
    assert all(arm["seeds"] == [1, 2] for arm in found["arms"])
    diffs = {arm["label"]: arm["config_diff"] for arm in found["arms"]}
    assert diffs["mha"] == {} and diffs["mla"]["optim.lr"] == [0.002, 0.01]
    assert diffs["gqa num_kv_heads=1"]["attention.name"] == ["mha", "gqa"]
    assert diffs["gqa num_kv_heads=1"]["attention.num_kv_heads"][1] == 1
    with pytest.raises(ValueError, match="--baseline: must be one of"):
        compared(*sorted(tmp_path.iterdir()), baseline="gqa")  # two arms are of that variant
    assert found["runs"][0]["folder"] in {str(path) for path in tmp_path.iterdir()}


def test_a_layout_and_a_composition_are_arms_by_name(tmp_path: Path) -> None:
    hybrid = "gated_deltanet*3,mha"
    folders = [
        run_folder(tmp_path / "a", hybrid, config={"model.layout": hybrid, "attention.name": "mha"}),
        # a layout leaves the variant's name unread
        run_folder(tmp_path / "d", hybrid, 2, config={"model.layout": hybrid, "attention.name": "mla"}),
        run_folder(tmp_path / "b", "mla", attention={"add": ["moh"]}),
        run_folder(tmp_path / "c", "mla"),
    ]
    found = compared(*folders, baseline="mla")
    assert labels(found) == ["mla", "gated_deltanet*3,mha", "mla + moh"]
    assert found["arms"][1]["seeds"] == [1, 2]
    assert {claim["arm"] for claim in found["claims"]} <= {"mla"}  # no paper claims anything of the others


def test_a_seed_given_twice_is_an_error_that_names_both(tmp_path: Path) -> None:
    folders = [run_folder(tmp_path / name, "mha", 7) for name in ("one", "two")]
    with pytest.raises(ValueError, match=r"seed: mha has seed 7 twice, in \S+one and \S+two"):
        compared(*folders)
    assert len(compared(folders[0], folders[0])["runs"]) == 1  # the same folder is no second run


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("data_fingerprint", {"environment": {"data_fingerprint": "e" * 32}}),
        ("tokenizer_fingerprint", {"environment": {"tokenizer_fingerprint": "bpe"}}),
        ("precision", {"environment": {"precision": "bf16-mixed (requested)"}}),
        ("seq_len", {"seq_len": 64}),
        ("steps", {"steps": 8}),
        ("tokens", {"tokens": 1024}),
        ("batch_size", {"config": {"data.batch_size": 8}}),
        ("val_samples", {"config": {"data.val_samples": 16}}),
        ("isolate", {"config": {"data.isolate": True}}),
    ],
)
def test_what_is_not_comparable_is_refused_unless_forced(
    tmp_path: Path, field: str, change: dict[str, Any]
) -> None:
    folders = [*arms(tmp_path, mha=[2.0]), run_folder(tmp_path / "other", "mla", 1, **change)]
    with pytest.raises(ValueError) as error:
        compared(*folders)
    text = str(error.value)
    assert text.startswith(f"runs: not comparable; {field}: ") and "--force" in text
    assert text.count(":") == 2 and "other" in text and "mha-1" in text  # this field alone, by folder
    found = compared(*folders, force=True)
    (line,) = found["forced"]
    assert line.startswith(f"{field}: ") and "in mha" in line and "in mla" in line
    assert not compared(*arms(tmp_path / "fine", mha=[2.0], mla=[1.9]), force=True)["forced"]


def test_the_reason_of_a_precision_does_not_tell_runs_apart(tmp_path: Path) -> None:
    folders = arms(tmp_path, mha=[2.0])
    folders.append(run_folder(tmp_path / "b", "mla", environment={"precision": "32-true (no bf16)"}))
    assert not compared(*folders)["forced"]


def _broken(folder: Path) -> dict[Path, str]:
    """Run folders that are none, each with a word of the reason."""

    def spoil(name: str, file: str, text: str | None) -> Path:
        path = run_folder(folder / name) / file
        path.unlink() if text is None else path.write_text(text)
        return path.parent

    (folder / "empty").mkdir(parents=True)
    (folder / "file").write_text("")
    return {
        folder / "nowhere": "does not exist",
        folder / "empty": "is not a run folder",
        folder / "file": "is not a folder",
        run_folder(folder / "failed", status="failed", error="the loss is not finite"): "not finite",
        run_folder(folder / "stopped", status="stopped"): "stopped",
        run_folder(folder / "no-params", params=None): "params",
        spoil("running", "summary.json", None): "summary.json is missing",
        spoil("half", "summary.json", '{"variant": "mha", "st'): "summary.json is cut off",
        spoil("list", "summary.json", "[]"): "no JSON object",
        spoil("half-metrics", "metrics.jsonl", '{"step": 1}\n{"ste'): "metrics.jsonl is cut off .* in line 2",
        spoil("no-metrics", "metrics.jsonl", ""): "metrics.jsonl is empty",
        spoil("no-environment", "environment.json", None): "environment.json is missing",
        spoil("bad-config", "config.yaml", "a: [1"): "config.yaml cannot be read",
        spoil("other-config", "config.yaml", "a: 1"): "lacks one of the groups",
    }


def test_broken_folders_are_named_and_left_out(tmp_path: Path) -> None:
    broken = _broken(tmp_path / "broken")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    good = arms(tmp_path / "good", mha=MHA, mla=MLA)
    found = compared(*broken, *good)
    reasons = {Path(one["folder"]): one["reason"] for one in found["left_out"]}
    assert reasons.keys() == broken.keys()
    for folder, word in broken.items():
        assert re.search(word, reasons[folder]), (folder, reasons[folder])
    assert found["settings"] == compared(*good)["settings"]
    assert {p: p.read_bytes() for p in before} == before  # reading writes nothing
    with pytest.raises(ValueError, match=r"runs: none is usable; .*and 9 more"):
        compared(*broken)


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


def _task(folder: Path, name: str, variant: str, seed: int, accuracy: float, **config: Any) -> Path:
    config = {"data.name": f"synthetic/{name}", **config}
    return run_folder(
        folder / f"{name}-{variant}-{seed}-{len(config)}", variant, seed, None, val_accuracy=accuracy,
        config=config, environment={"data_fingerprint": name}, val_loss=1.0 - accuracy,
    )  # fmt: skip


def test_synthetic_tasks_are_settings_and_make_a_profile(tmp_path: Path) -> None:
    scores = {("mqar", "mha"): [1.0, 0.98, 0.99], ("mqar", "linear"): [0.3, 0.31, 0.27],
              ("parity", "mha"): [0.5, 0.52, 0.51], ("parity", "linear"): [0.5]}  # fmt: skip
    folders = [
        _task(tmp_path, task, variant, seed, accuracy, **({"data.pairs": 16} if task == "mqar" else {}))
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


def test_two_variants_of_a_task_are_not_one_setting(tmp_path: Path) -> None:
    folders = [
        _task(tmp_path, "mqar", "mha", 1, 0.9, **{"data.pairs": pairs, **more})
        for pairs, more in ((16, {}), (32, {"data.x": 1}))
    ]
    environment = json.loads((folders[1] / "environment.json").read_text()) | {"data_fingerprint": "32"}
    (folders[1] / "environment.json").write_text(json.dumps(environment))
    with pytest.raises(ValueError, match="data_fingerprint: "):
        compared(*folders)


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

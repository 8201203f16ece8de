"""Which runs become an arm, and what must not be compared is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from run_folders import MHA, MLA, arms, compared, result, run_folder, task_folder


def labels(found: dict[str, Any]) -> list[str]:
    return [arm["label"] for arm in found["arms"]]


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


def test_two_variants_of_a_task_are_not_one_setting(tmp_path: Path) -> None:
    folders = [
        task_folder(tmp_path, "mqar", "mha", 1, 0.9, **{"data.pairs": pairs, **more})
        for pairs, more in ((16, {}), (32, {"data.x": 1}))
    ]
    environment = json.loads((folders[1] / "environment.json").read_text()) | {"data_fingerprint": "32"}
    (folders[1] / "environment.json").write_text(json.dumps(environment))
    with pytest.raises(ValueError, match="data_fingerprint: "):
        compared(*folders)

"""What papers claim, as the cards have it: testable where it says so, refused where it makes no sense."""

from __future__ import annotations

import io
from contextlib import redirect_stdout

import pytest
import torch

import attnzoo
from attnzoo import Card, Claim
from attnzoo.cards import METRICS, TASKS
from attnzoo.cli import main
from attnzoo.cli.train import config_folder
from attnzoo.compare.metrics import BY_KEY

NAMES = attnzoo.list_variants()
CLAIMS = [(name, claim) for name in NAMES for claim in attnzoo.card(name).claims]
TESTABLE = [(name, claim) for name, claim in CLAIMS if claim.metric]


def test_claims_are_about_metrics_that_comparisons_have() -> None:
    assert set(METRICS) <= set(BY_KEY)
    assert {claim.metric.partition(":")[0] for _, claim in TESTABLE} <= set(BY_KEY)


def test_tasks_are_those_of_the_synthetic_data() -> None:
    assert sorted(TASKS) == sorted(p.stem for p in (config_folder() / "data" / "synthetic").glob("*.yaml"))


def test_claims_compare_with_another_registered_variant() -> None:
    for name, claim in CLAIMS:
        assert isinstance(claim, Claim)
        assert claim.against in NAMES, f"{name}: {claim}"
        assert not claim.metric or claim.against != name, f"{name}: {claim}"


def test_claims_of_one_card_do_not_contradict_each_other() -> None:
    for name in NAMES:
        expected: dict[tuple[str, str], str] = {}
        for claim in (c for c in attnzoo.card(name).claims if c.metric):
            key = claim.metric, claim.against
            assert expected.setdefault(key, claim.expect) == claim.expect, f"{name}: {claim}"


def test_parameters_and_caches_are_as_claimed() -> None:
    """At GPT-2 small's shape; the claims about contexts beyond a window at a longer one."""
    for name, claim in TESTABLE:
        if claim.metric not in ("params", "cache_bytes"):
            continue
        own, other = (
            counted(n, claim.metric, 8192 if "beyond" in claim.where else 1024) for n in (name, claim.against)
        )
        assert (own < other) == (claim.expect == "lower"), f"{name}: {claim}"


def counted(name: str, metric: str, tokens: int) -> float:
    with torch.device("meta"):
        model = attnzoo.create_model(name, dim=768, depth=12, num_heads=12, max_seq_len=tokens)
    cost = model.cost(tokens)
    return cost.params if metric == "params" else tokens * cost.cache_bytes_per_token + cost.state_bytes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"metric": "mmlu", "expect": "higher"},
            r"claims: metric must be empty or one of .*, got 'mmlu' in 'x'",
        ),
        ({"metric": "accuracy", "expect": "higher"}, "metric accuracy is of one of mqar, .*, got 'accuracy'"),
        (
            {"metric": "accuracy:chess", "expect": "higher"},
            "accuracy is of one of mqar.*, got 'accuracy:chess'",
        ),
        ({"metric": "val_bpb:mqar", "expect": "lower"}, "others have no task, got 'val_bpb:mqar'"),
        ({"metric": "val_bpb"}, "expect must be one of lower, higher, equal with a metric.*, got ''"),
        ({"metric": "val_bpb", "expect": "better"}, "expect must be one of lower.*, got 'better'"),
        ({"expect": "lower"}, "empty without, got 'lower'"),
        ({"metric": "val_bpb", "expect": "lower", "against": ""}, "against must name a variant, got ''"),
        ({"text": ""}, "claims: text must be a sentence, got ''"),
    ],
)
def test_a_claim_that_makes_no_sense_is_refused_in_one_line(fields: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        Claim(**{"text": "x", **fields})
    assert "\n" not in str(error.value)


def test_sentences_on_a_card_become_claims() -> None:
    fast = Claim("fast", "decode_ms", "lower", where="1B")
    card = Card("mine", "Mine", "own", "An own one.", claims=("good", fast))
    assert card.claims == (Claim("good"), fast)
    assert [str(c) for c in card.claims] == ["good", "fast (1B)"]
    with pytest.raises(ValueError, match="must be a list of claims, got 'good' on mine's card"):
        Card("mine", "Mine", "own", "An own one.", claims="good")


def test_show_prints_claims_with_their_conditions() -> None:
    with redirect_stdout(io.StringIO()) as printed:
        assert main(["show", "cca"]) == 0
    assert "Claim: loss 2.307 against 2.321 of mla (1B dense, 300B tokens)\n" in printed.getvalue()

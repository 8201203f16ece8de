"""Sequences cut over ranks, inside one process: every variant's parts together are its whole sequence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo import Context
from attnzoo.model.backbone import LanguageModel
from attnzoo.parallel.context import READS, Span, check_spans, spans
from attnzoo.parallel.successive import Part, Successive
from attnzoo.testing import Subject
from attnzoo.testing.subject import gap

VOCAB, LENGTH = 17, 30
# borders off and on the edges of parts, documents of length 1, one over all parts, padding from inside a part
# on and over a whole part
PACKED = (
    (1,) * 4 + (2,) + (3,) * 13 + (4,) + (5,) * 11,
    (1,) * 15 + (2,) + (3,) * 7 + (0,) * 7,
    (4,) * 10 + (6,) * 2 + (0,) * 18,
    (8,) * 30,
)
CASES = {key: subject for name in attnzoo.list_variants() for key, subject in Subject.cases(name).items()}
# the only layers that keep nothing but rows, tails and states and still refuse: what they lose is a loss
REFUSE = {"dynamic_rank-small": "policy's loss"}
EXACT, COMPOSED = 1e-10, {
    "mla-moh-window": ("mla", {"add": ("moh",), "window": 6}),
    "gqa-long-window": ("gqa", {"num_kv_heads": 2, "window": 13}),
    "kha-sinks": ("kha", {"num_kv_heads": 2, "window": 4, "n_sink": 1, "kind": "mlp"}),
    "dcmha-moh": ("dcmha", {"window": 5, "add": ("moh",), "static_proj": False}),
    "gated_deltanet-moh-kha": ("gated_deltanet", {"add": ("moh", "kha"), "chunk_size": 5, "qk_norm": True}),
    "mega-truncated": ("mega", {"truncation": 14}),
    "rala-exact": ("rala", {"mode": "prefix_exact"}),
    "reference": ("mha", {"impl": "reference"}),
    "hybrid": ("gated_deltanet,sliding_window", {"window": 4}),
}  # fmt: skip


def build(name: str, **options: Any) -> LanguageModel:
    """A model of two layers in fp64 with scattered parameters: starts near zero would hide mistakes."""
    torch.manual_seed(0)
    model = attnzoo.create_model(name, VOCAB, 32, 2, 4, **{"max_seq_len": LENGTH, **options}).double()
    with torch.no_grad():
        for param in model.parameters():
            special = param.dim() < 2 or getattr(param, "no_reinit", False)
            noise = torch.randn_like(param)
            param.copy_(param + 0.1 * noise if special else noise / param.shape[-1] ** 0.5)
    return model


def whole_and_parts(
    model: LanguageModel, ranks: int, packed: bool, **fields: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Logits and gradients of whole sequences, and those of parts."""
    tokens = torch.randint(VOCAB, (len(PACKED), LENGTH), generator=torch.Generator().manual_seed(1))
    probe = torch.randn(*tokens.shape, VOCAB, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ids, params = torch.tensor(PACKED) if packed else None, list(model.parameters())
    found = []
    for parts in (1, ranks):
        channel = Successive()
        cuts = [Span(rank, parts, channel.channel()) if parts > 1 else None for rank in range(parts)]
        outs = [model(tokens, Context(segment_ids=ids, span=span, **fields)) for span in cuts]
        y = torch.cat(outs, dim=1)
        grads = torch.autograd.grad((y * probe).sum(), params, allow_unused=True)
        found.append(
            [y, *(torch.zeros_like(p) if g is None else g for p, g in zip(params, grads, strict=True))]
        )
    return tuple(found)


def check(model: LanguageModel, ranks: int, packed: bool, **fields: Any) -> None:
    whole, parts = whole_and_parts(model, ranks, packed, **fields)
    assert gap(parts[0], whole[0]) <= EXACT
    noise = 1e-10 * max(float(g.abs().max()) for g in whole[1:])
    for (name, _), a, b in zip(model.named_parameters(), parts[1:], whole[1:], strict=True):
        if float(b.abs().max()) <= noise:
            assert float(a.abs().max()) <= noise, name
        else:
            assert gap(a, b) <= 10 * EXACT, name


def options_of(case: str) -> dict[str, Any]:
    return {} if case == CASES[case].card.name else dict(CASES[case].card.small)


@pytest.mark.parametrize("case", CASES)
def test_parts_of_a_sequence_are_the_sequence_or_the_variant_refuses(case: str) -> None:
    model = build(CASES[case].card.name, **options_of(case))
    if any(spans(mixer) for mixer in model.mixers):
        with pytest.raises(ValueError, match=r"launcher.context_parallel: layer \d"):
            check_spans(model, 2, LENGTH)
        return
    check_spans(model, 2, LENGTH)
    check(model, 2, packed=False)
    check(model, 3, packed=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_parts_with_other_numbers_of_ranks(case: str) -> None:
    model = build(CASES[case].card.name, **options_of(case))
    if any(spans(mixer) for mixer in model.mixers):
        return
    check(model, 3, packed=False)
    check(model, 2, packed=True)
    check(model, 15, packed=True)


@pytest.mark.parametrize("case", COMPOSED)
def test_parts_of_compositions(case: str) -> None:
    name, options = COMPOSED[case]
    model = build(name, **options)
    check_spans(model, 2, LENGTH)
    check(model, 2, packed=False)
    check(model, 3, packed=True)
    check(model, 6, packed=True)


@pytest.mark.parametrize("name", attnzoo.list_variants())
def test_only_stated_reasons_refuse(name: str) -> None:
    """What keeps rows, tails and states only, and reads no later token, runs on parts."""
    for case in [key for key, subject in CASES.items() if subject.card.name == name]:
        model = build(name, **options_of(case))
        traits = attnzoo.card(name).traits
        for mixer in model.mixers:
            plain = {slot.kind for slot in mixer.memory().values()} <= {"rows", "tail", "state"}
            able = plain and all(traits[trait] for trait in READS) and case not in REFUSE
            assert (spans(mixer) is None) == able
            assert REFUSE.get(case, "") in (spans(mixer) or "")


def test_the_families_of_the_task_run_on_parts() -> None:
    for name in ("mha", "gqa", "mla", "moh", "kha", "sliding_window", "linear", "gated_deltanet"):
        assert spans(attnzoo.create(name, 32, 4)) is None


def test_reading_other_rows_refuses() -> None:
    mixer = attnzoo.create("focused_transformer", 32, 4, cross_batch=1, memory_layers=(0,))
    assert "cross_batch" in spans(mixer)


def test_one_error_names_layers_variants_and_the_way_out() -> None:
    model = attnzoo.create_model("mtla,mha", VOCAB, 32, 4, 4)
    with pytest.raises(
        ValueError, match=r"context_parallel: layer 0 \(mtla\).*; layer 2 \(mtla\).*set it to 1"
    ):
        check_spans(model, 2, 8)
    check_spans(model, 1, 7)
    with pytest.raises(ValueError, match=r"data.seq_len: .* launcher.context_parallel=2, got 7; take 6"):
        check_spans(attnzoo.create_model("mha", VOCAB, 32, 1, 4), 2, 7)
    with pytest.raises(ValueError, match=r"prefix_tokens"):
        check_spans(attnzoo.create_model("mha", VOCAB, 32, 1, 4, prefix_tokens=2), 2, 8)


@pytest.mark.parametrize(
    "given, message",
    [
        ({"length": 7}, "multiple of its 2 ranks, got 7"),
        ({"ids": (0, 0, 1, 1, 1, 1, 1, 1)}, "padding must stand at the end"),
        ({"cached": True}, "has no cache"),
        ({"prefix": 2}, "prefix_tokens"),
    ],
)
def test_what_parts_cannot_be_is_told(given: dict[str, Any], message: str) -> None:
    model = attnzoo.create_model("mha", VOCAB, 32, 1, 4, prefix_tokens=given.get("prefix", 0))
    tokens = torch.zeros(1, given.get("length", 8), dtype=torch.long)
    ids = torch.tensor([given["ids"]]) if "ids" in given else None
    cache = model.new_cache(1, 8) if "cached" in given else None
    with pytest.raises(ValueError, match=message):
        model(tokens, Context(segment_ids=ids, span=Span(0, 2, Successive().channel())), cache)


def test_a_mixer_alone_takes_no_span() -> None:
    with pytest.raises(ValueError, match="run the mixer in a model"):
        attnzoo.create("mha", 32, 4)(torch.zeros(1, 4, 32), Context(span=Span(0, 2, Successive().channel())))


def test_given_positions_are_cut_too() -> None:
    for name in ("mha", "mla", "retnet"):
        positions = torch.arange(LENGTH).flip(0)[None].expand(len(PACKED), -1) * 3
        check(build(name), 3, packed=False, positions=positions)
        check(build(name), 2, packed=True, positions=positions)


def test_a_window_asks_for_no_row_beyond_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a window come from the neighbour, and no more of them than it reaches."""
    asked = []
    extend = Part.extend
    monkeypatch.setattr(Part, "extend", lambda self, z, n, dim: asked.append(n) or extend(self, z, n, dim))
    monkeypatch.setattr(Part, "gather", None)
    check(build("gqa", num_kv_heads=2, window=5), 3, packed=True)
    assert set(asked) == {4}

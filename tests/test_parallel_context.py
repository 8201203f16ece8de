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
from attnzoo.parallel.successive import Successive
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
            assert (spans(mixer) is None) == (plain and all(traits[trait] for trait in READS))


def test_the_families_of_the_task_run_on_parts() -> None:
    for name in ("mha", "gqa", "mla", "moh", "kha", "sliding_window", "linear", "gated_deltanet"):
        assert spans(attnzoo.create(name, 32, 4)) is None

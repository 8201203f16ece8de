"""The property suite catches what it is for: each broken mixer fails its property, and its healthy host does
not.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attnzoo
from attnzoo.testing import PROPERTIES, Subject, check
from broken import BROKEN, Broken


@pytest.mark.parametrize("mistake", BROKEN)
def test_property_catches(mistake: str) -> None:
    broken = BROKEN[mistake]
    with pytest.raises(AssertionError):
        PROPERTIES[broken.caught_by](broken.subject())
    PROPERTIES[broken.caught_by](Subject.of(broken.host, **dict(broken.options)))


def test_every_property_has_a_culprit() -> None:
    elsewhere = {"parameters", "seeded", "sizes", "default_positions"}  # below
    assert set(PROPERTIES) == {b.caught_by for b in BROKEN.values()} | elsewhere


def culprit(damage) -> Subject:
    return Broken("mha", "", damage).subject()


def test_parameters_catches_what_meta_does_not_hold() -> None:
    def on_cpu(mixer) -> None:
        mixer.out.late_weight = nn.Parameter(torch.zeros(2, device="cpu"))

    with pytest.raises(AssertionError, match="meta"):
        PROPERTIES["parameters"](culprit(on_cpu))


def test_seeded_catches_another_source_of_chance() -> None:
    def own_generator(mixer) -> None:
        with torch.no_grad():
            mixer.out.out_proj.weight.add_(
                torch.rand(1, generator=torch.Generator().manual_seed(id(mixer) % 2**31))
            )

    kept = []  # ids of live objects differ
    with pytest.raises(AssertionError, match="one seed"):
        PROPERTIES["seeded"](culprit(lambda m: (kept.append(m), own_generator(m))))


def test_sizes_catches_a_shape_that_does_not_work() -> None:
    def only_wide(mixer) -> None:
        if mixer.dim < 10:
            raise RuntimeError("too narrow")

    with pytest.raises(RuntimeError, match="too narrow"):
        PROPERTIES["sizes"](culprit(only_wide))


def test_default_positions_catches_an_offset() -> None:
    def one_based(mixer) -> None:
        whole = type(mixer).heads
        mixer.heads = lambda call: whole(mixer, call) * (1.1 if call.ctx.positions is None else 1.0)

    with pytest.raises(AssertionError, match="positions"):
        PROPERTIES["default_positions"](culprit(one_based))


def test_false_trait_must_be_true() -> None:
    """A card cannot excuse itself: a property that it says does not hold must be seen not to hold."""
    honest = Subject.of("mha")
    for trait in ("causal", "prefix_consistent", "row_independent"):
        card = type(honest.card)(**{**vars(honest.card), "traits": {trait: False}})
        with pytest.raises(AssertionError, match=trait):
            PROPERTIES[trait](Subject(honest.make, card))
    for trait, prop in (("decodes", "decode"), ("packs", "documents")):
        card = type(honest.card)(**{**vars(honest.card), "traits": {trait: False}})
        with pytest.raises(AssertionError, match=trait):
            PROPERTIES[prop](Subject(honest.make, card))


def test_check_names_what_broke() -> None:
    with pytest.raises(AssertionError, match=r"mha breaks \d+ properties(.|\n)*causal") as caught:
        check(BROKEN["reads one future token"].subject())
    assert "prefix_consistent" in str(caught.value)


def test_check_is_public() -> None:
    assert attnzoo.testing.check("mqa") == list(PROPERTIES)

"""Names, cards, options, and variants that come from outside the package."""

from __future__ import annotations

import importlib.metadata
import pathlib

import pytest
import torch
from torch import Tensor, nn

import attnzoo
from attnzoo import registry
from attnzoo.attention.base import Stage
from attnzoo.attention.draft import Draft

CONFIGS = pathlib.Path(__file__).parents[1] / "configs" / "attention"


@pytest.fixture
def zoo():
    """The registry, put back afterwards."""
    attnzoo.list_variants()
    before = dict(registry._entries)
    yield registry._entries
    registry._entries.clear()
    registry._entries.update(before)


def test_names_are_sorted_and_filtered() -> None:
    names = attnzoo.list_variants()
    assert names == sorted(names) and {"mha", "mla", "gated_deltanet"} <= set(names)
    assert attnzoo.list_variants("m?a") == ["mfa", "mha", "mla", "mqa"]
    assert attnzoo.list_variants(family="sparse") == ["sliding_window"]
    families = {attnzoo.card(name).family for name in names}
    assert sum(len(attnzoo.list_variants(family=family)) for family in families) == len(names)


def test_the_first_wave_is_there() -> None:
    """Key/value sharing and latents, linear and recurrent attention, hybrids: the names they are known by."""
    wave = """
        mha mqa gqa wgqa kdgqa dgqa sqa fixed_head_size diffqkv dha kv_shift kvt mla gla_latent tpla mtla mfa
        mfa_kr cca ccgqa elitekv dynamic_rank mhe tensorllm lama headshare masa cla mixattention
        linear linear_icl pavlovian linformer flatten mala rala mhla_linear l2vit flare mano fast_factorizable
        based retnet lightning_attention gla hgrn2 mamba2 deltanet gated_deltanet kda rwkv7 log_linear
        mega hymba recurformer recurrent_memory_chunked spectformer grassmann
        focused_transformer discrete_kv_bottleneck efficient_dlm
    """
    assert not set(wave.split()) - set(attnzoo.list_variants())


@pytest.mark.parametrize("name", attnzoo.list_variants())
def test_cards_and_files_are_in_house_form(name: str) -> None:
    card = attnzoo.card(name)
    assert card.title and card.paper and card.arxiv and card.summary.endswith(".") and card.cached
    assert set(card.traits) == set(registry.TRAITS)
    text = registry.equations(name)
    assert card.arxiv in text and "Cached:" in text
    change = registry._entries[name].change
    assert "Shape:" in change.__doc__ and "Reduces to:" in change.__doc__
    assert (CONFIGS / f"{name}.yaml").read_text().startswith(f"name: {name}\n")
    assert f".{card.family}." in change.__module__


@pytest.mark.parametrize("name", attnzoo.list_variants())
def test_every_default_is_an_option(name: str) -> None:
    options = dict(attnzoo.card(name).defaults)
    torch.manual_seed(0)
    given = attnzoo.create(name, 32, 4, **options)
    torch.manual_seed(0)
    plain = attnzoo.create(name, 32, 4)
    x = torch.randn(1, 5, 32)
    assert torch.equal(given(x), plain(x))


def test_mistakes_name_field_rule_value_and_way_out() -> None:
    for kwargs, words in (
        ({"name": "gatd_deltanet"}, ["variant", "gatd_deltanet", "did you mean gated_deltanet"]),
        ({"name": "mha", "windw": 3}, ["option", "windw", "did you mean window", "legal:"]),
        ({"name": "mha", "dim": 30}, ["dim", "30", "num_heads=4"]),
        ({"name": "mha", "dim": 12}, ["head_dim", "even", "3", "pos=none"]),
        ({"name": "gqa", "num_kv_heads": 3}, ["num_kv_heads", "3", "[1, 2, 4]"]),
        ({"name": "mha", "window": 0}, ["window", "at least 1", "0"]),
        ({"name": "mha", "window": 2.5}, ["window", "integer", "2.5"]),
        ({"name": "mha", "qk_norm": 1}, ["qk_norm", "true or false", "1"]),
        ({"name": "kha", "kind": "mpl"}, ["kind", "'linear', 'mlp', 'gate'", "'mpl'"]),
        ({"name": "mha", "impl": "cuda"}, ["impl", "cuda"]),
        ({"name": "dcmha", "impl": "sdpa"}, ["impl", "sdpa", "score"]),
        ({"name": "linear", "impl": "flex"}, ["impl", "flex", "reference"]),
        ({"name": "mha", "add": ("linear",)}, ["add", "linear", "RecurrentAttention"]),
        ({"name": "mla", "add": ("mla",)}, ["add", "mla", "once"]),
        ({"name": "mha", "num_heads": 0}, ["num_heads", "at least 1", "0"]),
    ):
        with pytest.raises(ValueError) as caught:
            attnzoo.create(**{"dim": 32, "num_heads": 4, **kwargs})
        message = str(caught.value)
        assert "\n" not in message and all(word in message for word in words), message


class Halved(Stage):
    rank = 60

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, o: Tensor, call) -> Tensor:
        return o * self.factor


def halved(draft: Draft, *, factor: float = 0.5) -> None:
    """Half of it.

    Shape: (B, T, D) -> (B, T, D). Reduces to: the host with factor = 1.
    """
    draft.put("combine", Halved(factor))


CARD = {"name": "halved", "title": "Halved", "family": "outside", "summary": "Half of it."}


def test_a_variant_from_outside_is_a_variant(zoo) -> None:
    attnzoo.register(attnzoo.Card(**CARD), frames=("score", "recurrent"))(halved)
    assert "halved" in attnzoo.list_variants() and attnzoo.card("halved").defaults["factor"] == 0.5
    assert attnzoo.testing.check("halved")
    x = torch.randn(1, 6, 32)
    for host in ("mha", "gated_deltanet"):
        torch.manual_seed(0)
        plain = attnzoo.create(host, 32, 4)
        torch.manual_seed(0)
        added = attnzoo.create(host, 32, 4, add="halved", factor=0.25)
        torch.testing.assert_close(added(x), plain(x) / 4)
    with pytest.raises(ValueError, match=r"^register: 'mha' is registered by"):
        attnzoo.register(attnzoo.Card(**{**CARD, "name": "mha"}))(halved)
    with pytest.raises(ValueError, match=r"^traits:"):
        attnzoo.register(attnzoo.Card(**CARD, traits={"casual": False}))


def test_options_of_added_variants_flat_or_dotted(zoo) -> None:
    attnzoo.register(attnzoo.Card(**CARD), frames=("score",))(halved)
    attnzoo.register(attnzoo.Card(**{**CARD, "name": "halved_too"}), frames=("score",))(halved)
    for spelled in ({"halved.factor": 0.25}, {"halved": {"factor": 0.25}}):
        mixer = attnzoo.create("mha", 32, 4, add=["halved", "halved_too"], **spelled)
        assert sorted(s.factor.item() for s in mixer.combine) == [0.25, 0.5]
    with pytest.raises(
        ValueError, match=r"^factor: halved and halved_too both have it; write halved_too\.factor"
    ):
        attnzoo.create("mha", 32, 4, add=["halved", "halved_too"], factor=0.25)


def test_entry_points_are_found(zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    class Point:
        def load(self) -> None:
            attnzoo.register(attnzoo.Card(**CARD))(halved)

    monkeypatch.setattr(
        registry, "entry_points", lambda group: [Point()] if group == "attnzoo.variants" else []
    )
    registry._load.cache_clear()
    assert "halved" in attnzoo.list_variants()
    assert importlib.metadata.version  # the real lookup goes through the metadata of installed packages

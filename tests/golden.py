"""What the files of ``golden/`` say, in our words.

They name options and weights as the spec of a variant does: its equations in the papers' letters, with
matrices for ``x @ W``. `spec_options` translates options, `load_spec_weights` weights. What a family of
variants adds lies in a module of `adapters`: rows of `WEIGHTS` for its stage classes, and functions of
`OPTIONS` where options have other names; `test_golden` reads their `VARIATIONS` and `CHECKS` as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnzoo.attention.base import Mixer, Stage
from attnzoo.attention.heads.dcmha import Compose
from attnzoo.attention.heads.kha import SharedHeadMap
from attnzoo.attention.heads.moh import HeadRouter
from attnzoo.attention.latent.mla import Latent
from attnzoo.attention.linear.linear import FeatureMap, Normaliser
from attnzoo.attention.recurrence.gated_deltanet import StepDecayBeta
from attnzoo.attention.stages.combine import Gate, HeadNorm
from attnzoo.attention.stages.out import LinearOut
from attnzoo.attention.stages.project import QKV
from attnzoo.attention.stages.refine import QKNorm, ShortConv

Options = dict[str, Any]

RENAMED = {
    "heads": "num_heads",
    "n_heads": "num_heads",
    "kv_heads": "num_kv_heads",
    "n_kv_heads": "num_kv_heads",
    "v_heads": "num_v_heads",
    "max_len": "max_seq_len",
    "rope_base": "rope_theta",
    "n_layers": "num_layers",
}
# options that are a matter of the model or of another method here, at the values that ask for nothing
INERT = {
    "rope_mode": ("absolute", "decoupled"),
    "layer_pattern": (None,),
    "learned_sink_token": (False,),
    "windows": (None,),
}


def spec_options(name: str, options: Mapping[str, Any]) -> Options:
    """Keyword arguments of ``create(name, dim, **kwargs)`` from options as the specs spell them."""
    ours = {RENAMED.get(option, option): value for option, value in options.items()}
    if name in adapted("OPTIONS"):
        adapted("OPTIONS")[name](ours)
    for option in INERT.keys() & ours.keys():
        value = ours.pop(option)
        assert value in INERT[option], f"{option}: {value!r} is not built"
    if "eps" in ours:
        ours["norm_eps"] = ours.pop("eps")
    return ours


def _mha(ours: Options) -> None:
    if ours.get("num_kv_heads") == ours.get("num_heads"):
        ours.pop("num_kv_heads", None)


def _mla(ours: Options) -> None:
    if ours.get("rope_mode") == "none":
        del ours["rope_mode"]
        ours |= {"pos": "none", "qk_rope_head_dim": 0}


def _linear(ours: Options) -> None:
    if "rope" in ours:
        ours["pos"] = {"none": "none", "numerator": "rope"}[ours.pop("rope")]
    if ours.get("normalize", True) and "eps" in ours:
        eps = ours.pop("eps")
        assert eps == Normaliser(1, 1, 1).eps, f"eps: the denominator's is fixed, got {eps}"


OPTIONS: dict[str, Callable[[Options], None]] = {"linear": _linear, "mha": _mha, "mla": _mla}


@cache
def adapted(table: str) -> dict[Any, Any]:
    """A table of this module, if it has it, with those of all `adapters`."""
    whole = dict(globals().get(table, {}))
    for file in sorted((Path(__file__).parent / "adapters").glob("*.py")):
        own = getattr(import_module(f"adapters.{file.stem}"), table, {})
        assert not own.keys() & whole.keys(), f"{file.name}: {table} repeats {own.keys() & whole.keys()}"
        whole |= own
    return whole


class Symbols:
    """Given weights by symbol; remembers which were read."""

    def __init__(self, given: Mapping[str, Tensor]) -> None:
        self.given, self.used = dict(given), set()

    def __contains__(self, symbol: str) -> bool:
        return symbol in self.given

    def __getitem__(self, spellings: str) -> Tensor:
        """The weight under the first of the ``a|b`` spellings that is given."""
        for symbol in spellings.split("|"):
            if symbol in self.given:
                self.used.add(symbol)
                return self.given[symbol]
        raise AssertionError(f"none of {spellings} among {sorted(self.given)}")


Rule = Callable[[Symbols, Stage], Tensor]


def linear(*spellings: str) -> Rule:
    """Matrices for ``x @ W``, side by side, as the weight of one `nn.Linear`."""
    return lambda given, stage: torch.cat([given[s] for s in spellings], dim=1).T


def plain(*spellings: str) -> Rule:
    """Vectors or taps, one after the other."""
    return lambda given, stage: torch.cat([given[s] for s in spellings])


def matrix(spelling: str) -> Rule:
    """A parameter kept in the specs' orientation."""
    return lambda given, stage: given[spelling]


def _parts(given: Symbols, stage: Compose, symbol: str, axis: int) -> Tensor:
    """The generated maps that the mixer has, of files that may hold all of pre-q, pre-k, post-q, post-k."""
    order = [(s, side) for s in ("pre", "post") for side in ("query", "key")]
    value = given[symbol]
    if value.shape[axis] == len(stage.parts):
        return value
    return value.index_select(axis, torch.tensor([order.index(part) for part in stage.parts]))


def _static(given: Symbols, stage: Compose, name: str) -> Tensor:
    if "W_b" not in given:
        return given[f"W_b_{name}"]
    stacked = given["W_b"].reshape(-1, stage.heads, stage.heads)
    return stacked[stage.composed.index(name)]


def _head_map(part: str, target: str) -> Rule:
    """A shared map of one target; a file with a single target leaves its name out."""
    return lambda given, stage: given[f"{part}_{target.upper()}|{part}_{target}|{part}"]


def _feature(part: str, target: str, i: int) -> Rule:
    """A learned feature map: per target or the same for both, per head or the same for all."""

    def rule(given: Symbols, stage: FeatureMap) -> Tensor:
        names = [f"phi{i + 1}", f"{i + 1}"] if stage.kind == "hadamard" else ["phi", "f"]
        forms = (f"{part}_{{}}_{target}", f"{part}{{}}_{target}", f"{part}_{{}}", f"{part}{{}}")
        spellings = [form.format(name) for form in forms for name in names] + [part]
        value, (heads, width) = given["|".join(spellings)], stage.shapes[target]
        return value.reshape(-1, width if part == "W" else 1, width).expand(heads, -1, -1)

    return rule


def _side_by_side(given: Symbols, stage: QKV) -> Tensor:
    """q, k and v (forget gate and input of some), or one matrix with the three of each head side by side."""
    if "W_qkv" not in given:
        return linear("W_q", "W_k|W_f", "W_v|W_i")(given, stage)
    heads = given["W_qkv"].unflatten(1, (stage.heads[0], -1)).split(stage.widths, dim=2)
    return torch.cat([part.flatten(1) for part in heads], dim=1).T


def _taps(name: str, more: str) -> Rule:
    """Taps or biases of one convolution, which may be part of one over values, keys and queries."""

    def rule(given: Symbols, stage: ShortConv) -> Tensor:
        if f"conv{more}" not in given:
            other = {"conv_k": "conv_f", "conv_v": "conv_i"}.get(name, name)
            return given[f"{name}{more}|{other}{more}"]
        sizes = [heads * width for heads, width in stage.shapes]
        q, k, v = range(3)
        parts = given[f"conv{more}"].split([sizes[v], sizes[k], sizes[q]])
        return parts[(v, k, q).index(ShortConv.names.index(name))]

    return rule


WEIGHTS: dict[type[Stage], dict[str, Rule]] = {
    QKV: {"qkv_proj.weight": _side_by_side, "qkv_proj.bias": plain("b_q", "b_k", "b_v")},
    Latent: {
        "q_down.weight": linear("W_dq"),
        "q_gain": plain("gamma_q"),
        "q_up.weight": linear("W_uq|W_q"),
        "kv_down.weight": linear("W_dkv"),
        "kv_gain": plain("gamma_kv"),
        "kv_up.weight": linear("W_ukv"),
    },
    LinearOut: {"out_proj.weight": linear("W_o|W_out"), "out_proj.bias": plain("b_o")},
    QKNorm: {"q_gain": plain("gamma_q"), "k_gain": plain("gamma_k")},
    ShortConv: {f"{name}{more}": _taps(name, more) for name in ShortConv.names for more in ("", "_bias")},
    HeadNorm: {"gain": plain("gamma_o|gamma")},
    Gate: {"gate.weight": linear("W_g|W_gamma"), "gate.bias": plain("b_g")},
    HeadRouter: {
        "scores.routed.weight": linear("W_r"),
        "scores.shared.weight": linear("W_s"),
        "scores.balance.weight": linear("W_b"),
    },
    SharedHeadMap: {
        f"{ours}_{target}": _head_map(part, target)
        for ours, part in (("T", "T"), ("up", "W_up"), ("gate", "W_gate"), ("down", "W_down"))
        for target in "qkv"
    },
    Compose: {
        "W1": lambda given, stage: _parts(given, stage, "W1", 1).flatten(1),
        "Q": lambda given, stage: _parts(given, stage, "Q", 0),
        "W_d": lambda given, stage: _parts(given, stage, "W_d", 1).flatten(1),
        "W_b_pre": lambda given, stage: _static(given, stage, "pre"),
        "W_b_post": lambda given, stage: _static(given, stage, "post"),
    },
    FeatureMap: {
        f"{part}_{target}{i}": _feature(part, target, i) for part in "Wb" for target in "qk" for i in range(2)
    },
    StepDecayBeta: {
        "decay.weight": linear("W_a"),
        "beta.weight": linear("W_beta"),
        "A_log": plain("A_log"),
        "dt_bias": plain("dt_bias"),
    },
}


@torch.no_grad()
def load_spec_weights(mixer: Mixer, weights: Mapping[str, Tensor]) -> Mixer:
    """Sets every parameter of ``mixer`` from weights under the specs' symbols, oriented for ``x @ W``.

    Raises:
        AssertionError: a symbol is missing or left over, a shape differs, or a parameter has no rule.
    """
    given, done = Symbols(weights), set()
    # what a stage is made of comes before it
    for stage in reversed(list(mixer.stages())):
        for name, param in stage.named_parameters():
            if param in done:  # of a stage inside this one
                continue
            rule = adapted("WEIGHTS").get(type(stage), {}).get(name)
            assert rule is not None, f"{type(stage).__name__}.{name} has no rule in WEIGHTS"
            value = rule(given, stage)
            assert value.shape == param.shape, f"{name}: need {tuple(param.shape)}, got {tuple(value.shape)}"
            param.copy_(value)
            done.add(param)
    unset = [name for name, param in mixer.named_parameters() if param not in done]
    assert not unset, f"no rule sets {unset}"
    unused = weights.keys() - given.used
    assert not unused, f"{mixer.name} has no parameter for {sorted(unused)}"
    return mixer

"""Outputs, caches, gradients and losses equal those of independent implementations; see `golden`.

Each file of ``golden/`` holds one or several cases; all that a file says beyond its output has a check below.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import attnzoo
from attnzoo.attention.base import Mixer
from attnzoo.attention.score import Single
from attnzoo.context import Collector, Context
from golden import adapted, load_spec_weights, spec_options

FILES = Path(__file__).parent / "golden"
TOLERANCE = 1e-9  # relative to the largest entry; the files and our code are fp64

# outputs under other options: what changes, and the symbols that come with them
VARIATIONS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "y_theta_500000": ({"rope_theta": 500000.0}, ()),
    "y_pos_none": ({"pos": "none"}, ()),
    "y_bias": ({"qkv_bias": True, "out_bias": True}, ("b_q", "b_k", "b_v", "b_o")),
    "y_qk_norm": ({"qk_norm": True}, ("gamma_q", "gamma_k")),
    "y_n_sink3": ({"n_sink": 3}, ()),
}
VARIATIONS |= adapted("VARIATIONS")
SYMBOLS = {symbol for _, symbols in VARIATIONS.values() for symbol in symbols}
INPUTS = {"segment_ids", "dy"}
SLOTS = {"cache_k": "k", "cache_v": "v", "cache_c": "latent", "cache_kr": "k_rope", "final_state": "S"}
# files whose layers depend on each other: tests/zoo reads them
LAYERED = adapted("LAYERED")


class Case(NamedTuple):
    """One mixer with its weights, and what is known of it."""

    name: str
    options: dict[str, Any]
    weights: dict[str, Tensor]
    x: Tensor
    y: Tensor
    extra: dict[str, Any]

    def mixer(self, impl: str = "auto") -> Mixer:
        options = spec_options(self.name, self.options)
        mixer = attnzoo.create(self.name, self.x.shape[-1], impl=impl, **options).double()
        return load_spec_weights(mixer, self.weights)


def read(path: Path) -> dict[str, Case]:
    """The cases of a file: its own, those nested in ``extra``, and the variations of its output."""
    file = torch.load(path, weights_only=True)
    name, extra = file["name"], file["extra"]
    cases, own = {}, {}
    for key, value in extra.items():
        if isinstance(value, dict) and "weights" in value:
            rest = {k: v for k, v in value.items() if k not in ("spec_options", "weights", "x", "y")}
            both = file | value
            cases[f"{name}-{key}"] = Case(
                name, both["spec_options"], both["weights"], both["x"], both["y"], rest
            )
        elif key in VARIATIONS:
            options, symbols = VARIATIONS[key]
            weights = file["weights"] | {symbol: extra[symbol] for symbol in symbols}
            cases[f"{name}-{key}"] = Case(name, file["spec_options"] | options, weights, file["x"], value, {})
        elif key not in SYMBOLS:
            own[key] = value
    return {name: Case(name, file["spec_options"], file["weights"], file["x"], file["y"], own)} | cases


CASES = {
    key: case
    for path in sorted(FILES.glob("*.pt"))
    if path.stem in attnzoo.list_variants() and path.stem not in LAYERED
    for key, case in read(path).items()
}


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error <= TOLERANCE, f"off by {error:.1e} of the largest entry"


def decode(mixer: Mixer, x: Tensor, prefill: int) -> Tensor:
    """``prefill`` tokens at once, then one at a time."""
    cache = mixer.new_cache(len(x), x.shape[1])
    parts = [x[:, :prefill], *x[:, prefill:].split(1, dim=1)]
    return torch.cat([mixer(part, cache=cache) for part in parts], dim=1)


def check_packed(case: Case, y: Tensor, ids: Tensor) -> None:
    # the files count documents from 0, which is padding here
    ctx = Context(segment_ids=(ids + 1).expand(len(case.x), -1))
    close(case.mixer()(case.x, ctx), y)


def check_cache(case: Case, slot: str, expected: Tensor) -> None:
    mixer = case.mixer()
    cache = mixer.new_cache(*case.x.shape[:2])
    mixer(case.x, cache=cache)
    close(cache.slots[slot].reshape(expected.shape), expected)


def check_absorbed(case: Case, expected: Tensor) -> None:
    mixer = case.mixer()
    assert mixer.project.absorbs(1, 18), "decoding should read the latent as it is"
    close(decode(mixer, case.x, 17), expected)


def check_gradient(case: Case, expected: Tensor) -> None:
    x = case.x.clone().requires_grad_()
    case.mixer().train()(x).backward(case.extra["dy"])
    close(x.grad, expected)


def check_offset(case: Case, invariant: bool) -> None:
    positions = torch.arange(case.x.shape[1])[None] + 1000
    assert invariant
    close(case.mixer()(case.x, Context(positions=positions)), case.y)


def collected(case: Case) -> Collector:
    collector = Collector()
    case.mixer()(case.x, Context(collector=collector))
    return collector


def check_balance(case: Case, expected: Tensor) -> None:
    close(collected(case).losses["moh/balance"][0][0], expected)


def check_gate(case: Case, expected: Tensor) -> None:
    close(collected(case).stats["moh/gate"][0], expected)


class Watched(Single):
    """The plain read, which keeps the weights."""

    def forward(self, q: Tensor, keys: Any, attend: Callable, call: Any) -> Tensor:
        o, more = attend(q, keys, also=("p",))
        self.p = more["p"]
        return o


def check_weights(case: Case, expected: Tensor) -> None:
    mixer = case.mixer()
    mixer.read = Watched()
    close(mixer(case.x), case.y)
    close(mixer.read.p, expected)


def check_mask(case: Case, expected: Tensor, **options: Any) -> None:
    mask = case._replace(options=case.options | options).mixer().mask.mask
    assert torch.equal(mask.dense(len(expected)), expected)


def check_small_eps(case: Case, expected: Tensor) -> None:
    mixer = case.mixer()
    # the source scales queries by d^(-1/2) above and below the line, which scales its eps of 1e-10
    mixer.combine[0].eps = 1e-10 * (case.x.shape[-1] / mixer.num_heads) ** 0.5
    close(mixer(case.x), expected)


CHECKS: dict[str, Callable[[Case, Any], None]] = {
    "y_packed": lambda case, y: check_packed(case, y, case.extra["segment_ids"]),
    "packed": lambda case, packed: check_packed(case, packed["y"], packed["segment_ids"]),
    "y_absorbed_decode": check_absorbed,
    "dx": check_gradient,
    "position_offset_invariant": check_offset,
    "aux_loss_unweighted": check_balance,
    "gate": check_gate,
    "P": check_weights,
    "M": check_mask,
    "M_n_sink3": lambda case, expected: check_mask(case, expected, n_sink=3),
    "y_eps1e10": check_small_eps,
} | {key: lambda case, expected, slot=slot: check_cache(case, slot, expected) for key, slot in SLOTS.items()}
# an adapter's checks may be for one variant only: "name/key"
CHECKS |= adapted("CHECKS")

EXTRA = [(key, what) for key, case in CASES.items() for what in case.extra if what not in INPUTS]


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("key", CASES)
def test_output(key: str, impl: str) -> None:
    case = CASES[key]
    close(case.mixer(impl)(case.x), case.y)


@pytest.mark.parametrize("prefill", [1, 11])
@pytest.mark.parametrize("key", CASES)
def test_decode(key: str, prefill: int) -> None:
    case = CASES[key]
    close(decode(case.mixer(), case.x, prefill), case.y)


@pytest.mark.parametrize("key, what", EXTRA, ids=["-".join(pair) for pair in EXTRA])
def test_extra(key: str, what: str) -> None:
    case = CASES[key]
    what = f"{case.name}/{what}" if f"{case.name}/{what}" in CHECKS else what
    assert what in CHECKS, f"golden/{case.name}.pt: nothing reads extra[{what!r}]; check it or leave it out"
    CHECKS[what](case, case.extra[what.rpartition("/")[2]])


def test_the_adapter_notices_what_does_not_fit() -> None:
    case = CASES["gqa"]
    mixer = case.mixer()
    for wrong in (
        {k: v for k, v in case.weights.items() if k != "W_v"},
        case.weights | {"W_dkv": case.x[0]},
        case.weights | {"W_k": case.weights["W_q"]},
    ):
        with pytest.raises(AssertionError):
            load_spec_weights(mixer, wrong)

"""Deliberately broken mixers: one mistake each, and the property that must catch it.

Each is a healthy variant with one stage swapped, so that what fails is the mistake and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnzoo import card, create
from attnzoo.attention.base import Mixer, Stage, same
from attnzoo.attention.call import Call
from attnzoo.attention.slots import Slot
from attnzoo.attention.stages.mask import Mask, Static
from attnzoo.attention.timeline import Axis
from attnzoo.cost import Work
from attnzoo.testing import Subject


@dataclass(frozen=True)
class Broken:
    """``host`` with ``damage`` done to it; the property ``caught_by`` must fail."""

    host: str
    caught_by: str
    damage: Callable[[Mixer], None]
    options: tuple[tuple[str, object], ...] = ()

    def subject(self) -> Subject:
        def make(dim: int, num_heads: int, **options: object) -> Mixer:
            mixer = create(self.host, dim, num_heads, **options)
            self.damage(mixer)
            return mixer

        return Subject(make, card(self.host), dict(self.options))


@dataclass(frozen=True)
class OneAhead(Mask):
    def rule(self, q: Tensor, k: Tensor) -> Tensor:
        return k <= q + 1


@dataclass(frozen=True)
class AcrossDocuments(Mask):
    """Sees whatever lies before it in the row."""

    def rule(self, q: Tensor, k: Tensor) -> Tensor:
        return k <= q

    def visible(self, query: Axis, key: Axis) -> Tensor:
        T, S = query.order.shape[1], key.order.shape[1]
        return (torch.arange(S)[None] <= torch.arange(S - T, S)[:, None])[None]


class Combine(Stage):
    """A combine stage from a function of (o, call)."""

    rank = 45

    def __init__(self, change: Callable[[Tensor, Call], Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, o: Tensor, call: Call) -> Tensor:
        return self.change(o, call)


class Idle(Combine):
    """Has a parameter that does not matter."""

    def __init__(self) -> None:
        super().__init__(lambda o, call: o)
        self.idle = nn.Parameter(torch.ones(3))


class Unsaved(Combine):
    """Weights that state_dict does not know."""

    def __init__(self) -> None:
        super().__init__(lambda o, call: o * self.secret)
        self.secret = torch.rand(1, dtype=torch.float64).item()


class SharedRow(Combine):
    """Promises a cached row that it does not keep in its cost, by declaring it only once a cache is built."""

    def __init__(self) -> None:
        super().__init__(lambda o, call: o)
        self.asked = 0

    def memory(self) -> dict[str, Slot]:
        self.asked += 1
        return {} if self.asked % 2 else {"extra": Slot("rows", (1, 4))}


class FreeWork(Combine):
    """Claims the FLOPs of one head too many."""

    def __init__(self) -> None:
        super().__init__(lambda o, call: o)

    def work(self, length: int) -> list[Work]:
        return [Work("mixing", "a ninth head", 2.0 * length * 8)]


def mask_of(mask: Mask) -> Callable[[Mixer], None]:
    def damage(mixer: Mixer) -> None:
        mixer.mask = Static(mask)

    return damage


def combine_with(make: Callable[[], Stage]) -> Callable[[Mixer], None]:
    return lambda mixer: mixer.combine.append(make())


def of_output(change: Callable[[Tensor, Call], Tensor]) -> Callable[[Mixer], None]:
    return combine_with(lambda: Combine(change))


def forgetful_conv(mixer: Mixer) -> None:
    """The convolution sees zeros where the last call's tokens were."""
    conv = mixer.refine[0]
    whole = type(conv)._one

    def one(i: int, z: Tensor, call: Call) -> Tensor:
        for name in conv.names:
            state = call.mem.state(name)
            if state is not None:
                state.zero_()
        return whole(conv, i, z, call)

    conv._one = one


def uncut_conv(mixer: Mixer) -> None:
    """The convolution does not notice where documents begin."""
    conv = mixer.refine[0]
    whole = type(conv)._one

    def one(i: int, z: Tensor, call: Call) -> Tensor:
        doc, call.line.doc = call.line.doc, None
        y = whole(conv, i, z, call)
        call.line.doc = doc
        return y

    conv._one = one


def fixed_positions(mixer: Mixer) -> None:
    """Rotates by the place inside the call, not inside the document."""
    turn = type(mixer.position).turn

    def start_over(z: Tensor, pos: Tensor, call: Call) -> Tensor:
        return turn(mixer.position, z, torch.arange(z.shape[2])[None], call)

    mixer.position.turn = start_over


def wrong_reference(mixer: Mixer) -> None:
    """The reference scales scores by a constant too much."""
    if mixer.impl == "reference":
        mixer.scale *= 1.01


def overflowing(mixer: Mixer) -> None:
    """Exponentiates scores without subtracting their maximum."""

    class Exp(Stage):
        def forward(self, s: Tensor, visible: Tensor) -> Tensor:
            p = s.exp().masked_fill(~visible, 0.0)
            return p / p.sum(-1, keepdim=True).clamp(min=1e-30)

    mixer.normalise, mixer.choices = Exp(), same("reference", "its own exponential")


def last_row(o: Tensor, call: Call) -> Tensor:
    return o + o[:, -1:].detach() * 0.1


BROKEN = {
    "reads one future token": Broken("mha", "causal", mask_of(OneAhead())),
    "has a gradient to the future": Broken(
        "mha",
        "causal_gradient",
        of_output(lambda o, c: o + (c.x - c.x.detach()).mean((1, 2))[:, None, None, None]),
    ),
    "uses the mean over the whole sequence": Broken(
        "mha", "causal", of_output(lambda o, c: o + c.x.mean((1, 2))[:, None, None, None])
    ),
    "adds the last row": Broken("mha", "causal", of_output(last_row)),
    "divides by the length": Broken("mha", "prefix_consistent", of_output(lambda o, c: o / c.x.shape[1])),
    "reads across documents": Broken("mha", "documents", mask_of(AcrossDocuments())),
    "convolves across documents": Broken("gated_deltanet", "documents", uncut_conv),
    "leaks document gradients": Broken(
        "mha",
        "document_gradients",
        of_output(lambda o, c: o + (c.x - c.x.detach()).mean((1, 2))[:, None, None, None]),
    ),
    "forgets the convolution's cache": Broken("gated_deltanet", "decode", forgetful_conv),
    "starts positions over in each call": Broken("mha", "decode", fixed_positions),
    "ignores given positions": Broken("mha", "decode_positions", fixed_positions),
    "decodes packed rows from the wrong place": Broken("mha", "document_decode", fixed_positions),
    "decodes unequal prompts from the wrong place": Broken("mha", "unequal_prompts", fixed_positions),
    "depends on the other rows": Broken(
        "mha", "row_independent", of_output(lambda o, c: o - 0.1 * o.mean(0))
    ),
    "has a parameter without gradient": Broken("mha", "gradients", combine_with(Idle)),
    "bills one head too many": Broken("mha", "flops", combine_with(FreeWork)),
    "caches more than it promises": Broken("mha", "cache_bytes", combine_with(SharedRow)),
    "has a reference of its own opinion": Broken("mha", "forms", wrong_reference),
    "overflows": Broken("mha", "finite", overflowing),
    "loses weights on the way": Broken("mha", "state_dict", combine_with(Unsaved)),
    "rounds in bf16": Broken(
        "mha", "low_precision", of_output(lambda o, c: (o * 2).round() / 2 if o.dtype != torch.float64 else o)
    ),
}

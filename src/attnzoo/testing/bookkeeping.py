"""Properties of what surrounds the mathematics: costs, saved weights, seeds, refusals."""

from __future__ import annotations

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode

from attnzoo.attention.base import Mixer
from attnzoo.context import Context
from attnzoo.testing.subject import BATCH, DIM, HEADS, LENGTH, Subject, gap, inputs, require


def parameters(subject: Subject) -> None:
    """``cost().params`` equals the parameters, also on the meta device, where nothing is allocated."""
    with torch.device("meta"):
        mixer = subject.make(DIM, HEADS, **subject.options)
    count = sum(p.numel() for p in mixer.parameters())
    require(all(p.is_meta for p in mixer.parameters()), "a parameter is allocated on the meta device")
    for built in (mixer, subject.mixer()):
        params = built.cost(LENGTH).params
        require(params == count, f"cost() says {params} parameters, there are {count}")


def flops(subject: Subject) -> None:
    """A counted run of the reference equals ``executed_flops``; what exceeds ``forward_flops`` is named."""
    mixer = subject.mixer(impl="reference").eval()
    for length in (LENGTH, 150):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            mixer(inputs(length=length))
        counted, cost = counter.get_total_flops() / (BATCH * length), mixer.cost(length)
        runs = cost.executed_flops + cost.weight_flops / (BATCH * length)
        if cost.exact:
            require(
                abs(runs - counted) <= 1e-9 * counted,
                f"cost() says {runs:.6g} executed FLOPs per token, a run has {counted:.6g}",
            )
        else:
            require(
                counted <= runs * (1 + 1e-9),
                f"cost() bounds FLOPs per token by {runs:.6g}, a run has {counted:.6g}",
            )
        named = sum(cost.masked.values())
        require(
            abs(cost.executed_flops - cost.forward_flops - named) <= 1e-9 * runs,
            "executed - forward is not what masked names",
        )
        require(
            abs(sum(cost.split.values()) - cost.forward_flops) <= 1e-9 * runs,
            "split does not add up to forward_flops",
        )
        require(
            cost.forward_flops <= cost.executed_flops * (1 + 1e-12),
            "the method needs more than the reference runs",
        )
        require(cost.train_flops == 3 * cost.forward_flops, "train_flops is not three forwards")


def state_dict(subject: Subject) -> None:
    """Weights survive a round trip into a mixer of another seed, exactly."""
    mixer, other, x = subject.mixer(seed=0).eval(), subject.mixer(seed=5).eval(), inputs()
    saved = copy.deepcopy(mixer.state_dict())
    other.load_state_dict(saved, strict=True)
    with torch.no_grad():
        require(torch.equal(other(x), mixer(x)), "the output differs after loading the state_dict")
        require(torch.equal(mixer(x), mixer(x)), "two forwards in eval mode differ")


def seeded(subject: Subject) -> None:
    """The same seed gives the same weights."""
    first, second = (_initial(subject) for _ in range(2))
    require(first.keys() == second.keys(), "two constructions have other parameters")
    for name, value in first.items():
        require(torch.equal(value, second[name]), f"{name} differs between two constructions with one seed")


def sizes(subject: Subject) -> None:
    """Works with just dim and num_heads, tiny and odd shapes included, and names a wrong input."""
    for dim, heads in ((8, 4), (16, 2), (24, 1), (48, 6), (36, 6), (DIM, HEADS)):
        torch.manual_seed(0)
        mixer = subject.make(dim, heads)
        with torch.no_grad():
            y = mixer(torch.randn(1, 5, dim))
        require(
            y.shape == (1, 5, dim) and bool(y.isfinite().all()), f"dim={dim}, num_heads={heads} does not work"
        )
    mixer, x = subject.mixer(), inputs()
    for ctx, bad, field in (
        (None, x[..., 1:], "x"),
        (None, x[:, :0], "x"),
        (Context(positions=torch.zeros(3, 3)), x, "positions"),
        (Context(segment_ids=torch.ones(BATCH, 2, dtype=torch.long)), x, "segment_ids"),
        (Context(segment_ids=-torch.ones(BATCH, LENGTH, dtype=torch.long)), x, "segment_ids"),
    ):
        _refuses(mixer, bad, ctx, field)


def default_positions(subject: Subject) -> None:
    """Positions given as 0..T-1 are the default ones."""
    mixer, x = subject.mixer().eval(), inputs()
    with torch.no_grad():
        given = mixer(x, Context(positions=torch.arange(LENGTH)[None].expand(BATCH, -1)))
        error = gap(given, mixer(x))
    require(error <= 1e-12, f"positions 0..T-1 differ by {error:.1e} from the default")


def _initial(subject: Subject) -> dict[str, torch.Tensor]:
    torch.manual_seed(11)
    return dict(subject.make(DIM, HEADS, **subject.options).state_dict())


def _refuses(mixer: Mixer, x: torch.Tensor, ctx: Context | None, field: str) -> None:
    try:
        mixer(x, ctx)
    except ValueError as error:
        require(str(error).startswith(field), f"the message does not start with the field {field!r}: {error}")
        return
    raise AssertionError(f"a wrong {field} does not raise ValueError")

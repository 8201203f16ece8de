"""Properties of decoding: a cache changes when work is done, never what comes out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnzoo.attention.base import Mixer
from attnzoo.context import Context
from attnzoo.testing.subject import BATCH, LENGTH, Subject, gap, inputs, require

SPLITS = ((1,) * LENGTH, (LENGTH,), (9, *(1,) * (LENGTH - 9)), (1, 7, 1, 12), (6, 15), (2, 1, 1, 3, 14))
LIMITS = {torch.float64: 1e-9, torch.float32: 2e-4}


def decode(subject: Subject) -> None:
    """Prefill, chunked prefill and one-token decode at many split points equal one full forward."""
    if not subject.has("decodes"):
        _refuses_cache(subject)
        return
    for dtype, limit in LIMITS.items():
        mixer, x = subject.mixer(dtype).eval(), inputs(dtype=dtype)
        with torch.no_grad():
            y = mixer(x)
            for split in SPLITS if dtype == torch.float64 else SPLITS[2:4]:
                error = gap(in_pieces(mixer, x, split), y)
                require(error <= limit, f"decoding in pieces of {split} differs by {error:.1e} in {dtype}")


def decode_positions(subject: Subject) -> None:
    """Positions that start elsewhere go on from the cache when they are not given again."""
    if not subject.has("decodes"):
        return
    mixer, x = subject.mixer().eval(), inputs()
    positions = torch.arange(LENGTH)[None].expand(BATCH, -1) + 100
    with torch.no_grad():
        y = mixer(x, Context(positions=positions))
        cache = mixer.new_cache(BATCH, LENGTH)
        first = mixer(x[:, :8], Context(positions=positions[:, :8]), cache)
        rest = [mixer(x[:, t : t + 1], cache=cache) for t in range(8, LENGTH)]
    error = gap(torch.cat([first, *rest], dim=1), y)
    require(error <= LIMITS[torch.float64], f"decoding on from given positions differs by {error:.1e}")


def cache_bytes(subject: Subject) -> None:
    """``nbytes == batch * (ceil(max_len * cache_bytes_per_token) + state_bytes)``, before and after use."""
    if not subject.has("decodes"):
        return
    for module_dtype, dtype, max_len in (
        (torch.float32, torch.bfloat16, 37),
        (torch.float32, torch.float32, LENGTH),
        (torch.float64, torch.float64, 64),
    ):
        mixer = subject.mixer(module_dtype).eval()
        cost = mixer.cost(max_len, dtype=dtype)
        cache = mixer.new_cache(3, max_len, dtype=dtype)
        promised = 3 * (math.ceil(max_len * cost.cache_bytes_per_token) + cost.state_bytes)
        # blocks end where they do: a number of which only a part is due takes its whole room
        spare = 3 * 8 * _block_slots(mixer)
        require(
            promised <= cache.nbytes <= promised + spare,
            f"cost() promises {promised} bytes of {dtype} cache, it has {cache.nbytes}",
        )
        promised = cache.nbytes
        with torch.no_grad():
            mixer(inputs(batch=3, dtype=module_dtype), cache=cache)
        require(cache.nbytes == promised, f"the cache grew from {promised} to {cache.nbytes} bytes in use")
        held = sum(t.numel() * t.element_size() for t in cache.slots.values())
        require(held == promised, f"the cache's tensors hold {held} bytes, nbytes says {promised}")


def in_pieces(mixer: Mixer, x: Tensor, split: tuple[int, ...], ids: Tensor | None = None) -> Tensor:
    """The outputs of consecutive calls with one cache."""
    cache, outs, start = mixer.new_cache(x.shape[0], x.shape[1]), [], 0
    for size in split:
        here = slice(start, start + size)
        ctx = None if ids is None else Context(segment_ids=ids[:, here])
        outs.append(mixer(x[:, here], ctx, cache))
        start += size
    return torch.cat(outs, dim=1)


def _block_slots(mixer: torch.nn.Module) -> int:
    layers = getattr(mixer, "mixers", [mixer])
    return sum(slot.kind == "blocks" for layer in layers for slot in layer.memory().values())


def _refuses_cache(subject: Subject) -> None:
    """A cache is refused, or else the first piece after which it could not go on."""
    try:
        in_pieces(subject.mixer().eval(), inputs(), SPLITS[0])
    except ValueError:
        return
    raise AssertionError("the card says decodes=False, but decoding by tokens does not raise ValueError")

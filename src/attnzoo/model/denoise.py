"""Sampling from a block-diffusion model: block by block, the surest masked tokens first."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from attnzoo.context import Context
from attnzoo.model.backbone import LanguageModel, ModelCache
from attnzoo.model.choose import Chooser, Results


def denoise(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    choose: Chooser,
    results: Results,
    steps: int | None = None,
) -> None:
    """Continues each prompt in blocks of the model's size, counted from the prompt's start.

    The blocks that a prompt fills are cached; the rest of it opens the first block that is denoised. In each
    step every masked token is drawn, and those with the highest probability stay. A finished block is cached
    and the next one, all masked, begins.
    """
    device, spec, batch = model.embed.weight.device, model.objective, len(prompts)
    size, mask = spec.block_size, spec.mask_id(model.config["vocab_size"])
    whole = [len(prompt) // size * size for prompt in prompts]
    more = max(math.ceil((len(p) - n + results.most) / size) for p, n in zip(prompts, whole, strict=True))
    cache = model.new_cache(batch, max(whole) + more * size, device=device)
    if max(whole):
        _prefill(model, prompts, whole, cache, device)
    block = torch.full((batch, size), mask, dtype=torch.long)
    for i, (prompt, n) in enumerate(zip(prompts, whole, strict=True)):
        block[i, : len(prompt) - n] = torch.as_tensor(prompt[n:])
    for number in range(more):
        given = [len(p) - n if number == 0 else 0 for p, n in zip(prompts, whole, strict=True)]
        hidden = torch.arange(size)[None] >= torch.tensor(given)[:, None]
        _fill(model, block, hidden, cache, choose, steps)
        for i in sorted(results.live):
            for token in block[i, given[i] :].tolist():
                if i in results.live:
                    results.add(i, token)
        if not results.live or number == more - 1:
            return
        model(block.to(device), cache=cache, keep=slice(0, 0))
        block.fill_(mask)


def _prefill(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    whole: Sequence[int],
    cache: ModelCache,
    device: torch.device,
) -> None:
    longest = max(whole)
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long)
    ids = torch.zeros_like(tokens)
    for i, (prompt, n) in enumerate(zip(prompts, whole, strict=True)):
        tokens[i, :n], ids[i, :n] = torch.as_tensor(prompt[:n]), 1
    ctx = None if bool((ids == 1).all()) else Context(segment_ids=ids.to(device))
    model(tokens.to(device), ctx, cache, keep=slice(0, 0))


def _fill(
    model: LanguageModel,
    block: Tensor,
    hidden: Tensor,
    cache: ModelCache,
    choose: Chooser,
    steps: int | None,
) -> None:
    """Replaces the ``hidden`` tokens of ``block`` ``(B, size)`` in place."""
    spec, hidden = model.objective, hidden.clone()
    rounds = block.shape[1] if steps is None else min(steps, block.shape[1])
    for step in range(rounds):
        if not bool(hidden.any()):
            return
        back = mark(model, cache)
        logits = model(block.to(model.embed.weight.device), cache=cache)
        back()
        if spec.mask_token_id is not None:
            logits[..., spec.mask_token_id] = -math.inf
        for row, waits in enumerate(hidden):
            places = waits.nonzero()[:, 0]
            if not len(places):
                continue
            tokens, sure = choose.each(logits[row, places.to(logits.device)], row)
            keep = 1 if steps is None else math.ceil(len(places) / (rounds - step))
            best = sure.topk(keep).indices
            block[row, places[best]] = tokens[best]
            hidden[row, places[best]] = False


def mark(model: LanguageModel, cache: ModelCache) -> Callable[[], None]:
    """A way back to what the cache holds now. Rows that came later stay, to be overwritten."""
    clock = copy.copy(cache.clock)
    kept = [
        (layer.slots[name], layer.slots[name].clone())
        for mixer, layer in zip(model.mixers, cache.layers, strict=True)
        for name, slot in mixer.memory().items()
        if slot.kind != "rows" or layer.retain is not None
    ]

    def back() -> None:
        vars(cache.clock).update(vars(clock))
        for tensor, before in kept:
            tensor.copy_(before)

    return back

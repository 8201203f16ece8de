"""Sampling from a model, many prompts of unequal length at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attnzoo.context import Context
from attnzoo.model.backbone import LanguageModel
from attnzoo.model.choose import Chooser, Results
from attnzoo.model.denoise import denoise


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop: Sequence[Sequence[int]] | None = None,
    steps: int | None = None,
) -> list[list[int]]:
    """Continues each prompt: token by token, or block by block where the model was trained that way.

    Args:
        prompts: token ids, at least one each; rows are independent, so batched equals one by one.
        max_new_tokens: tokens to add at most.
        temperature: 0 = the likeliest token. top_k, top_p: restrict sampling to the likeliest tokens.
        seed: every row draws from its own generator (seed + row), so rows do not depend on each other.
        stop: token sequences that end a row; they are left out of the result.
        steps: denoising steps per block of a block-diffusion model; default one per token.

    Returns:
        The new tokens of each row.

    Raises:
        ValueError: no prompt, an empty prompt, or a sampling option out of range.
    """
    _check(prompts, max_new_tokens, temperature, top_k, top_p)
    blocks = model.objective is not None
    if steps is not None and not (blocks and steps >= 1):
        rule = "must be at least 1" if blocks else "this model writes token by token, without denoising steps"
        raise ValueError(f"steps: {rule}, got {steps}; leave it out")
    batch = len(prompts)
    draws = [
        torch.Generator().manual_seed((seed or 0) + i) if seed is not None else None for i in range(batch)
    ]
    results = Results(batch, max_new_tokens, stop or ())
    choose = Chooser(temperature, top_k, top_p, draws)
    was_training = model.training
    model.eval()
    if blocks:
        denoise(model, prompts, choose, results, steps)
    else:
        _by_tokens(model, prompts, choose, results)
    model.train(was_training)
    return results.rows


def _by_tokens(
    model: LanguageModel, prompts: Sequence[Sequence[int]], choose: Chooser, results: Results
) -> None:
    device, batch, longest = model.embed.weight.device, len(prompts), max(map(len, prompts))
    tokens = torch.zeros(batch, longest, dtype=torch.long, device=device)
    ids = torch.zeros_like(tokens)
    for i, prompt in enumerate(prompts):
        tokens[i, longest - len(prompt) :] = torch.as_tensor(prompt, device=device)
        ids[i, longest - len(prompt) :] = 1
    cache = model.new_cache(batch, longest + results.most, device=device)
    context = None if bool((ids == 1).all()) else Context(segment_ids=ids)
    while results.live:
        logits = model(tokens, context, cache)[:, -1]
        context = None
        tokens = choose(logits)[:, None].to(device)
        for i in sorted(results.live):
            results.add(i, int(tokens[i]))


def _check(
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    if not prompts or any(len(p) == 0 for p in prompts):
        raise ValueError("prompts: give at least one prompt of at least one token, got an empty one")
    rules = {
        "max_new_tokens": (max_new_tokens >= 1, "at least 1", max_new_tokens),
        "temperature": (temperature >= 0, "at least 0 (0 = likeliest token)", temperature),
        "top_k": (top_k is None or top_k >= 1, "at least 1", top_k),
        "top_p": (top_p is None or 0 < top_p <= 1, "in (0, 1]", top_p),
    }
    for name, (fits, rule, value) in rules.items():
        if not fits:
            raise ValueError(f"{name}: must be {rule}, got {value}")

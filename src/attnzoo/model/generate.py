"""Sampling from a model, many prompts of unequal length at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from attnzoo.context import Context
from attnzoo.model.backbone import LanguageModel


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
) -> list[list[int]]:
    """Continues each prompt.

    Args:
        prompts: token ids, at least one each; rows are independent, so batched equals one by one.
        max_new_tokens: tokens to add at most.
        temperature: 0 = the likeliest token. top_k, top_p: restrict sampling to the likeliest tokens.
        seed: every row draws from its own generator (seed + row), so rows do not depend on each other.
        stop: token sequences that end a row; they are left out of the result.

    Returns:
        The new tokens of each row.

    Raises:
        ValueError: no prompt, an empty prompt, or a sampling option out of range.
    """
    _check(prompts, max_new_tokens, temperature, top_k, top_p)
    device, batch = model.embed.weight.device, len(prompts)
    longest = max(map(len, prompts))
    tokens = torch.zeros(batch, longest, dtype=torch.long, device=device)
    ids = torch.zeros_like(tokens)
    for i, prompt in enumerate(prompts):
        tokens[i, longest - len(prompt) :] = torch.as_tensor(prompt, device=device)
        ids[i, longest - len(prompt) :] = 1
    draws = [
        torch.Generator().manual_seed((seed or 0) + i) if seed is not None else None for i in range(batch)
    ]
    cache = model.new_cache(batch, longest + max_new_tokens, device=device)
    context = None if bool((ids == 1).all()) else Context(segment_ids=ids)
    was_training = model.training
    model.eval()
    results: list[list[int]] = [[] for _ in range(batch)]
    live = set(range(batch))
    for _ in range(max_new_tokens):
        logits = model(tokens, context, cache)[:, -1]
        context = None
        tokens = _sample(logits, temperature, top_k, top_p, draws)[:, None].to(device)
        for i in sorted(live):
            results[i].append(int(tokens[i]))
            ended = next((s for s in stop or () if s and results[i][-len(s) :] == list(s)), None)
            if ended is not None:
                del results[i][-len(ended) :]
                live.discard(i)
        if not live:
            break
    model.train(was_training)
    return results


def _sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    draws: list[torch.Generator | None],
) -> Tensor:
    """``(B, vocab)`` -> ``(B,)``."""
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits.float() / temperature).softmax(-1).cpu()
    if top_k is not None and top_k < p.shape[-1]:
        p = p.masked_fill(p < p.topk(top_k, dim=-1).values[:, -1:], 0.0)
    if top_p is not None:
        ranked, order = p.sort(dim=-1, descending=True)
        outside = ranked.cumsum(-1) - ranked >= top_p * p.sum(-1, keepdim=True)
        p = torch.zeros_like(p).scatter(-1, order, ranked.masked_fill(outside, 0.0))
    return torch.cat([torch.multinomial(row, 1, generator=draw) for row, draw in zip(p, draws, strict=True)])


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

"""How long a trained model takes for one more token, and what its cache holds by then."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from statistics import median
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn

from attnzoo.registry import lacking

SECONDS = 0.3  # of one-token steps at one context length
LEAST = 3  # steps, however slow


def decode_summary(trainer: Trainer, model: nn.Module, seq_len: int, steps: int) -> dict[str, Any]:
    """The summary's key ``decode``; null with ``decode_reason`` where there is nothing to measure.

    Args:
        seq_len: T; the contexts are T/4, T/2 and T. steps: one-token steps at each, 0 for no measurement.
    """
    try:
        if reason := _obstacle(trainer, model, steps):
            raise ValueError(reason)
        device = trainer.strategy.root_device  # Lightning moves the model off it at the end
        before = next(model.parameters()).device
        model.to(device)
        try:
            contexts = sorted({seq_len // 4, seq_len // 2, seq_len} - {0, 1})
            return {"decode": measure(model, contexts, steps, trainer.precision_plugin.forward_context)}
        finally:
            model.to(before)
    except Exception as error:  # a trained model is worth more than this number
        return {"decode": None, "decode_reason": str(error) or type(error).__name__}


def measure(
    model: nn.Module, contexts: list[int], steps: int, autocast: Callable[[], AbstractContextManager]
) -> dict[str, list[float]]:
    """Median time of a one-token step of one sequence whose last step fills ``contexts[i]`` tokens.

    Leaves the model's mode and torch's generators as they were.

    Returns:
        "context", "ms_per_token", and "cache_bytes": of a cache for so many tokens in bf16, as everywhere.
    """
    device, was_training, call = next(model.parameters()).device, model.training, model.run_block
    model.eval()
    model.run_block = nn.Module.__call__  # nothing to recompute
    times, sizes = [], []
    try:
        with torch.random.fork_rng(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            for context in contexts:
                times.append(1000 * _step_seconds(model, context, min(steps, context - 1), device, autocast))
                sizes.append(model.new_cache(1, context, dtype=torch.bfloat16, device=device).nbytes)
    finally:
        model.train(was_training)
        model.run_block = call
    return {"context": contexts, "ms_per_token": times, "cache_bytes": sizes}


def _step_seconds(
    model: nn.Module,
    context: int,
    steps: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> float:
    tokens = torch.arange(context, device=device)[None] % model.config["vocab_size"]
    cache, times, begun = model.new_cache(1, context, device=device), [], time.perf_counter()
    with autocast():
        model(tokens[:, : context - steps], cache=cache, keep=slice(-1, None))
        for i in range(context - steps, context):
            _wait(device)
            start = time.perf_counter()
            model(tokens[:, i : i + 1], cache=cache)
            _wait(device)
            times.append(time.perf_counter() - start)
            if i == context - steps:
                begun = time.perf_counter()  # the first step warms up
            elif time.perf_counter() - begun > SECONDS and len(times) > LEAST:
                break
    return median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _obstacle(trainer: Trainer, model: nn.Module, steps: int) -> str:
    if not steps:
        return "trainer.decode_tokens is 0"
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        return f"the model is sharded by {type(trainer.strategy).__name__}"
    if model.objective is not None:
        return f"the model is not decoded token by token, but by {model.objective}"
    stuck = sorted({name for mixer in model.mixers for name in lacking(mixer, "decodes")})
    return f"{', '.join(stuck)} cannot decode" if stuck else ""

"""Why a loss is not finite: the batch again, watched module by module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class RunFailed(RuntimeError):
    """A run that cannot go on; its message is one line for the user."""


def find_culprit(model: nn.Module, forward: Callable[[], Any]) -> str:
    """Where the first non-finite number of a failed step arises, in words.

    Args:
        model: as it was in the failed step, its gradients included.
        forward: repeats the forward pass of the failed batch.
    """
    for name, p in model.named_parameters():
        if not torch.isfinite(p).all():
            return f"the weights of {name}, before the step"
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), _watch(model) as bad:
        forward()
    if bad:
        return f"the output of {bad[0]}"
    # finite forwards, so the backward pass overflowed: it meets the last parameters first
    gradients = [
        name for name, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
    ]
    return f"the gradient of {gradients[-1]}" if gradients else "the loss"


def check_finite(content: Mapping[str, Any], step: int) -> None:
    """Raise a RunFailed where a checkpoint would hold weights or optimiser states that are not finite."""
    tensors = {f"the weights of {name}": value for name, value in content["model"].items()}
    for name, state in content["optimizer"].items():
        tensors |= {f"the optimiser's {key} of {name}": value for key, value in state.items()}
    for name, value in tensors.items():
        if isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
            raise RunFailed(
                f"step {step}: {name} are not finite, so no checkpoint is written; go on from the one before "
                "with ckpt_path: if it comes again try a smaller optim.lr, if not suspect the memory"
            )


@contextmanager
def _watch(model: nn.Module) -> Iterator[list[str]]:
    """Names of the modules whose output is not finite, in the order of their return: innermost first."""
    bad: list[str] = []

    def hook(name: str) -> Callable[..., None]:
        def check(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and not torch.isfinite(output).all():
                bad.append(f"{name} ({type(module).__name__})" if name else type(module).__name__)

        return check

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        yield bad
    finally:
        for handle in handles:
            handle.remove()

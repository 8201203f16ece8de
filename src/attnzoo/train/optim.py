"""AdamW, Muon with AdamW as one optimiser, the learning-rate schedules, and which parameter goes where."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from attnzoo.train.settings import OptimSettings


class MuonAdamW(Optimizer):
    """Muon for the groups of kind "muon" and AdamW for the others, with one `param_groups` and one `state`.

    Both are torch's own optimisers, working on the groups and the state of this object, so that a checkpoint
    or Lightning sees one optimiser.

    Args:
        groups: dicts with ``params``, ``kind`` ("muon" or "adamw"), ``lr`` and ``weight_decay``.
        settings: the hyperparameters that all groups share.
    """

    def __init__(self, groups: list[dict[str, Any]], settings: OptimSettings) -> None:
        self._parts: dict[str, Optimizer] = {}
        for kind in ("muon", "adamw"):
            own = [group for group in groups if group["kind"] == kind]
            if own:
                self._parts[kind] = _optimiser(kind, own, settings)
        super().__init__([group for part in self._parts.values() for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        for kind, part in self._parts.items():
            part.param_groups = [group for group in self.param_groups if group["kind"] == kind]
            part.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        # load_state_dict puts new containers in place; the parts must follow them
        super().__setstate__(state)
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts.values():
            part.step()
        return loss


def build_optimizer(model: nn.Module, settings: OptimSettings) -> Optimizer:
    """The optimiser of ``model``; every group carries its peak learning rate as ``base_lr``."""
    groups = parameter_groups(model, settings)
    if settings.name == "muon":
        return MuonAdamW(groups, settings)
    return _optimiser("adamw", groups, settings)


def parameter_groups(model: nn.Module, settings: OptimSettings) -> list[dict[str, Any]]:
    """Every trainable parameter in exactly one group.

    Muon takes the matrices inside the blocks. Vectors and parameters marked ``no_weight_decay`` do not decay;
    a matrix so marked is no linear map, so AdamW takes it. ``lr_scale`` multiplies the learning rate.
    """
    hidden = {id(p) for p in model.blocks.parameters()}
    groups: dict[tuple[str, float, float], list[Tensor]] = {}
    for p in model.parameters():
        if not p.requires_grad:
            continue
        decays = p.ndim >= 2 and not getattr(p, "no_weight_decay", False)
        by_muon = settings.name == "muon" and p.ndim == 2 and decays and id(p) in hidden
        key = (
            "muon" if by_muon else "adamw",
            settings.weight_decay if decays else 0.0,
            getattr(p, "lr_scale", 1.0),
        )
        groups.setdefault(key, []).append(p)
    return [
        {
            "params": params,
            "kind": kind,
            "weight_decay": decay,
            "lr": settings.lr * scale,
            "base_lr": settings.lr * scale,
        }
        for (kind, decay, scale), params in groups.items()
    ]


def _optimiser(kind: str, groups: list[dict[str, Any]], settings: OptimSettings) -> Optimizer:
    if kind == "muon":
        # rescaled updates let one learning rate serve both optimisers
        return Muon(groups, lr=settings.lr, momentum=settings.momentum, adjust_lr_fn="match_rms_adamw")
    return AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True)


def lr_factor(settings: OptimSettings, done: float, total: float) -> float:
    """Learning rate at ``done`` of ``total`` as a fraction of its peak.

    Args:
        done, total: optimiser steps, or seconds where only the clock ends the run.
    """
    assert total > 0
    warmup = settings.warmup * total
    if done + 1 < warmup:
        return (done + 1) / warmup
    if settings.schedule == "constant":
        return 1.0
    start = warmup if settings.schedule == "cosine" else total * (1 - settings.decay)
    progress = min(max((done - start) / max(total - start, 1e-9), 0.0), 1.0)
    falling = (1 + math.cos(math.pi * progress)) / 2 if settings.schedule == "cosine" else 1 - progress
    return settings.final + (1 - settings.final) * falling


def set_learning_rate(optimizer: Optimizer, factor: float) -> float:
    """Put every group at ``factor`` of its peak; returns the largest learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return max(group["lr"] for group in optimizer.param_groups)


def named_state(model: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """The optimiser's state by parameter name, whatever the order of its groups."""
    return {name: dict(optimizer.state[p]) for name, p in model.named_parameters() if p in optimizer.state}


def check_named_state(model: nn.Module, settings: OptimSettings, state: Mapping[str, Any]) -> None:
    """Raise a ValueError unless `load_named_state` can take ``state``."""
    kinds = {id(p): group["kind"] for group in parameter_groups(model, settings) for p in group["params"]}
    names = {name: kinds.get(id(p)) for name, p in model.named_parameters()}
    for name, entry in state.items():
        if names.get(name) != ("adamw" if "exp_avg" in entry else "muon"):
            raise ValueError(
                f"optim.name: the checkpoint's optimiser treats {name!r} otherwise than this run's; "
                "give the optim.name of the checkpoint, or start a new run with init_from"
            )


def load_named_state(
    model: nn.Module,
    optimizer: Optimizer,
    state: Mapping[str, Any],
    part: Callable[[Tensor, nn.Parameter], Tensor] = lambda full, like: full,
) -> None:
    """Put back copies of what `named_state` gave; learning rates and the like stay those of ``optimizer``.

    Args:
        part: of a full tensor of a parameter's shape, what belongs to the parameter of this rank.
    """
    params = dict(model.named_parameters())
    names = {id(p): name for name, p in params.items()}
    order = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    # copies, for a part may be a view of the whole, or of a file
    state = {
        name: {k: (part(v, params[name]) if v.ndim else v).clone() for k, v in entry.items()}
        for name, entry in state.items()
    }
    # a state_dict numbers parameters in the order of the groups
    saved = optimizer.state_dict()
    saved["state"] = {number: state[name] for number, name in enumerate(order) if name in state}
    optimizer.load_state_dict(saved)

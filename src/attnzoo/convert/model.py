"""A whole model converted, and how far the result is from it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from attnzoo import options as opts
from attnzoo.convert.distance import weight_error
from attnzoo.convert.layer import Layer
from attnzoo.convert.methods import METHODS
from attnzoo.convert.symbols import read, write
from attnzoo.convert.target import Method, Target
from attnzoo.model import LanguageModel, create_model

KEPT = ("rope_theta", "pos", "window", "n_sink", "norm_eps", "out_bias")  # frame options that a target keeps


@dataclass
class Report:
    """What a conversion did.

    Args:
        method, options: what was asked for.
        logit_change: largest change of a logit on the calibration text; None without text.
        cache_bytes: per token before and after, bf16.
        params: before and after.
        weight_error: relative change of the heads' matrices, see `weight_error`.
        loss: mean nats per token on the held-out text before and after; None without text.
    """

    method: str
    options: dict[str, Any]
    cache_bytes: tuple[float, float] = (0.0, 0.0)
    params: tuple[int, int] = (0, 0)
    weight_error: float = 0.0
    logit_change: float | None = None
    loss: tuple[float, float] | None = None


@torch.no_grad()
def convert(
    model: LanguageModel,
    method: str,
    calibration: Tensor | None = None,
    held_out: Tensor | None = None,
    **options: Any,
) -> tuple[LanguageModel, Report]:
    """A model of another variant that starts as near to ``model`` as the method knows.

    Args:
        model: its layers must be of the method's source variants.
        method: a name of ``METHODS``.
        calibration: ``(N, T)`` tokens whose activations the method may read, and on which logits are
            compared.
        held_out: ``(N, T)`` tokens on which the loss is measured before and after.
        options: of the method.

    Raises:
        ValueError: an unknown method or option, a layer of another variant or with stages that the method
            does not carry over, or text that is needed and missing.
    """
    if method not in METHODS:
        raise opts.unknown("method", method, METHODS)
    chosen = METHODS[method]
    given = _checked(method, chosen, options)
    if chosen.reads_text and calibration is None:
        raise ValueError(f"calibration: {method} reads activations, got no text; give (N, T) tokens")
    layers = layers_of(model, method, chosen.sources, calibration)
    for i, layer in enumerate(layers):
        if "b_q" in layer.weights and not chosen.biases:
            fit = ", ".join(name for name, other in METHODS.items() if other.biases)
            raise ValueError(
                f"qkv_bias: {method} makes factors that have no biases, layer {i} has them; use one of {fit}"
            )
    new = _built(model, layers, chosen.run(layers, **given), (*KEPT, *chosen.keeps))
    report = Report(method, given)
    length = model.config["max_seq_len"]
    before, after = (m.cost(length) for m in (model, new))
    report.cache_bytes = before.cache_bytes_per_token, after.cache_bytes_per_token
    report.params = before.params, after.params
    report.weight_error = weight_error(model.mixers, new.mixers)
    if calibration is not None:
        report.logit_change = float((new(calibration) - model(calibration)).abs().max())
    if held_out is not None:
        report.loss = mean_loss(model, held_out), mean_loss(new, held_out)
    return new, report


def convert_best(
    model: LanguageModel,
    method: str,
    calibration: Tensor,
    candidates: Sequence[Mapping[str, Any]],
    held_out: Tensor | None = None,
) -> tuple[LanguageModel, Report]:
    """`convert` with those of the ``candidates``, options of the method, that lose least on the calibration
    text: how EliteKV splits a cache between rotary pairs and latent, and TransMLA chooses its folding.

    Raises:
        ValueError: there is no candidate, or one that `convert` refuses.
    """
    if not candidates:
        raise ValueError("candidates: needs options of the method to choose from, got none")
    losses = [convert(model, method, calibration, calibration, **own)[1].loss[1] for own in candidates]
    return convert(model, method, calibration, held_out, **candidates[losses.index(min(losses))])


def mean_loss(model: nn.Module, tokens: Tensor) -> float:
    """Nats per token of ``(N, T)`` tokens, each predicted from those before it."""
    total = sum(
        float(cross_entropy(model(part[:, :-1]).mT.float(), part[:, 1:], reduction="sum"))
        for part in tokens.split(16)
    )
    return total / tokens[:, 1:].numel()


def _checked(method: str, chosen: Method, options: Mapping[str, Any]) -> dict[str, Any]:
    table = opts.keyword_options(chosen.run)
    for name in options:
        if name not in table:
            raise opts.unknown("option", name, table, method)
    missing = [n for n, p in table.items() if p.default is inspect.Parameter.empty and n not in options]
    if missing:
        raise ValueError(f"{missing[0]}: {method} needs it, got nothing; set {missing[0]}=...")
    return {n: opts.check(n, options.get(n, p.default), p.annotation) for n, p in table.items()}


def layers_of(
    model: LanguageModel, method: str, sources: Sequence[str], calibration: Tensor | None
) -> list[Layer]:
    """The layers of a model with what they read on the calibration text.

    Raises:
        ValueError: a layer is of none of the ``sources``, has stages that ``method`` does not know, or has
            other head counts.
    """
    seen: dict[int, Tensor] = {}
    hooks = [
        mixer.register_forward_pre_hook(lambda m, args, i=i: seen.__setitem__(i, args[0].double()))
        for i, mixer in enumerate(model.mixers)
    ]
    try:
        if calibration is not None:
            model(calibration)
    finally:
        for hook in hooks:
            hook.remove()
    layers = []
    for i, mixer in enumerate(model.mixers):
        if mixer.name not in sources or mixer.options["add"]:
            what = "+".join([mixer.name, *mixer.options["add"]])
            raise ValueError(
                f"model: {method} converts layers of {', '.join(sources)}, layer {i} is {what!r}"
            )
        layers.append(read(mixer, seen.get(i)))
    counts = [layer.heads for layer in layers]
    if len(set(counts)) > 1:
        raise ValueError(f"num_heads: layers of one number of query heads are converted, got {counts}")
    return layers


def _built(
    model: LanguageModel, sources: list[Layer], targets: list[Target], kept: tuple[str, ...]
) -> LanguageModel:
    legal = inspect.signature(create_model).parameters
    config = {k: v for k, v in model.config.items() if k in legal} | {"num_heads": sources[0].heads}
    layers = [
        {k: m.options[k] for k in kept if k in m.options} | t.options
        for m, t in zip(model.mixers, targets, strict=True)
    ]
    if all(own == layers[0] for own in layers):
        config |= {"layout": targets[0].name, **layers[0]}
    else:
        config["layout"] = [{"name": t.name, **own} for t, own in zip(targets, layers, strict=True)]
    new = create_model(**config).to(next(model.parameters()).dtype)
    rest = {k: v for k, v in model.state_dict().items() if ".mixer." not in k}
    new.load_state_dict(new.state_dict() | rest)
    for mixer, source, target in zip(new.mixers, sources, targets, strict=True):
        bias = {"b_o": source.weights["b_o"]} if "b_o" in source.weights else {}
        write(mixer, bias | target.weights)
    return new.train(model.training)

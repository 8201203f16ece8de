"""What `attnzoo plan` and `attnzoo train --dry-run` are asked for: their own keys, and a resolved
configuration.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from attnzoo.data.config import parse_tokenizer
from attnzoo.data.tokenizer import ready_tokenizer
from attnzoo.plan.setup import Job
from attnzoo.train.prepare import model_options, read_launcher
from attnzoo.train.settings import check_number, check_whole

GPUS = (8, 64, 256, 1024)
BATCH_TOKENS = 2**22
VOCABULARY = 50304
OVERLAP = 0.5
OWN = ("gpus", "hardware", "batch_tokens", "overlap", "vocab_size")
# what fixes a field of a layout: key of the configuration -> field
FIXES = {
    "launcher.tensor_parallel": "tensor",
    "launcher.context_parallel": "context",
    "launcher.strategy": "strategy",
    "trainer.accumulate": "accumulate",
    "trainer.checkpoint_activations": "recompute",
}
INSTEAD = {"launcher.devices": "gpus", "launcher.num_nodes": "gpus"}


@dataclass
class Request:
    """The own keys of a command line, and its Hydra overrides.

    Args:
        hardware: entry; None = not given. changes: fields of it. given: keys that the overrides set.
    """

    gpus: Sequence[int] = GPUS
    hardware: str | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    batch_tokens: int | None = None
    overlap: float = OVERLAP
    vocab_size: int | None = None
    overrides: list[str] = field(default_factory=list)

    @property
    def given(self) -> set[str]:
        return {text.lstrip("+").partition("=")[0] for text in self.overrides}


def read_request(arguments: Iterable[str]) -> Request:
    """Own keys apart from the overrides; the last of a key counts.

    Raises:
        ValueError: a value against its rule.
    """
    request = Request()
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or (key not in OWN and not key.startswith("hardware.")):
            request.overrides.append(argument)
        elif key == "hardware":
            request.hardware = text
        elif key.startswith("hardware."):
            request.changes[key.partition(".")[2]] = _value(key, text)
        elif key == "gpus":
            request.gpus = [_value(key, part) for part in text.strip("[]").split(",")]
            for number in request.gpus:
                check_whole("gpus", number, 1)
        elif key == "overlap":
            request.overlap = _value(key, text)
            check_number("overlap", request.overlap, 0, 1)
        else:
            value = _value(key, text)
            check_whole(key, value, 1)
            setattr(request, key, value)
    return request


def _value(key: str, text: str) -> Any:
    """A number also where YAML sees a word: 4e9."""
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # the latter of 2026-13-01
        raise ValueError(f"{key}: cannot be read, got {text!r}; give a number, or words in quotes") from None
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def job_of(config: Mapping[str, Any], vocab_size: int, gpu: bool = True, bf16: bool | None = None) -> Job:
    """The job of a resolved configuration.

    Args:
        bf16: None: unless `trainer.precision` is "fp32", as GPUs have it.
    """
    if bf16 is None:
        bf16 = config["trainer"]["precision"] != "fp32"
    options, data = model_options(config, vocab_size), config["data"]
    return Job(options, data["seq_len"], config["optim"]["name"], bf16, gpu, data.get("val_seq_len"))


def vocabulary(config: Mapping[str, Any]) -> int:
    """Of the configuration's tokenizer; of one that is yet to be trained, the largest that it may have."""
    settings = parse_tokenizer(config["tokenizer"])
    ready = ready_tokenizer(settings)
    return settings.vocab_size if ready is None else ready.vocab_size


def batch_of(request: Request, config: Mapping[str, Any]) -> int:
    """Samples of a step: `data.batch_size` where it is given, else as many as ``batch_tokens`` hold."""
    if "data.batch_size" in request.given:
        if request.batch_tokens is not None:
            raise ValueError("batch_tokens: excludes data.batch_size, got both; leave one out")
        return config["data"]["batch_size"]
    return max(1, (request.batch_tokens or BATCH_TOKENS) // config["data"]["seq_len"])


def fixed_of(request: Request, config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a layout that the overrides give.

    Raises:
        ValueError: a key that has another one in its place here, or what the trainer refuses.
    """
    for key, own in INSTEAD.items():
        if key in request.given:
            raise ValueError(f"{key}: a plan is for several numbers of devices; use {own}=8,64")
    read_launcher(config)
    fixed = {}
    for key, name in FIXES.items():
        group, _, option = key.partition(".")
        if key in request.given:
            fixed[name] = config[group][option]
    if fixed.get("strategy") == "auto":
        del fixed["strategy"]
    return fixed

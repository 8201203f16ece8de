"""The weights of a run for other programs: safetensors, the model's configuration and the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from attnzoo.train.writer import place_of

WEIGHTS, CONFIG, TOKENIZER = "model.safetensors", "config.json", "tokenizer"
EXPORTED = ("model_config", "tokenizer", "identity", "progress")  # of a checkpoint


def write_export(folder: Path, checkpoint: Mapping[str, Any], tokenizer: Any) -> None:
    """Write ``model.safetensors``, ``config.json`` and ``tokenizer/`` into a new folder.

    Tensors that share their memory, such as a tied head, are written once; ``shared`` of the configuration
    maps the other names to the one that is written.
    """
    from safetensors.torch import save

    from attnzoo.train.folder import write_json
    from attnzoo.train.store import write_atomic

    folder.mkdir(parents=True, exist_ok=True)
    weights, shared = _once(checkpoint["model"])
    about = {key: checkpoint[key] for key in EXPORTED}
    config = {"format": "attnzoo", **about, "shared": shared, "versions": checkpoint.get("versions", {})}
    tokenizer.save(folder / TOKENIZER)
    data = save({name: value.contiguous() for name, value in weights.items()}, {"format": "pt"})
    write_atomic(folder / WEIGHTS, lambda file: file.write(data))
    write_json(folder / CONFIG, config)  # last: with it, it is an export


def _once(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    kept: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    names: dict[tuple, str] = {}
    for name, value in weights.items():
        first = names.setdefault(place_of(value), name) if value.numel() else name
        if first == name:
            kept[name] = value
        else:
            shared[name] = first
    return kept, shared


def is_export(path: Path) -> bool:
    """Whether a folder is what `write_export` wrote."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def read_export(folder: Path, field: str) -> dict[str, Any]:
    """An export as a checkpoint without optimiser state, on the CPU.

    Raises:
        ValueError: it is damaged, or not of this library; or a run is to go on from it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if field == "ckpt_path":
        raise ValueError(
            f"ckpt_path: {str(folder)!r} holds weights only, got an export; start a new run with init_from"
        )
    try:
        config = json.loads((folder / CONFIG).read_text())
        weights = load_file(folder / WEIGHTS)
        weights |= {name: weights[first] for name, first in config["shared"].items()}
        return {"model": weights, "optimizer": {}, **{key: config[key] for key in EXPORTED}}
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{field}: {str(folder)!r} is damaged or no export of attnzoo; export the run again"
        ) from error

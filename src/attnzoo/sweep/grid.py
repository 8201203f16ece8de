"""The grid: Hydra's sweep syntax, composed point by point, with a label for each arm and setting."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from attnzoo.cli.overrides import order
from attnzoo.cli.tree import compose, opened, plain_errors
from attnzoo.redaction import secrets_in
from attnzoo.sweep.manifest import RATE, RUN, SEED, Cell
from attnzoo.sweep.request import positive


@dataclass(frozen=True)
class Axis:
    """One override and the values it takes, as Hydra would write them."""

    key: str
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        """The key without Hydra's ``+``."""
        return self.key.lstrip("+")

    @property
    def of_arm(self) -> bool:
        """Whether it chooses what is compared."""
        return self.name in ("attention", "model.layout") or self.name.startswith("attention.")


def expand(overrides: Sequence[str], tuned: bool = False) -> tuple[list[Cell], list[float]]:
    """All cells of the grid, without ids.

    Args:
        overrides: of the command line. Axes that a composed experiment brings by ``hydra.sweeper.params`` are
            added, except those the command line sets.
        tuned: an axis of optim.lr is returned instead of being part of the grid.

    Raises:
        ValueError: Hydra cannot read or compose them, or the grid is empty.
    """
    with plain_errors(), opened():
        axes = _axes(order(overrides))
        axes = [*_from_experiment(axes), *axes]
        for axis in axes:
            if not axis.overrides:
                raise ValueError(f"{axis.name}: has no value, so the sweep is empty; give at least one")
        rates: list[float] = []
        if tuned:
            chosen = [axis for axis in axes if axis.name == RATE and len(axis.overrides) > 1]
            rates = [positive(RATE, text.partition("=")[2]) for axis in chosen for text in axis.overrides]
            axes = [axis for axis in axes if axis not in chosen]
        points = itertools.product(*(axis.overrides for axis in axes))
        return [_cell(axes, point) for point in points], rates


def _axes(overrides: Iterable[str]) -> list[Axis]:
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    axes: dict[str, Axis] = {}
    for override in parser.parse_overrides(list(overrides)):
        key = override.get_key_element()
        if not override.is_sweep_override():
            values = [override.input_line]
        elif override.is_discrete_sweep():
            values = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            raise ValueError(f"{key}: must be a list, choice, range or glob, got {override.input_line!r}")
        axes[key] = Axis(key, tuple(values))  # as Hydra's own sweeper: the last one counts
    return list(axes.values())


def _from_experiment(axes: Sequence[Axis]) -> list[Axis]:
    """The axes that the first point's experiment brings and the command line does not set."""
    first = [axis.overrides[0] for axis in axes if axis.overrides]
    params = compose(["run_dir=.", *first], hydra_too=True).hydra.sweeper.params
    given = {axis.name for axis in axes}
    brought = _axes(order(f"{key}={value}" for key, value in (params or {}).items()))
    return [axis for axis in brought if axis.name not in given]


def _cell(axes: Sequence[Axis], point: Sequence[str]) -> Cell:
    config = plain(compose(["run_dir=.", *point]))
    several = [(axis, text) for axis, text in zip(axes, point, strict=True) if len(set(axis.overrides)) > 1]
    return Cell(
        id="",
        stage=RUN,
        arm=arm_label(config, [pair for pair in several if pair[0].of_arm]),
        setting=setting_label([pair for pair in several if not pair[0].of_arm]),
        seed=config["seed"],
        # as `attnzoo train` takes them, which adds the ++ itself
        overrides=tuple(text.removeprefix("++") for text in point),
        config=config,
    )


def plain(config: Any) -> dict[str, Any]:
    """The resolved configuration; loggers still refer to ``run_dir``, so that a sweep can be moved."""
    resolved = OmegaConf.to_container(config, resolve=True)
    found = resolved | {"logger": OmegaConf.to_container(config.logger, resolve=False)}
    for key in secrets_in(found):
        raise ValueError(
            f"{key}: holds a secret, which the manifest of a sweep would keep, got ***; "
            "let the library that needs it read the environment, or give it to a logger as ${oc.env:NAME}"
        )
    return found


def arm_label(config: Mapping[str, Any], several: Sequence[tuple[Axis, str]]) -> str:
    """Variant or layout, and the options that take several values."""
    layout = config["model"]["layout"] or config["attention"]["name"]
    options = sorted(
        f"{axis.name.removeprefix('attention.')}={_value(text)}"
        for axis, text in several
        if axis.name.startswith("attention.")
    )
    return " ".join([layout if isinstance(layout, str) else ",".join(layout), *options])


def setting_label(several: Sequence[tuple[Axis, str]]) -> str:
    """The other axes with several values, except the seed."""
    return " ".join(sorted(f"{axis.name}={_value(text)}" for axis, text in several if axis.name != SEED))


def _value(override: str) -> str:
    """The value as one would write it: 1e-06 where Hydra says 1.0e-06, no quotes."""
    text = override.partition("=")[2].strip("'\"")
    try:
        number = float(text)
    except ValueError:
        return text
    return short if float(short := f"{number:g}") == number else text

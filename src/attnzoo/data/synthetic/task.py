"""What a synthetic task is: a dataclass whose fields are its dials, and a way to draw one sample."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar

import numpy as np

from ..config import check_choice, check_whole_number
from ..corpus import IGNORED

MOST = 65536  # of any dial that counts something: more is a slip of the keyboard
TASKS: dict[str, type[Task]] = {}


class Task(abc.ABC):
    """Draws samples. Subclasses are frozen dataclasses, and every field is a `dial`.

    Attributes:
        name: under which `data=synthetic/NAME` finds it.
    """

    name: ClassVar[str]

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if "name" in vars(cls):
            TASKS[cls.name] = cls

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            field.metadata["check"](f"data.{field.name}", getattr(self, field.name))

    @property
    @abc.abstractmethod
    def num_symbols(self) -> int:
        """Ids in use: tokens and labels lie in [0, num_symbols)."""

    @property
    @abc.abstractmethod
    def least_length(self) -> int:
        """Tokens that a sample needs at these dials."""

    @abc.abstractmethod
    def draw(self, rng: np.random.Generator, length: int) -> tuple[np.ndarray, np.ndarray]:
        """One sample of ``length`` tokens: (tokens, labels), int64 each, IGNORED where nothing is asked."""

    def dials(self) -> dict[str, Any]:
        """Names and values of the dials."""
        return dataclasses.asdict(self)

    def check_length(self, key: str, length: int) -> None:
        """Raise a ValueError unless ``length``, the value of ``data.<key>``, has room for a sample."""
        if length < self.least_length:
            dials = ", ".join(self.dials())
            raise ValueError(
                f"data.{key}: must be at least {self.least_length} for synthetic/{self.name} at these dials, "
                f"got {length}; raise it or turn {dials} down"
            )


def count(default: int, least: int = 1, most: int = MOST, null: bool = False) -> Any:
    """A dial that is a whole number from ``least`` to ``most``, or null."""

    def check(field: str, value: Any) -> None:
        check_whole_number(field, value, least, null=null)
        if value is not None and value > most:
            raise ValueError(f"{field}: must be at most {most}, got {value}; lower it")

    return dataclasses.field(default=default, metadata={"check": check})


def share(default: float | None, null: bool = False) -> Any:
    """A dial that is a number from 0 to 1, or null."""

    def check(field: str, value: Any) -> None:
        if value is None and null:
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(
                f"{field}: must be a number from 0 to 1{' or null' if null else ''}, got {value!r}"
            )

    return dataclasses.field(default=default, metadata={"check": check})


def flag(default: bool) -> Any:
    """A dial that is true or false."""

    def check(field: str, value: Any) -> None:
        if not isinstance(value, bool):
            raise ValueError(f"{field}: must be true or false, got {value!r}")

    return dataclasses.field(default=default, metadata={"check": check})


def choice(default: str, *others: str) -> Any:
    """A dial that is one of some words."""
    legal = (default, *others)
    return dataclasses.field(
        default=default, metadata={"check": lambda field, value: check_choice(field, value, legal)}
    )


def check_at_most(task: Task, small: str, large: str) -> None:
    """Raise a ValueError where the dial ``small`` is above the dial ``large``."""
    low, high = getattr(task, small), getattr(task, large)
    if low > high:
        raise ValueError(
            f"data.{small}: must be at most data.{large}={high}, got {low}; lower it or raise data.{large}"
        )


def scatter(rng: np.random.Generator, number: int, width: int, room: int) -> np.ndarray:
    """``(number,)`` starts, ascending, of disjoint blocks of ``width`` tokens in a row of ``room``."""
    slots = room - number * (width - 1)  # a block is one slot, and so is every token outside
    return np.sort(rng.permutation(slots)[:number]) + (width - 1) * np.arange(number)


def nothing_asked(length: int) -> np.ndarray:
    """``(length,)`` labels, all of them ignored."""
    return np.full(length, IGNORED, dtype=np.int64)


def show(tokens: np.ndarray, labels: np.ndarray) -> str:
    """Two lines, tokens above labels; a dot where nothing is asked."""
    asked = ["." if label == IGNORED else str(label) for label in labels]
    width = max(map(len, [*map(str, tokens), *asked]))
    rows = {"tokens": map(str, tokens), "labels": asked}
    return "\n".join(f"{name}  {' '.join(cell.rjust(width) for cell in row)}" for name, row in rows.items())

"""Where the names of points go, so that they neither cover each other nor the points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import log

SIDES = (
    "middle right",
    "middle left",
    "top center",
    "bottom center",
    "top right",
    "bottom right",
    "top left",
    "bottom left",
)
PANEL = (260, 240)  # pixels of a plot's inner area at its narrowest
LETTER, LINE, GAP = 7.2, 15, 9  # pixels: width of a letter, height of a line, half a marker and a little air
BEARABLE = 0.08  # share of a name that may be covered

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # left, bottom, right, top


def place(
    points: Mapping[str, Point],
    names: Mapping[str, str],
    obstacles: Sequence[Box],
    logarithmic: bool,
    xs: Point,
    ys: Point,
) -> dict[str, str]:
    """The side of its point on which each name is written, as plotly's ``textposition``.

    Names are placed one by one; each takes the side that overlaps least with the points, the obstacles, the
    names that stand already and what lies outside the panel. A name that would be covered everywhere is left
    out.

    Args:
        points: label -> (x, y), those first whose names matter most. names: label -> the text.
        obstacles: lines to keep clear of. logarithmic: whether the x axis is. xs, ys: ranges of the axes.
    """

    def across(x: float) -> float:
        left, right, at = (log(v) if logarithmic else v for v in (*xs, x))
        return (at - left) / (right - left) * PANEL[0]

    def up(y: float) -> float:
        return (y - ys[0]) / (ys[1] - ys[0]) * PANEL[1]

    pixels = {label: (across(x), up(y)) for label, (x, y) in points.items()}
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in pixels.values()]
    for left, low, right, high in obstacles:
        taken.append((across(left) - 1, up(low) - 1, across(right) + 1, up(high) + 1))
    sides = {}
    for label, point in pixels.items():
        width = LETTER * len(names[label])
        boxes = {side: _box(point, side, width) for side in SIDES}
        side = min(SIDES, key=lambda side: _covered(boxes[side], taken))
        if _covered(boxes[side], taken) <= BEARABLE * width * LINE:
            sides[label] = side
            taken.append(boxes[side])
    return sides


def _box(point: Point, side: str, width: float) -> Box:
    vertical, horizontal = side.split()
    x = point[0] + {"center": -width / 2, "right": GAP, "left": -GAP - width}[horizontal]
    y = point[1] + {"top": GAP, "middle": -LINE / 2, "bottom": -GAP - LINE}[vertical]
    return x, y, x + width, y + LINE


def _covered(box: Box, taken: list[Box]) -> float:
    """Area that is covered twice; what sticks out of the panel counts double."""
    wide = (max(0.0, min(box[2], other[2]) - max(box[0], other[0])) for other in taken)
    high = (max(0.0, min(box[3], other[3]) - max(box[1], other[1])) for other in taken)
    outside = max(0.0, -box[0]) + max(0.0, box[2] - PANEL[0])
    return sum(w * h for w, h in zip(wide, high, strict=True)) + 2 * LINE * outside

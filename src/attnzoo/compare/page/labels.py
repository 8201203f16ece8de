"""Where the names of points go, so that they neither cover each other nor the points."""

from __future__ import annotations

from collections.abc import Mapping
from math import log

SIDES = ("top center", "bottom center", "middle right", "middle left",
         "top right", "bottom right", "top left", "bottom left")  # fmt: skip
PANEL = (300, 230)  # pixels of a plot's inner area at its narrowest
LETTER, LINE, GAP = 6.6, 15, 9  # pixels: width of a letter, height of a line, half a marker and a little air

Box = tuple[float, float, float, float]  # left, bottom, right, top


def place(points: Mapping[str, tuple[float, float]], names: Mapping[str, str], logarithmic: bool) -> dict[str, str]:
    """The side of its point on which each name is written, as plotly's ``textposition``.

    Names are placed one by one, from the left; each takes the side that overlaps least with the points, with
    the names that stand already and with what lies outside the panel.

    Args:
        points: label -> (x, y). names: label -> the text. logarithmic: whether the x axis is.
    """
    pixels = _pixels(points, logarithmic)
    taken: list[Box] = [(x - 6, y - 6, x + 6, y + 6) for x, y in pixels.values()]
    sides = {}
    for label in sorted(points, key=lambda key: pixels[key]):
        boxes = {side: _box(pixels[label], side, LETTER * len(names[label])) for side in SIDES}
        best = min(SIDES, key=lambda side: _cost(boxes[side], taken))
        sides[label] = best
        taken.append(boxes[best])
    return sides


def _pixels(points: Mapping[str, tuple[float, float]], logarithmic: bool) -> dict[str, tuple[float, float]]:
    """Points in pixels of a narrow panel with the margins that the axes have."""
    xs = {key: log(x) if logarithmic else x for key, (x, _) in points.items()}
    ys = {key: y for key, (_, y) in points.items()}
    (left, right), (low, high) = ((min(v.values()), max(v.values())) for v in (xs, ys))
    across, up = (right - left) * 1.44 or 1.0, (high - low) * 1.32 or 1.0
    return {
        key: (((xs[key] - left) / across + 0.15) * PANEL[0], ((ys[key] - low) / up + 0.12) * PANEL[1]) for key in points
    }


def _box(point: tuple[float, float], side: str, width: float) -> Box:
    vertical, horizontal = side.split()
    x = point[0] + {"center": -width / 2, "right": GAP, "left": -GAP - width}[horizontal]
    y = point[1] + {"top": GAP, "middle": -LINE / 2, "bottom": -GAP - LINE}[vertical]
    return x, y, x + width, y + LINE


def _cost(box: Box, taken: list[Box]) -> float:
    """Area that is covered twice, and what sticks out of the panel counted double."""
    overlap = sum(
        max(0.0, min(box[2], other[2]) - max(box[0], other[0])) * max(0.0, min(box[3], other[3]) - max(box[1], other[1]))
        for other in taken
    )
    outside = max(0.0, -box[0]) + max(0.0, box[2] - PANEL[0])
    return overlap + 2 * LINE * outside

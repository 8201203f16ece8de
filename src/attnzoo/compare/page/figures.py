"""What all plots share: a figure that knows no colours, one style per arm, and a plot with its choices.

Colours are written as CSS variables (``var(--arm-1)``): the page resolves them when it draws, so that one
figure serves light and dark and the palette stands in one place, ``assets/colours.css``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import plotly.graph_objects as go

COLOURS = 8  # of arms, beside the baseline's: as many as assets/colours.css has
SYMBOLS = (
    *("circle", "square", "diamond", "triangle-up", "triangle-down", "star"),
    *("cross", "hexagon", "pentagon", "x", "bowtie"),
)
DASHES = ("solid", "dot", "dashdot")  # when the colours come round again
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", Arial, sans-serif'


@dataclass(frozen=True)
class Style:
    """How an arm looks in every plot: colour, symbol and dash. The baseline is neutral and dashed."""

    name: str  # escaped: plotly reads a little HTML in its texts
    colour: str
    symbol: str
    dash: str = "solid"

    @property
    def line(self) -> dict[str, Any]:
        return {"color": self.colour, "width": 2, "dash": self.dash}


def styles(comparison: dict[str, Any]) -> dict[str, Style]:
    """One style per arm label; the order of the arms decides."""
    found, number = {}, 0
    for label in [arm["label"] for arm in comparison["arms"]]:
        name = escape(label, quote=False)
        if label == comparison["baseline"]:
            found[label] = Style(name, "var(--arm-base)", "circle-open", "dash")
            continue
        colour, dash = f"var(--arm-{number % COLOURS + 1})", DASHES[number // COLOURS % len(DASHES)]
        found[label] = Style(name, colour, SYMBOLS[number % len(SYMBOLS)], dash)
        number += 1
    return found


@dataclass
class Plot:
    """A plot of the page: one figure for every combination of its choices.

    Args:
        id: unique in the page. title, caption: plain text. choices: what a reader may switch, name -> labels.
        figures: labels of the choices in their order -> figure; a plot without choices has the key ``()``.
        height: in pixels, without the legend. width: the least in pixels; a narrower page scrolls the plot
            inside its own box.
        narrow, narrow_height, narrow_width: another figure for a phone, where the plot has no choices.
    """

    id: str
    title: str
    caption: str
    figures: dict[tuple[str, ...], go.Figure]
    choices: dict[str, Sequence[str]] = field(default_factory=dict)
    height: int = 420
    width: int = 0
    narrow: go.Figure | None = None
    narrow_height: int = 0
    narrow_width: int = 0

    @property
    def entries(self) -> int:
        """Most entries of the legend: it takes height from the plot where the page is narrow."""
        return max(_entries(figure) for figure in self.figures.values())

    def data(self) -> dict[str, Any]:
        """Figures by the choices' labels joined by ``|``, as plain JSON values."""
        named = {"|".join(key): figure for key, figure in self.figures.items()}
        if self.narrow is not None:
            named["narrow"] = self.narrow
        return {name: _rounded(json.loads(figure.to_json())) for name, figure in named.items()}


def _entries(figure: go.Figure) -> int:
    if figure.layout.showlegend is False:
        return 0
    return sum(trace.showlegend is not False for trace in figure.data)


def _rounded(value: Any) -> Any:
    """Floats cut to six digits: no plot shows more."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return value


def figure(x: str, y: str, **layout: Any) -> go.Figure:
    """An empty figure in the style of the page.

    Args:
        x, y: titles of the axes. layout: more of plotly's layout, laid over the style key by key.
    """
    axis = {
        "gridcolor": "var(--grid)",
        "linecolor": "var(--line)",
        "zeroline": False,
        "automargin": True,
        "tickfont": {"size": 12},
        "title": {"standoff": 10, "font": {"size": 13}},
        "nticks": 7,
    }
    drawn = go.Figure(
        layout={
            "template": go.layout.Template(),
            "paper_bgcolor": "var(--ground)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": FONT, "size": 13, "color": "var(--ink-soft)"},
            "margin": {"l": 8, "r": 12, "t": 12, "b": 8},
            "legend": {
                "orientation": "h",
                "x": 0,
                "xanchor": "left",
                "yref": "container",
                "y": 0,
                "yanchor": "bottom",
                "font": {"size": 13},
            },
            "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "var(--ink-soft)", "activecolor": "var(--ink)"},
            "hoverlabel": {
                "bgcolor": "var(--raised)",
                "bordercolor": "var(--line)",
                "font": {"family": FONT, "color": "var(--ink)", "size": 13},
            },
            "xaxis": axis | {"title": axis["title"] | {"text": x}},
            "yaxis": axis | {"title": axis["title"] | {"text": y}},
        }
    )
    drawn.update_layout(**layout)
    return drawn

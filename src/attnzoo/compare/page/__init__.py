"""The report page: one HTML file that needs nothing but a browser, a pure function of the comparison.

`write_page` gathers what the page says (`facts`, `tables`, `records`) and draws (`curves`, `pareto`,
`context`, `profile`); the templates put it in place. Jinja escapes all that comes from the data. Styles,
scripts and plotly.js are written into the file, and its content security policy forbids every request.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import plotly
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

import attnzoo
from attnzoo.compare.metrics import headline
from attnzoo.compare.page.context import decode_plots, positions_plot
from attnzoo.compare.page.curves import curves_plot
from attnzoo.compare.page.facts import conditions, finding, findings, moment, said_first
from attnzoo.compare.page.figures import Plot, Style, styles
from attnzoo.compare.page.pareto import pareto_plots
from attnzoo.compare.page.profile import profile_plot
from attnzoo.compare.page.records import arm_records, run_records
from attnzoo.compare.page.tables import claims_table, metrics_table, results_table
from attnzoo.train.store import write_atomic

HERE = Path(__file__).parent
STYLES = ("colours.css", "page.css", "tables.css", "print.css")
SCRIPTS = ("theme.js", "plots.js", "tables.js", "tabs.js")


def write_page(comparison: dict[str, Any], path: Path) -> None:
    """Writes the comparison as a page.

    Args:
        comparison: as in comparison.json. path: of the HTML file; replaced as a whole if it exists.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    page = render(comparison).encode()
    write_atomic(path, lambda file: file.write(page))


def render(comparison: dict[str, Any]) -> str:
    """The page as text."""
    look = styles(comparison)
    profile = profile_plot(comparison["profile"])
    settings = [
        _setting(setting, comparison, look, f"s{i}") for i, setting in enumerate(comparison["settings"])
    ]
    plots = [plot for setting in settings for plot in setting["plots"]] + [profile]
    figures = {plot.id: plot.data() for plot in plots if plot}
    templates = Environment(
        loader=FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters["breakable"] = breakable
    return templates.get_template("page.html").render(
        comparison=comparison,
        look=look,
        findings=findings(comparison),
        warnings=said_first(comparison),
        settings=settings,
        arms=arm_records(comparison),
        profile=profile,
        claims=claims_table(comparison),
        runs=run_records(comparison),
        figures=embedded(figures),
        plotly=Markup(get_plotlyjs()),
        styles=[_asset(name) for name in STYLES],
        scripts=[_asset(name) for name in SCRIPTS],
        made=moment(comparison["created"]),
        versions=f"attnzoo {attnzoo.__version__}, plotly {plotly.__version__}",
    )


def _setting(
    setting: dict[str, Any], comparison: dict[str, Any], look: dict[str, Style], id: str
) -> dict[str, Any]:
    """What the page shows of one setting; plots that have nothing to show are not in it."""
    quality = headline([metric["key"] for metric in setting["metrics"]])
    baseline = comparison["baseline"]
    lines = [
        curves_plot(setting, look, baseline, f"{id}-curves"),
        positions_plot(setting, look, baseline, f"{id}-positions"),
    ]
    pareto = pareto_plots(setting, look, quality, f"{id}-pareto") if quality else []
    decode = decode_plots(setting, look, f"{id}-decode")
    return {
        "id": id,
        "name": setting["name"] or "all runs",
        "finding": finding(comparison, setting),
        "conditions": conditions(setting, comparison),
        "results": results_table(setting, quality, comparison["method"]["level"], id),
        "metrics": metrics_table(setting, id),
        "curves": lines[0],
        "positions": lines[1],
        "pareto": pareto,
        "seeds": max((result["n"] for result in setting["results"]), default=0),
        "decode": decode,
        "plots": [plot for plot in [*lines, *pareto, *decode] if plot],
    }


def breakable(key: str) -> Markup:
    """A dotted key that may be broken where its parts end."""
    return Markup(re.sub(r"([._])", r"\1<wbr>", str(escape(key))))


def embedded(value: Any) -> Markup:
    """JSON for inside a script element: nothing in it can end the element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _asset(name: str) -> Markup:
    return Markup((HERE / "assets" / name).read_text(encoding="utf-8"))


__all__ = ["Plot", "embedded", "render", "write_page"]

"""The tables: cells that know how to be sorted, and the interval of a difference as a small drawing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .numbers import MISSING, percent, quantity, unit_of

# the order in which verdicts are sorted and offered as filters
VERDICTS = ("baseline", "better", "reproduced", "equal", "not distinguishable", "no verdict", "not tested", "worse",
            "contradicted")  # fmt: skip
BESIDE = {"params": "Parameters", "train_flops": "FLOPs per token", "cache_bytes": "Cache"}  # the quality
FOREST = 150  # width of the drawing of an interval, in pixels


@dataclass
class Cell:
    """A cell. ``kind`` says how the template writes it: text, number, arm, verdict or forest.

    Args:
        sort: what the column is sorted by, None stays last. note: smaller, below. mark: the verdict of the
            row, or where the parts of a forest drawing are.
    """

    text: str
    kind: str = "text"
    sort: float | str | None = None
    note: str = ""
    mark: dict[str, Any] = field(default_factory=dict)


@dataclass
class Table:
    """A table that sorts and filters. ``columns``: (title, kind of its cells); ``rows``: (verdict, cells)."""

    id: str
    title: str
    columns: list[tuple[str, str]]
    rows: list[tuple[str, list[Cell]]]

    @property
    def verdicts(self) -> list[str]:
        """Those that occur, for the filter."""
        return [verdict for verdict in VERDICTS if any(verdict == found for found, _ in self.rows)]


def _verdict(result: dict[str, Any]) -> Cell:
    order = VERDICTS.index(result["verdict"]) if result["verdict"] in VERDICTS else len(VERDICTS)
    return Cell(result["verdict"], "verdict", order, note=result.get("reason") or "")


def _mean(result: dict[str, Any] | None, metric: dict[str, Any]) -> Cell:
    if result is None or result["mean"] is None:
        return Cell(MISSING, "number")
    sd = result["sd"] if not metric["exact"] and result["n"] > 1 else None
    return Cell(quantity(result["mean"], unit_of(metric)), "number", result["mean"],
                note=f"± {quantity(sd, unit_of(metric))}" if sd is not None else "")  # fmt: skip


def _needed(result: dict[str, Any]) -> Cell:
    needed = result["seeds_needed"]
    return Cell(MISSING if needed is None else str(needed), "number", needed)


def forest(results: list[dict[str, Any]], metric: dict[str, Any]) -> dict[str, Cell]:
    """Differences to the baseline, drawn on one scale, by arm."""
    ends = [value for r in results for value in (r["difference"], r["low"], r["high"]) if value is not None]
    left, right = min([0.0, *ends]), max([0.0, *ends])
    scale = (FOREST - 16) / ((right - left) or 1.0)

    def at(value: float | None) -> float | None:
        return None if value is None else round(8 + (value - left) * scale, 1)

    cells = {}
    for r in results:
        if r["difference"] is None:
            cells[r["arm"]] = Cell(MISSING, "number")
            continue
        unit = unit_of(metric)
        interval = "" if r["low"] is None else f"{quantity(r['low'], unit, True)} to {quantity(r['high'], unit, True)}"
        mark = {"zero": at(0.0), "at": at(r["difference"]), "low": at(r["low"]), "high": at(r["high"]),
                "verdict": r["verdict"], "relative": percent(r["ratio"])}  # fmt: skip
        cells[r["arm"]] = Cell(quantity(r["difference"], unit, True), "forest", r["difference"], interval, mark)
    return cells


def results_table(setting: dict[str, Any], quality: str | None, id: str) -> Table | None:
    """One row per arm: the verdict on quality, the difference, and what the arm costs."""
    metrics = {metric["key"]: metric for metric in setting["metrics"]}
    if quality is None:
        return None
    by_arm = {(r["arm"], r["metric"]): r for r in setting["results"]}
    results = [by_arm[arm, quality] for arm in setting["arms"] if (arm, quality) in by_arm]
    differences = forest(results, metrics[quality])
    beside = [key for key in BESIDE if key in metrics]
    columns = [("Arm", "arm"), ("Verdict", "verdict"), (metrics[quality]["title"], "number"),
               ("Difference", "forest"), ("Seeds needed", "number")]  # fmt: skip
    rows = []
    for r in results:
        cells = [Cell(r["arm"], "arm", r["arm"]), _verdict(r), _mean(r, metrics[quality]), differences[r["arm"]],
                 _needed(r), *(_mean(by_arm.get((r["arm"], key)), metrics[key]) for key in beside)]  # fmt: skip
        rows.append((r["verdict"], cells))
    columns += [(BESIDE[key], "number") for key in beside]
    return Table(f"{id}-results", "Results", columns, rows)


def metrics_table(setting: dict[str, Any], id: str) -> Table | None:
    """Every metric of every arm: one row each."""
    metrics = {metric["key"]: metric for metric in setting["metrics"]}
    columns = [("Metric", "text"), ("Arm", "arm"), ("Verdict", "verdict"), ("Mean", "number"), ("Difference", "number"),
               ("Relative", "number"), ("p, corrected", "number"), ("Seeds needed", "number")]  # fmt: skip
    rows = []
    for r in setting["results"]:
        metric = metrics[r["metric"]]
        unit = unit_of(metric)
        interval = "" if r["low"] is None else f"{quantity(r['low'], unit, True)} to {quantity(r['high'], unit, True)}"
        better = f"{metric['better']} is better" + (", counted" if metric["exact"] else "")
        p = r["p_adjusted"]
        rows.append((r["verdict"], [
            Cell(metric["title"], "text", metric["title"], better),
            Cell(r["arm"], "arm", r["arm"]),
            _verdict(r),
            _mean(r, metric),
            Cell(quantity(r["difference"], unit, True), "number", r["difference"], interval),
            Cell((percent(r["ratio"]) if r["difference"] is not None else "") or MISSING, "number",
                 r["ratio"] if r["difference"] is not None else None),
            Cell(MISSING if p is None else "< 0.0001" if p < 1e-4 else f"{p:.4f}", "number", p),
            _needed(r),
        ]))  # fmt: skip
    return Table(f"{id}-metrics", "Every metric", columns, rows) if rows else None


def claims_table(comparison: dict[str, Any]) -> Table | None:
    """The claims of the cards: what the paper says, where it says so, and what was found here."""
    columns = [("Arm", "arm"), ("Claim", "text"), ("Found here", "verdict"), ("The paper's conditions", "text"),
               ("Tested as", "text")]  # fmt: skip
    rows = []
    for claim in comparison["claims"]:
        tested = f"{claim['metric']} {claim['expect']}" if claim["metric"] else MISSING
        against = f"against {claim['against']}" if claim["metric"] and claim["against"] else ""
        rows.append((claim["verdict"], [
            Cell(claim["arm"], "arm", claim["arm"]),
            Cell(claim["text"], "text", claim["text"]),
            _verdict(claim),
            Cell(claim["where"] or MISSING, "text", claim["where"] or None),
            Cell(tested, "text", tested, against),
        ]))  # fmt: skip
    return Table("claims", "Claims of the papers", columns, rows) if rows else None

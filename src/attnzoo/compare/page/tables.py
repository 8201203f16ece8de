"""The tables: cells that know how to be sorted, and the interval of a difference as a small drawing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from attnzoo.compare.page.numbers import MISSING, percent, quantity, unit_of

# the order in which verdicts are sorted and offered as filters
VERDICTS = (
    "baseline",
    "better",
    "reproduced",
    "equal",
    "not distinguishable",
    "no verdict",
    "not tested",
    "worse",
    "contradicted",
)
BESIDE = {"params": "Params", "train_flops": "FLOPs per token", "cache_bytes": "Cache"}  # the quality
FOREST = 140  # width of the drawing of an interval, in pixels


@dataclass
class Cell:
    """A cell. ``kind`` says how the template writes it: text, number, arm, verdict or forest.

    Args:
        sort: what the column is sorted by, None stays last. aside: softer, behind the text. note: smaller,
            below it. mark: where the parts of a forest drawing are.
    """

    text: str
    kind: str = "text"
    sort: float | str | None = None
    aside: str = ""
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
    return Cell(
        quantity(result["mean"], unit_of(metric)),
        "number",
        result["mean"],
        note=f"± {quantity(sd, unit_of(metric))}" if sd is not None else "",
    )


def _needed(result: dict[str, Any]) -> Cell:
    needed = result["seeds_needed"]
    return Cell(MISSING if needed is None else str(needed), "number", needed)


def _difference(result: dict[str, Any], metric: dict[str, Any]) -> Cell:
    unit = unit_of(metric)
    if result["difference"] is None:
        return Cell(MISSING, "number")
    interval = [quantity(result[end], unit, True) for end in ("low", "high") if result[end] is not None]
    text = quantity(result["difference"], unit, True)
    return Cell(text, "number", result["difference"], percent(result["ratio"]), " to ".join(interval))


def forest(results: list[dict[str, Any]]) -> list[Cell]:
    """The intervals of the differences to the baseline, drawn on one scale."""
    ends = [r[end] for r in results for end in ("difference", "low", "high") if r[end] is not None]
    left, right = min([0.0, *ends]), max([0.0, *ends])
    scale = (FOREST - 16) / ((right - left) or 1.0)

    def at(value: float | None) -> float | None:
        return None if value is None else round(8 + (value - left) * scale, 1)

    return [
        Cell(
            MISSING if r["difference"] is None else "",
            "forest",
            r["difference"],
            mark={
                "verdict": r["verdict"],
                "zero": at(0.0),
                "at": at(r["difference"]),
                "low": at(r["low"]),
                "high": at(r["high"]),
            },
        )
        for r in results
    ]


def results_table(setting: dict[str, Any], quality: str | None, level: float, id: str) -> Table | None:
    """One row per arm: the verdict on quality, the difference, and what the arm costs."""
    metrics = {metric["key"]: metric for metric in setting["metrics"]}
    if quality is None:
        return None
    metric = metrics[quality]
    by_arm = {(r["arm"], r["metric"]): r for r in setting["results"]}
    results = [by_arm[arm, quality] for arm in setting["arms"] if (arm, quality) in by_arm]
    beside = [key for key in BESIDE if key in metrics]
    columns = [
        ("Arm", "arm"),
        ("Verdict", "verdict"),
        (metric["title"], "number"),
        ("Difference", "number"),
        (
            f"{100 * level:g} % interval, {'left' if metric['better'] == 'lower' else 'right'} is better",
            "forest",
        ),
        ("Seeds needed", "number"),
        *((BESIDE[key], "number") for key in beside),
    ]
    rows = [
        (
            r["verdict"],
            [
                Cell(r["arm"], "arm", r["arm"]),
                _verdict(r),
                _mean(r, metric),
                _difference(r, metric),
                drawn,
                _needed(r),
                *(_mean(by_arm.get((r["arm"], key)), metrics[key]) for key in beside),
            ],
        )
        for r, drawn in zip(results, forest(results), strict=True)
    ]
    return Table(f"{id}-results", "Results", columns, rows)


def metrics_table(setting: dict[str, Any], id: str) -> Table | None:
    """Every metric of every arm: one row each."""
    metrics = {metric["key"]: metric for metric in setting["metrics"]}
    columns = [
        ("Metric", "text"),
        ("Arm", "arm"),
        ("Verdict", "verdict"),
        ("Mean", "number"),
        ("Difference", "number"),
        ("p, corrected", "number"),
        ("Seeds needed", "number"),
    ]
    rows = []
    for r in setting["results"]:
        metric = metrics[r["metric"]]
        better = f"{metric['better']} is better" + (", counted" if metric["exact"] else "")
        p = r["p_adjusted"]
        rows.append(
            (
                r["verdict"],
                [
                    Cell(metric["title"], "text", metric["title"], note=better),
                    Cell(r["arm"], "arm", r["arm"]),
                    _verdict(r),
                    _mean(r, metric),
                    _difference(r, metric),
                    Cell(MISSING if p is None else "< 0.0001" if p < 1e-4 else f"{p:.4f}", "number", p),
                    _needed(r),
                ],
            )
        )
    return Table(f"{id}-metrics", "Every metric", columns, rows) if rows else None


def claims_table(comparison: dict[str, Any]) -> Table | None:
    """The claims of the cards: what the paper says, where it says so, and what was found here."""
    columns = [
        ("Arm", "arm"),
        ("Claim", "text"),
        ("Found here", "verdict"),
        ("The paper's conditions", "text"),
        ("Tested as", "text"),
    ]
    rows = []
    for claim in comparison["claims"]:
        tested = f"{claim['metric']} {claim['expect']}" if claim["metric"] else MISSING
        against = f"against {claim['against']}" if claim["metric"] and claim["against"] else ""
        rows.append(
            (
                claim["verdict"],
                [
                    Cell(claim["arm"], "arm", claim["arm"]),
                    Cell(claim["text"], "text", claim["text"]),
                    _verdict(claim),
                    Cell(claim["where"] or MISSING, "text", claim["where"] or None),
                    Cell(tested, "text", tested, note=against),
                ],
            )
        )
    return Table("claims", "Claims of the papers", columns, rows) if rows else None

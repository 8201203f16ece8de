"""The comparison on a terminal, or as plain text elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from attnzoo.compare.metrics import headline

STYLES = {
    "better": "green",
    "worse": "red",
    "baseline": "dim",
    "equal": "dim",
    "no verdict": "yellow",
    "reproduced": "green",
    "contradicted": "red",
}
MARKS = {"better": "+", "worse": "-", "not distinguishable": "~", "no verdict": "?"}
COSTS = {
    "params": "params",
    "train_flops": "FLOPs",
    "cache_bytes": "cache",
    "tokens_per_second": "tokens/s",
    "peak_memory_bytes": "memory",
    "decode_ms": "decode ms",
}
NARROW = 110  # columns, below which a cell has two lines
MANY = 3  # settings, above which the profile stands for the tables of the tasks


def show(comparison: Mapping[str, Any], console: Console | None = None) -> None:
    """Print the comparison."""
    console = console or Console(highlight=False)
    console.print(Text(comparison["title"], style="bold"))
    for warning in comparison["forced"]:
        console.print(Text(f"NOT COMPARABLE, forced: {warning}", style="bold red"))
    for one in comparison["left_out"]:
        console.print(Text(f"left out: {one['folder']}: {one['reason']}", style="yellow"))
    for note in comparison["notes"]:
        console.print(Text(f"note: {note}", style="yellow"))
    gap = "\n" if console.width < NARROW else " "
    crowded = comparison["profile"] and len(comparison["settings"]) > MANY
    for setting in comparison["settings"]:
        if not (crowded and _is_task(setting)):
            console.print(_setting(comparison, setting, gap))
    if comparison["profile"]:
        console.print(_profile(comparison))
    if comparison["claims"]:
        console.print(_claims(comparison["claims"]))


def _is_task(setting: Mapping[str, Any]) -> bool:
    return str(setting["conditions"]["data"]).startswith("synthetic/")


def _table(title: str, *columns: str, left: Sequence[str] = ("arm",)) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title=Text(title, style="bold"), title_justify="left", pad_edge=False)
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right", overflow="fold")
    return table


def _setting(comparison: Mapping[str, Any], setting: Mapping[str, Any], gap: str) -> RenderableType:
    results = {(r["arm"], r["metric"]): r for r in setting["results"]}
    metrics = {m["key"]: m for m in setting["metrics"]}
    parts: list[RenderableType] = [Text(), Text(_conditions(setting), style="dim")]
    if quality := headline(list(metrics)):
        parts.append(_quality(comparison, setting, results, metrics[quality], gap))
    costs = {key: title for key, title in COSTS.items() if key in metrics}
    if costs:
        table = _table("Cost", "arm", *costs.values())
        for arm in setting["arms"]:
            table.add_row(arm, *(_cost(key, results[arm, key], gap) for key in costs))
        parts += [table, Text("x: times the baseline; + better, - worse, ~ not distinguishable, ? no verdict",
                              style="dim")]  # fmt: skip
    return Group(*parts)


def _conditions(setting: Mapping[str, Any]) -> str:
    about = setting["conditions"]
    parts = [
        setting["name"],
        "" if f"data={about['data']}" in setting["name"].split() else f"data {about['data']}",
        f"T {about['seq_len']}",
        f"{about['steps']} steps of {about['batch_size']}",
        f"{si(about['tokens'])} tokens" if isinstance(about["tokens"], int) else "",
        about["precision"],
        about["device"],
    ]
    return " · ".join(str(part) for part in parts if part)


def _quality(
    comparison: Mapping[str, Any],
    setting: Mapping[str, Any],
    results: Mapping[tuple[str, str], Mapping[str, Any]],
    metric: Mapping[str, Any],
    gap: str,
) -> Table:
    level = f"{100 * comparison['method']['level']:g} %"
    unit = metric["unit"] if metric["unit"].partition("/")[0] not in metric["title"] else ""
    title = f"{metric['title']} ({unit})" if unit else metric["title"]
    table = _table(title, "arm", "mean ± sd", f"difference{gap}[{level}]", "verdict", left=("arm", "verdict"))
    for arm in setting["arms"]:
        r = results[arm, metric["key"]]
        mean = "" if r["mean"] is None else f"{r['mean']:.4f}"
        spread = "" if r["sd"] is None else f" ± {r['sd']:.4f}"
        difference = "" if r["difference"] is None else f"{r['difference']:+.4f}"
        if r["low"] is not None:
            difference += f"{gap}[{r['low']:+.4f}, {r['high']:+.4f}]"
        table.add_row(arm, mean + spread, difference, _verdict(r, gap))
    return table


def _verdict(result: Mapping[str, Any], gap: str) -> Text:
    text = Text(result["verdict"], style=STYLES.get(result["verdict"], ""))
    details = [result["reason"]] if result["reason"] else []
    if result["verdict"] == "not distinguishable":
        details.insert(0, f"{result['seeds_needed'] or 'too many'} seeds needed")
    return text.append(f"{gap}({'; '.join(details)})", style="dim") if details else text


def _cost(key: str, result: Mapping[str, Any], gap: str) -> Text:
    if result["mean"] is None:
        return Text("-", style="dim")
    text = Text(f"{result['mean']:.3g}" if key == "decode_ms" else si(result["mean"]))
    if result["verdict"] != "baseline" and result["ratio"] is not None:
        mark = MARKS.get(result["verdict"], "=")
        text.append(f"{gap}x{result['ratio']:.2f}{mark}", style=STYLES.get(result["verdict"], ""))
    return text


def _profile(comparison: Mapping[str, Any]) -> RenderableType:
    """Arms as columns, tasks as rows: tasks are many."""
    profile = comparison["profile"]
    verdicts = {
        (s["name"], r["arm"]): r["verdict"]
        for s in comparison["settings"]
        for r in s["results"]
        if r["metric"] == "accuracy"
    }
    names = [
        s["name"] for s in comparison["settings"] if _is_task(s) and (s["name"], s["arms"][0]) in verdicts
    ]
    table = _table("Accuracy in %", "task", *profile["arms"], left=("task",))
    for column, (task, setting) in enumerate(zip(profile["tasks"], names, strict=True)):
        cells = []
        for arm, means in zip(profile["arms"], profile["mean"], strict=True):
            verdict = verdicts.get((setting, arm), "")
            text = "-" if means[column] is None else f"{100 * means[column]:.1f}{MARKS.get(verdict, ' ')}"
            cells.append(Text(text, style=STYLES.get(verdict, "")))
        table.add_row(task, *cells)
    return Group(Text(), table)


def _claims(claims: Sequence[Mapping[str, Any]]) -> RenderableType:
    columns = ("arm", "claim", "verdict")
    table = _table("Claims of the papers: their direction, not their numbers", *columns, left=columns)
    tested = [claim for claim in claims if claim["verdict"] != "not tested"]
    for claim in tested:
        text = Text(claim["text"])
        if claim["where"]:
            text.append(f" ({claim['where']})", style="dim")
        verdict = Text(claim["verdict"], style=STYLES.get(claim["verdict"], ""))
        place = f" in {claim['setting']}" if claim["setting"] else ""
        verdict.append(f"{place}: {claim['reason']}", style="dim")
        table.add_row(claim["arm"], text, verdict)
    rest = len(claims) - len(tested)
    many = "claims are" if rest > 1 else "claim is"
    note = Text(f"{rest} {many} not tested by these runs; comparison.json says why" if rest else "", "dim")
    return Group(Text(), *([table] if tested else []), Padding(note, (0, 0, 1, 0)))


def si(value: float) -> str:
    """A number in three digits: 12.3k, 1.05M."""
    for factor, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor * 0.9995:
            return f"{value / factor:.3g}{suffix}"
    return f"{value:.3g}"

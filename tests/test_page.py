"""The report page without a browser: what it says, what it leaves out, and that data stays data."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from comparisons import bare, comparison

page = pytest.importorskip("attnzoo.compare.page", reason="plotly is not installed")

from attnzoo.compare.page.facts import finding, findings  # noqa: E402
from attnzoo.compare.page.records import run_records  # noqa: E402
from attnzoo.compare.page.tables import results_table  # noqa: E402

HOSTILE = '</script><script>alert("1")</script><img src=x onerror=alert(2)>&amp;\u2028'


class Outline(HTMLParser):
    """Elements of a page, its visible text, and the figures in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.text += data

    @property
    def figures(self) -> dict[str, Any]:
        (found,) = (script for script in self.scripts if script.startswith("{"))
        return json.loads(found)

    def with_class(self, name: str) -> list[dict[str, str | None]]:
        return [attrs for _, attrs in self.elements if name in (attrs.get("class") or "").split()]


@pytest.fixture(scope="module")
def whole() -> Outline:
    return Outline(page.render(comparison()))


def poisoned(value: Any) -> Any:
    """The same with hostile text behind every text that is free; a label stays the same everywhere."""
    fixed = {"better", "metric", "verdict", "baseline", "arm", "key", "val_key", "unit", "budget", "created"}
    if isinstance(value, dict):
        return {k: v if k in fixed - {"baseline", "arm"} else poisoned(v) for k, v in value.items()}
    if isinstance(value, list):
        return [poisoned(item) for item in value]
    return value + HOSTILE if isinstance(value, str) else value


def test_text_from_data_stays_text(whole):
    """Every text of the comparison tries to break out; the page keeps its elements and gains none."""
    made = poisoned(comparison())
    made["forced"] = made["left_out"] = []
    dirty = Outline(page.render(made))
    assert len(dirty.scripts) == len(whole.scripts)
    assert {tag for tag, _ in dirty.elements} == {tag for tag, _ in whole.elements}
    assert not any(name.startswith("on") for _, attrs in dirty.elements for name in attrs)
    assert 'alert("1")' in dirty.text, "it is shown, as text"
    for name in (trace.get("name", "") for trace in figure_traces(dirty)):
        assert "<" not in name, "plotly would read it as a tag"


def figure_traces(outline: Outline) -> list[dict[str, Any]]:
    return [trace for views in outline.figures.values() for view in views.values() for trace in view["data"]]


def test_the_page_needs_no_network(whole):
    policy = next(attrs["content"] for tag, attrs in whole.elements if attrs.get("http-equiv"))
    assert "default-src 'none'" in policy and "http" not in policy
    assert not [attrs["src"] for _, attrs in whole.elements if "src" in attrs]
    links = {attrs["href"] for _, attrs in whole.elements if "href" in attrs}
    papers = {arm["arxiv"] for arm in comparison()["arms"] if arm["arxiv"]}
    assert links == {"data:,", "#results", *(f"https://arxiv.org/abs/{number}" for number in papers)}


def test_figures_name_their_colours(whole):
    """A colour that is not a variable of the palette would be the same in light and dark."""
    palette = set(re.findall(r"(--[\w-]+):", (page.HERE / "assets" / "colours.css").read_text()))
    text = json.dumps(whole.figures)
    assert set(re.findall(r"var\((--[\w-]+)\)", text)) <= palette
    assert set(re.findall(r'"(#[0-9a-f]{3,6}|rgba?\([^"]*)"', text)) <= {"rgba(0,0,0,0)"}


def test_an_arm_looks_the_same_in_every_plot(whole):
    colours: dict[str, set[str]] = {}
    for trace in figure_traces(whole):
        if trace.get("meta") in ("line", "point"):
            own = colours.setdefault(trace["name"], set())
            own |= {trace["marker"]["color"], trace.get("line", trace["marker"])["color"]}
    assert sorted(colours) == sorted(arm["label"] for arm in comparison()["arms"])
    assert all(len(own) == 1 for own in colours.values())
    assert colours["mha"] == {"var(--arm-base)"}
    assert len(set.union(*colours.values())) == len(colours)


def test_missing_parts_are_left_out():
    outline = Outline(page.render(bare()))
    assert outline.with_class("plot") == [] and outline.figures == {}
    for title in ("Loss curves", "Quality against cost", "Decoding", "profile", "Claims", "The runs"):
        assert title not in outline.text


@pytest.mark.parametrize(
    ("part", "title"),
    [("curves", "Loss curves"), ("positions", "Loss by position"), ("decode", "Decode latency")],
)
def test_one_missing_part_takes_nothing_else_with_it(whole, part, title):
    made = comparison()
    made["settings"][0][part] = []
    outline = Outline(page.render(made))
    assert title in whole.text and title not in outline.text
    gone = 2 if part == "decode" else 1
    assert len(outline.with_class("plot")) == len(whole.with_class("plot")) - gone


def test_what_is_forced_stands_before_everything():
    made = comparison()
    made["forced"] = ["steps: 600 in mha, 400 in mla"]
    made["left_out"] = [{"folder": "runs/x", "reason": "is not a run folder"}]
    text = Outline(page.render(made)).text
    order = ("forced", "400 in mla", "left out", "runs/x", "did nothing else", "Difference")
    places = [text.index(part) for part in order]
    assert places == sorted(places)


def test_one_seed_gives_no_bands_and_no_verdict():
    outline = Outline(page.render(comparison(seeds=1)))
    assert "No verdict in validation bits per byte: a single seed." in outline.text
    assert not [trace for trace in figure_traces(outline) if trace.get("meta") == "band"]
    assert "bands reach" not in outline.text


def verdicts(*names: str) -> dict[str, Any]:
    made = comparison(arms=len(names) + 1)
    results = [
        r for r in made["settings"][0]["results"] if r["metric"] == "val_bpb" and r["verdict"] != "baseline"
    ]
    for result, verdict in zip(results, names, strict=True):
        result["verdict"] = verdict
    return made


IN = "in validation bits per byte"
TERMS = ", at equal parameters and 3 seeds."


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (
            ("better", "better", "worse", "not distinguishable"),
            f"2 of 4 variants are better than mha {IN}, 1 is worse and 1 is not distinguishable",
        ),
        (("not distinguishable",) * 3, f"None of 3 variants is distinguishable from mha {IN}"),
        (("worse",), f"gqa num_kv_heads=2 is worse than mha {IN}"),
        (
            ("equal", "not distinguishable"),
            f"1 of 2 variants is equal to mha {IN} and 1 is not distinguishable",
        ),
    ],
)
def test_the_finding_counts_the_verdicts(names, sentence):
    made = verdicts(*names)
    assert finding(made, made["settings"][0]) == sentence + TERMS
    for arm in made["arms"]:
        arm["matched"] = None
    assert "equal parameters" not in finding(made, made["settings"][0])


def test_many_settings_are_summed_up():
    made = comparison(settings=("a", "b", "c", "d"))
    every = [r["verdict"] for s in made["settings"] for r in s["results"] if r["metric"] == "val_bpb"]
    counts = {verdict: every.count(verdict) for verdict in ("better", "worse")}
    ((name, sentence),) = findings(made)
    assert name == "" and f"{counts['better']} times better than mha" in sentence
    assert f"{counts['worse']} times worse" in sentence
    assert [name for name, _ in findings(comparison(settings=("a", "b")))] == ["a", "b"]


def test_the_table_says_what_the_results_say():
    setting = comparison()["settings"][0]
    table = results_table(setting, "val_bpb", 0.95, "s0")
    by_arm = {r["arm"]: r for r in setting["results"] if r["metric"] == "val_bpb"}
    for verdict, cells in table.rows:
        result = by_arm[cells[0].text]
        assert (verdict, cells[1].text) == (result["verdict"], result["verdict"])
        assert [cell.sort for cell in cells[2:4]] == [result["mean"], result["difference"]]
        assert cells[5].sort == result["seeds_needed"]


def test_environment_is_said_once():
    runs = run_records(comparison())
    assert ("versions.torch", "2.10.0") in runs["shared"] and "impl" not in dict(runs["shared"])
    assert [dict(run["environment"]) for run in runs["runs"][2:4]] == [
        {"impl": "sdpa"},
        {"impl": "reference"},
    ]


def test_writing_replaces_the_page_as_a_whole(tmp_path):
    target = tmp_path / "deep" / "page.html"
    page.write_page(bare(), target)
    page.write_page(comparison(arms=2), target)
    assert [each.name for each in target.parent.iterdir()] == ["page.html"]
    assert "gqa num_kv_heads=2" in target.read_text(encoding="utf-8")

"""The report page in a real headless Chromium: it draws, sorts, filters, switches, fits and can be read."""

from __future__ import annotations

import shutil
from itertools import product
from pathlib import Path

import pytest

from comparisons import bare, comparison

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
page = pytest.importorskip("attnzoo.compare.page", reason="plotly is not installed")

CHECKS = Path(__file__).with_name("page_checks.js").read_text()
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
PLOTS = ["curves", "positions", "pareto-flops", "pareto-cache", "pareto-time", "decode-ms", "decode-cache"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """One Chromium for the whole file."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if not chromium or not chromedriver:
        pytest.skip(f"needs chromium and chromedriver, found {chromium} and {chromedriver}")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Pages by name: one setting, two settings with all that warns, one seed, and almost nothing."""
    folder = tmp_path_factory.mktemp("pages")
    two = comparison(settings=("data=stdlib", "data=text model=small"))
    two["forced"] = ["data_fingerprint: 1a2b in mha, 3c4d in mla"]
    two["left_out"] = [{"folder": "runs/" + "long" * 40, "reason": "summary.json is missing"}]
    made = {"one": comparison(), "two": two, "single": comparison(seeds=1), "bare": bare()}
    for name, each in made.items():
        page.write_page(each, folder / f"{name}.html")
    return {name: (folder / f"{name}.html").as_uri() for name in made}


def look(browser, width: int, theme: str) -> None:
    """Gives the window a width and the system a wish for light or dark; an open page follows."""
    wish = {"name": "prefers-color-scheme", "value": theme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [wish]})
    screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    # two frames: the page is laid out anew, and what listens to its size and colours has been told
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")


def show(browser, url: str, width: int = 1280, theme: str = "light") -> None:
    """Opens a page."""
    look(browser, width, theme)
    browser.get_log("browser")
    browser.get(url)
    browser.execute_script(CHECKS)


def ask(browser, expression: str):
    return browser.execute_script(f"return {expression}")


def click(browser, selector: str) -> None:
    browser.execute_script("document.querySelector(arguments[0]).click()", selector)


@pytest.mark.parametrize("name", ["one", "two", "single", "bare"])
def test_opens_fits_and_can_be_read(browser, pages, name):
    show(browser, pages[name])
    assert browser.get_log("browser") == []
    assert ask(browser, "performance.getEntriesByType('resource').map(entry => entry.name)") == []
    assert ask(browser, "checks.texts().length") > 20
    ask(browser, "document.querySelectorAll('details').forEach(each => each.open = true)")
    for width, theme in product((1280, 390), ("light", "dark")):
        look(browser, width, theme)
        where = f"{width} pixels, {theme}"
        assert ask(browser, "document.documentElement.dataset.theme") == theme
        assert ask(browser, "checks.drawn()"), where
        assert ask(browser, "document.documentElement.scrollWidth") <= width, where
        for check in ("outside", "wide", "small", "pale"):
            assert ask(browser, f"checks.{check}()") == [], f"{check} at {where}"


def test_the_policy_forbids_requests(browser, pages):
    """A request that is made on purpose is blocked, and the log says by what."""
    show(browser, pages["bare"])
    request = (
        "fetch('https://example.invalid/').then(() => arguments[0]('sent'), () => arguments[0]('blocked'))"
    )
    assert browser.execute_async_script(request) == "blocked"
    assert any("Content Security Policy" in line["message"] for line in browser.get_log("browser"))


def test_every_plot_is_drawn_and_the_phone_turns_the_profile(browser, pages):
    show(browser, pages["one"])
    plots = ask(browser, "checks.plots()")
    assert [id for id, _, _ in plots] == [*(f"s0-{name}" for name in PLOTS), "profile"]
    for id, size, marks in plots:
        assert size > 200, id
        assert marks >= 5, f"{id}: five arms, {marks} marks"
    across = "document.querySelector('#profile .canvas')._fullData[0].x.length"
    assert ask(browser, across) == 13, "tasks"
    look(browser, 390, "light")
    assert ask(browser, across) == 5, "arms"
    assert ask(browser, "document.querySelector('#profile .canvas').offsetWidth") <= 390


def test_the_table_sorts_and_filters(browser, pages):
    show(browser, pages["one"])
    rows = "checks.rows('s0-results')"
    columns = ask(browser, "document.querySelectorAll('#s0-results thead th').length")
    assert columns == 9
    orders = set()
    for column, direction in product(range(columns), ("ascending", "descending")):
        state = ask(browser, f"checks.sort('s0-results', {column})")
        assert state["marks"] == [direction if i == column else None for i in range(columns)]
        present = [key for key in state["keys"] if key]
        assert state["keys"][: len(present)] == present, "rows without a value are last"
        values = present if column == 0 else [float(key) for key in present]
        assert values == sorted(values, reverse=direction == "descending")
        orders.add(tuple(ask(browser, rows)))
    assert len(orders) > 4, "the columns order the rows differently"

    everything = ask(browser, rows)
    assert len(everything) == 5
    click(browser, "#s0-results button[data-verdict=better]")
    assert ask(browser, rows) == ["gated_deltanet"]
    click(browser, "#s0-results button[data-verdict=worse]")
    assert sorted(ask(browser, rows)) == ["gated_deltanet", "sliding_window"]
    search = browser.find_element("css selector", "#s0-results input")
    search.send_keys("SLIDING")
    assert ask(browser, rows) == ["sliding_window"]
    assert browser.find_element("css selector", "#s0-results output").text == "1 of 5"
    search.send_keys("\b" * len("SLIDING"))
    click(browser, "#s0-results button[data-verdict=better]")
    click(browser, "#s0-results button[data-verdict=worse]")
    assert ask(browser, rows) == everything


def test_the_switches_change_what_is_drawn(browser, pages):
    show(browser, pages["one"])
    line = "checks.line('s0-curves')"
    tokens = ask(browser, line)
    assert tokens["titles"] == ["tokens", "validation bits per byte"]
    click(browser, "#s0-curves button[value=FLOPs]")
    flops = ask(browser, line)
    assert flops["titles"] == ["training FLOPs", "validation bits per byte"]
    assert flops["x"] == pytest.approx(tokens["x"] * 62.1e6, rel=1e-4)
    assert flops["y"] == tokens["y"]
    click(browser, "#s0-curves button[value='validation − mha']")
    assert ask(browser, line)["y"] == pytest.approx(0, abs=1e-9), "the baseline minus itself"


def test_the_theme_button_changes_page_and_plots(browser, pages):
    show(browser, pages["one"], theme="light")
    colours = "checks.line('s0-positions').colours"
    light = ask(browser, colours)
    look(browser, 1280, "dark")
    dark = ask(browser, colours)
    assert [a for a, b in zip(light, dark, strict=True) if a == b] == []
    click(browser, "#theme")
    assert ask(browser, colours) == light, "the button overrules the system"
    show(browser, pages["one"], theme="dark")
    remembered = ask(browser, colours)
    browser.execute_script("localStorage.clear()")
    assert remembered == light, "the choice is remembered"


def test_settings_are_tabs(browser, pages):
    show(browser, pages["two"])
    shown = "[...document.querySelectorAll('.setting')].map(setting => setting.checkVisibility())"
    assert ask(browser, shown) == [True, False]
    click(browser, "#tab-s1")
    assert ask(browser, shown) == [False, True]
    assert ask(browser, "document.querySelectorAll('#s1 .main-svg').length") > 0
    assert ask(browser, "checks.drawn()")

"""The report as a reader sees it: in a real browser, on a desk and on a phone, by day and by night, without network."""

import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from report_example import example_comparison
from unrecurrent import report

sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright")

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = ("no-sandbox", "disable-gpu", "disable-quic", "no-first-run")
QUIET = ("disable-background-networking", "disable-component-update", "disable-sync")
ARGUMENTS = [f"--{flag}" for flag in FLAGS + QUIET]
DESK, PHONE = (1280, 850), (390, 844)
VIEWS = [(DESK, "light"), (DESK, "dark"), (PHONE, "light"), (PHONE, "dark")]

# The contrast (WCAG 2) of an element's text, or of a chart's text, with the page behind it.
CONTRAST = """
(selector) => {
  const luminance = (colour) => {
    const channels = colour.match(/[\\d.]+/g).slice(0, 3).map(Number).map((value) => {
      const share = value / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * channels[0] + 0.7152 * channels[1] + 0.0722 * channels[2];
  };
  const background = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = getComputedStyle(at).backgroundColor;
      if (colour && !/, 0\\)$/.test(colour)) { return colour; }
    }
    return "rgb(255, 255, 255)";
  };
  return [...document.querySelectorAll(selector)].map((element) => {
    const style = getComputedStyle(element);
    const colours = [element.closest("svg") ? style.fill : style.color, background(element)];
    const [dark, light] = colours.map(luminance).sort((one, other) => one - other);
    return (light + 0.05) / (dark + 0.05);
  });
}
"""

# For each chart, the marks that were drawn: points, lines with a length, bars with an area.
MARKS = """
() => Object.fromEntries([...document.querySelectorAll(".chart")].map((chart) => {
  const drawn = [...chart.querySelectorAll(".trace .point path, .trace path.point, .trace path.js-line")];
  return [chart.id, drawn.filter((mark) => {
    const box = mark.getBBox();
    return box.width + box.height > 0;
  }).length];
}))
"""


@dataclass
class Visit:
    """An open page with everything it asked for or complained about."""

    page: Any
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip(f"needs a Chromium on the PATH under one of the names {', '.join(BROWSERS)}")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    report.save(example_comparison(), path)
    return path


def visit(browser: Any, path: Path, size: tuple[int, int], scheme: str) -> Visit:
    """Open the file without network and wait for the last chart."""
    width, height = size
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme, offline=True)
    seen = Visit(context.new_page())
    seen.page.on("request", lambda request: seen.requests.append(request.url))
    seen.page.on("console", lambda message: seen.complaints.append(message.text))
    seen.page.on("pageerror", lambda error: seen.complaints.append(str(error)))
    seen.page.goto(path.as_uri())
    for chart in seen.page.locator(".chart").all():
        chart.locator(".main-svg").first.wait_for(state="attached")
    return seen


@pytest.fixture(scope="module", params=VIEWS, ids=lambda view: f"{view[0][0]}-{view[1]}")
def opened(request: pytest.FixtureRequest, browser: Any, saved: Path) -> Iterator[Visit]:
    seen = visit(browser, saved, *request.param)
    yield seen
    seen.page.context.close()


def test_the_page_asks_for_nothing_but_itself_and_does_not_complain(opened: Visit, saved: Path):
    assert opened.requests == [saved.as_uri()]
    assert opened.complaints == []


def test_every_chart_is_drawn(opened: Visit):
    marks = opened.page.evaluate(MARKS)
    models, seeds, windows = 7, 2, 11
    for chart in ("train-tokens-per-s", "score-tokens-per-s", "generate-steps-per-s", "peak-memory-mib"):
        assert marks.pop(f"chart-{chart}") == models
    # A curve, its points, its full level and its star a model; bands are fills.
    assert marks.pop("chart-truncation") >= models * (windows + 3)
    assert marks.pop("chart-training") == models * seeds * 2
    assert marks.pop("chart-certificate") == 3
    assert marks == {}


def test_the_verdict_is_seen_first_and_large(opened: Visit):
    verdict = opened.page.locator("#verdict")
    assert verdict.inner_text() == "No."
    box = verdict.bounding_box()
    assert box["y"] + box["height"] < opened.page.viewport_size["height"] / 2
    sizes = opened.page.evaluate(
        "[...document.querySelectorAll('#verdict, h1, h2, h3, p')].map((e) => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert parse_size(verdict) == max(sizes) >= 30


def parse_size(locator: Any) -> float:
    return locator.evaluate("(element) => parseFloat(getComputedStyle(element).fontSize)")


def test_all_text_can_be_read_against_the_page(opened: Visit):
    for selector in ("h1, h2, p, li, dt, dd, figcaption, summary", "th, td, .kind, .unit", "svg text"):
        contrasts = opened.page.evaluate(CONTRAST, selector)
        assert len(contrasts) > 20
        assert min(contrasts) >= 4.5, selector


def test_the_page_never_scrolls_sideways(opened: Visit):
    width = opened.page.viewport_size["width"]
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = opened.page.evaluate(
        "[...document.querySelectorAll('.chart, .scroll, pre, dl, p')].map((e) => e.getBoundingClientRect().right)"
    )
    assert max(boxes) <= width


def test_a_chart_keeps_its_labels_inside_itself(opened: Visit):
    cut = opened.page.evaluate(
        """() => [...document.querySelectorAll(".chart")].flatMap((chart) => {
          const frame = chart.getBoundingClientRect();
          return [...chart.querySelectorAll("svg text")].filter((text) => {
            const box = text.getBoundingClientRect();
            return box.width > 0 && (box.left < frame.left - 1 || box.right > frame.right + 1);
          }).map((text) => chart.id + ": " + text.textContent);
        })"""
    )
    assert cut == []


def test_the_model_column_stays_in_sight_while_its_table_scrolls(browser: Any, saved: Path):
    page = visit(browser, saved, PHONE, "light").page
    table = page.locator(".scroll").first
    before = table.locator("tbody th").first.bounding_box()
    table.evaluate("(element) => { element.scrollLeft = 200; }")
    assert table.evaluate("(element) => element.scrollLeft") == 200
    assert table.locator("tbody th").first.bounding_box() == before
    page.context.close()


def test_charts_follow_the_colour_scheme_and_print_in_dark_ink(browser: Any, saved: Path):
    page = visit(browser, saved, DESK, "light").page
    ink = "getComputedStyle(document.querySelector('#chart-training svg text')).fill"
    by_day = page.evaluate(ink)
    page.emulate_media(color_scheme="dark")
    deadline = time.monotonic() + 10
    while page.evaluate(ink) == by_day:
        assert time.monotonic() < deadline, "the charts kept their colours in dark mode"
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate(ink) == by_day
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate(ink) != by_day
    page.context.close()


def test_hostile_and_endless_names_neither_run_nor_widen_the_page(browser: Any, tmp_path: Path):
    name = "<img src=x onerror=console.log(1)>" + "endless" * 30
    comparison = example_comparison(models=("lstm",)) | {"task": f"text:{name}", "command": f"unrecurrent {name}"}
    comparison["rows"][0]["model"] = name
    for part in ("training", "memory", "configuration"):
        comparison[part] = {name: comparison[part]["lstm"]}
    report.save(comparison, tmp_path / "report.html")
    seen = visit(browser, tmp_path / "report.html", PHONE, "light")
    assert seen.complaints == []
    assert len(seen.requests) == 1
    assert seen.page.locator("h1").inner_text() == f"Does text:{name} need a recurrent model?"
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= PHONE[0]
    seen.page.context.close()


def test_a_page_without_measurements_opens_without_charts(browser: Any, tmp_path: Path):
    report.save({"task": "chorales", "rows": [{"model": "lstm", "mean": 8.4}]}, tmp_path / "report.html")
    seen = visit(browser, tmp_path / "report.html", PHONE, "dark")
    assert seen.complaints == []
    assert seen.page.locator(".chart").count() == 0
    assert re.search(r"8\.400", seen.page.locator("table").first.inner_text())
    seen.page.context.close()

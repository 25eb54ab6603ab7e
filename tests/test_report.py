"""The report's words, numbers, escaping and gaps, without a browser."""

import copy
import errno
import html
import itertools
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from report_example import example_comparison
from unrecurrent import report
from unrecurrent.errors import InputError


@pytest.fixture(autouse=True)
def _small_plotly(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Leave out the five megabytes of plotly.js, except where they are what is tested."""
    if "whole_page" not in request.fixturenames:
        monkeypatch.setattr(report, "_plotly_script", lambda: "")


@pytest.fixture
def whole_page() -> str:
    return report.render(example_comparison())


def drawings(page: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="charts">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found.group(1))


def cells(page: str, model: str) -> list[str]:
    """The visible text of a model's row in the table of results."""
    row = re.search(rf"</span>{re.escape(model)}</th>(.*?)</tr>", page, re.DOTALL)
    assert row
    return [html.unescape(re.sub("<.*?>", "", cell)) for cell in re.findall(r"<td.*?</td>", row.group(1))]


def printed(comparison: dict[str, Any], width: int) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(report.terminal_table(comparison))
    return captured.get()


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every path into nested dicts and lists, branches included."""
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from leaves(item, (*path, key))


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    changed = copy.deepcopy(value)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return changed


# --- the page


def test_the_question_is_the_title_and_the_verdict_comes_first():
    page = report.render(example_comparison())
    assert "<title>Does chorales need a recurrent model?</title>" in page
    assert '<p class="answer" id="verdict">No.</p>' in page
    assert page.index('id="verdict"') < page.index("<table>")
    assert "The LSTM uses the last 12 chords; a TCN" in page


@pytest.mark.parametrize(
    ("answer", "text", "headline", "reasons"),
    [
        ("no", "No. Because 8.4 is near 8.5.", "No.", "Because 8.4 is near 8.5."),
        ("cannot tell", "Cannot tell with 2 seeds. Take more.", "Cannot tell with 2 seeds.", "Take more."),
        ("yes", "The LSTM is better. By far.", "Yes.", "The LSTM is better. By far."),
        ("cannot tell", "Cannot tell with 2 seeds: lstm 8.4.", "Cannot tell with 2 seeds:", "lstm 8.4."),
        ("yes", "Yes.", "Yes.", ""),
        ("", "", "No verdict.", ""),
    ],
)
def test_the_first_sentence_of_the_verdict_is_the_headline(answer, text, headline, reasons):
    page = report.render(example_comparison() | {"verdict": {"answer": answer, "text": text}})
    assert f'<p class="answer" id="verdict">{headline}</p>' in page
    assert (f'<p class="why">{reasons}</p>' in page) is bool(reasons)


def test_the_table_holds_the_numbers_of_the_rows():
    row = cells(report.render(example_comparison()), "stable-lstm")
    assert row[:6] == ["6.688 ± 0.033", "8 (6–12)", "all", "0.8100", "0.9412", "214"]
    assert row[6:10] == ["9,410", "33,100", "4,310", "531"]
    assert row[10:] == ["152,008", "128", "2", "12", "0.61"]


def test_proved_and_estimated_columns_say_so():
    page = report.render(example_comparison())
    kinds = re.findall(r'<th scope="col">([^<]+?) <span class="kind \w+">(\w+)</span>', page)
    assert set(kinds) == {
        ("k*", "estimate"),
        ("local rate", "estimate"),
        ("rate", "proved"),
        ("horizon", "proved"),
    }


def test_columns_nobody_has_a_value_for_are_left_out():
    comparison = example_comparison(models=("lstm", "tcn"))
    for row in comparison["rows"]:
        row["local_rate"] = None
    page = report.render(comparison)
    assert "horizon" not in page
    assert ">proved<" not in page
    assert "local rate" not in page
    assert "k*" in page


@pytest.mark.parametrize(("direction", "best"), [("lower", "tcn"), ("higher", "rnn")])
def test_the_best_score_is_marked_by_the_direction_of_the_metric(direction, best):
    comparison = example_comparison()
    comparison["metric"]["direction"] = direction
    page = report.render(comparison)
    for row in comparison["rows"]:
        assert cells(page, row["model"])[0].endswith("(best)") is (row["model"] == best)


def test_equal_values_are_both_the_best_and_a_single_model_is_not():
    comparison = example_comparison(models=("lstm", "tcn"))
    for row in comparison["rows"]:
        row["peak_memory_mib"] = 500
    page = report.render(comparison)
    assert [cells(page, model)[7] for model in ("lstm", "tcn")] == ["500 (best)"] * 2
    assert "(best)" not in report.render(example_comparison(models=("lstm",)))


def test_rules_command_machine_versions_and_settings_are_shown():
    comparison = example_comparison()
    page = html.unescape(report.render(comparison))
    for sentence in comparison["verdict"]["rules"]:
        assert f"<li>{sentence}</li>" in page
    assert f"<code>{comparison['command']}</code>" in page
    for fact in ("Example Processor 3.1 GHz", "2.13.0", "4a9e697", "1,204,800", "all models: adamw", "0.003"):
        assert fact in page


def test_the_page_fits_its_limit_and_names_nothing_to_fetch(whole_page):
    assert 4e6 < len(whole_page.encode()) < 6e6
    own = whole_page.replace(report._plotly_script(), "")
    assert len(own) < 300_000
    assert not re.findall(r"""(?:src|href)\s*=|url\(|@import|https?://""", own)
    assert "connect-src" not in report.CONTENT_POLICY
    assert "default-src 'none'" in own


def test_plotly_cannot_end_the_script_it_stands_in(whole_page):
    script = report._plotly_script()
    assert "Plotly" in script
    assert "</script" not in script
    assert "<!--" not in script
    assert whole_page.count("</script>") == 3


HOSTILE = """<script>alert("1")</script>&'$plotly ${title} %{x} [bold]"""


def test_everything_a_user_can_name_is_escaped():
    comparison = example_comparison(models=("lstm", "tcn"))
    hostile = {
        "task": f"text:{HOSTILE}.txt",
        "step_noun": HOSTILE,
        "command": HOSTILE,
        "created": HOSTILE,
        "commit": HOSTILE,
        "metric": {"name": HOSTILE, "direction": "lower", "unit": HOSTILE},
        "verdict": {"answer": "no", "text": HOSTILE, "rules": [HOSTILE]},
        "machine": {HOSTILE: HOSTILE},
        "versions": {HOSTILE: HOSTILE},
        "budget": {HOSTILE: HOSTILE},
        "rows": [row | {"model": HOSTILE} for row in comparison["rows"][:1]],
        "training": {HOSTILE: comparison["training"]["lstm"]},
        "memory": {HOSTILE: comparison["memory"]["lstm"]},
        "configuration": {HOSTILE: {HOSTILE: HOSTILE}, "tcn": {}},
    }
    page = report.render(comparison | hostile)
    assert "<script>alert" not in page
    assert page.count(html.escape(HOSTILE)) > 10
    assert page.count("</script>") == 3
    assert "$plotly ${title}" in page
    names = {trace.get("name") for chart in drawings(page) for trace in chart["data"]}
    assert html.escape(HOSTILE) in names
    assert "[bold]" in printed(comparison | hostile, 400)


# --- the charts


def test_there_is_a_chart_for_everything_measured():
    charts = {chart["id"]: chart for chart in drawings(report.render(example_comparison()))}
    assert set(charts) == {
        "chart-truncation",
        "chart-training",
        "chart-train-tokens-per-s",
        "chart-score-tokens-per-s",
        "chart-generate-steps-per-s",
        "chart-peak-memory-mib",
        "chart-certificate",
    }
    assert charts["chart-truncation"]["layout"]["xaxis"]["type"] == "log"


def test_a_truncation_curve_has_a_band_a_full_level_and_k_star():
    comparison = example_comparison(models=("lstm",))
    entry = comparison["memory"]["lstm"]
    band, curve, full, star = drawings(report.render(comparison))[0]["data"]
    assert band["fill"] == "toself"
    assert band["y"] == entry["low"] + entry["high"][::-1]
    assert (curve["x"], curve["y"]) == (entry["ks"], entry["mean"])
    assert curve["name"] == "lstm, k* 12"
    assert full["y"] == [entry["full"]] * 2
    assert full["line"]["dash"] == "dash"
    assert (star["x"], star["y"]) == ([12], [entry["mean"][entry["ks"].index(12)]])


def test_windows_too_short_to_be_of_use_do_not_flatten_the_truncation_curves():
    comparison = example_comparison(models=("lstm", "tcn"))
    assert "range" not in drawings(report.render(comparison))[0]["layout"]["yaxis"]
    means = comparison["memory"]["lstm"]["mean"]
    means[0] = 31.0
    page = report.render(comparison)
    low, high = drawings(page)[0]["layout"]["yaxis"]["range"]
    assert low < min(means) < means[5] < high < means[0]
    assert "The shortest windows leave the chart" in page


def test_a_model_keeps_its_colour_in_every_chart():
    charts = drawings(report.render(example_comparison()))
    colours: dict[str, set[str]] = {}
    for trace in itertools.chain.from_iterable(chart["data"] for chart in charts):
        if trace["type"] == "bar":
            for model, colour in zip(trace["y"], trace["marker"]["color"], strict=True):
                colours.setdefault(model, set()).add(colour)
        elif "line" in trace and "color" in trace["line"] and "legendgroup" in trace:
            colours.setdefault(trace["legendgroup"], set()).add(trace["line"]["color"])
    assert len(colours) == 7
    assert all(len(used) == 1 for used in colours.values())
    assert len(set.union(*colours.values())) == 7


def test_training_is_dashed_and_validation_solid_for_every_seed():
    comparison = example_comparison(models=("tcn",))
    chart = next(c for c in drawings(report.render(comparison)) if c["id"] == "chart-training")
    assert [trace["line"]["dash"] for trace in chart["data"]] == ["dash", "solid"] * 2
    assert [trace["showlegend"] for trace in chart["data"]] == [False, True, False, False]
    assert chart["data"][1]["y"] == [epoch["valid_loss"] for epoch in comparison["training"]["tcn"][0]["epochs"]]


def test_a_single_epoch_is_drawn_as_marks_that_tell_training_from_validation():
    comparison = example_comparison(models=("tcn",))
    for run in comparison["training"]["tcn"]:
        del run["epochs"][1:]
    page = report.render(comparison)
    chart = next(c for c in drawings(page) if c["id"] == "chart-training")
    assert [trace["marker"]["symbol"] for trace in chart["data"]] == ["circle-open", "circle"] * 2
    assert all("markers" in trace["mode"] for trace in chart["data"])
    assert "Open marks: training." in page


def test_the_loss_axis_leaves_out_first_epochs_that_would_flatten_the_rest():
    comparison = example_comparison(models=("tcn",))
    chart = next(c for c in drawings(report.render(comparison)) if c["id"] == "chart-training")
    low, high = chart["layout"]["yaxis"]["range"]
    values = [y for trace in chart["data"] for y in trace["y"]]
    assert low < min(values) < high < max(values)
    for run in comparison["training"]["tcn"]:
        del run["epochs"][0]
    chart = next(c for c in drawings(report.render(comparison)) if c["id"] == "chart-training")
    assert "range" not in chart["layout"]["yaxis"]


def test_the_certificate_stands_beside_the_measurement_with_their_ratio():
    page = report.render(example_comparison())
    chart = drawings(page)[-1]
    assert chart["id"] == "chart-certificate"
    estimate, proved = chart["data"][-2:]
    assert (estimate["name"], estimate["x"], estimate["y"]) == ("k* (estimate)", [8], ["stable-lstm"])
    assert (proved["name"], proved["x"]) == ("certified horizon (proved)", [214])
    assert proved["text"] == ["  ratio 26.8"]


def test_every_chart_has_words_for_those_who_cannot_see_it():
    page = report.render(example_comparison())
    labels = dict(re.findall(r'<div class="chart" id="([\w-]+)" role="img" style="[^"]*" aria-label="([^"]*)"', page))
    assert set(labels) == {chart["id"] for chart in drawings(page)}
    assert "tcn: 8.260 at 1" in labels["chart-truncation"]
    assert "gru 498" in labels["chart-peak-memory-mib"]
    assert page.count("<figcaption>") == len(labels)


# --- gaps


def small_example() -> dict[str, Any]:
    """Two models, one of them certified, with two epochs and three windows each."""
    comparison = example_comparison(models=("stable-lstm", "tcn"))
    for runs in comparison["training"].values():
        for run in runs:
            del run["epochs"][2:]
    for entry in comparison["memory"].values():
        for key in ("ks", "mean", "low", "high"):
            entry[key] = entry[key][4:7]
    return comparison


EXAMPLE = small_example()


@pytest.mark.parametrize("gap", [None, math.nan], ids=["none", "nan"])
def test_any_value_may_be_missing(gap):
    needed = {("task",), ("rows",)}
    paths = [path for path in leaves(EXAMPLE) if path not in needed]
    if gap is not None:
        paths = [path for path in paths if isinstance(at(EXAMPLE, path), float)]
    assert len(paths) > 50
    for path in paths:
        comparison = replaced(EXAMPLE, path, gap)
        page = report.render(comparison)
        assert "tcn" in page, path
        assert not re.search(r"\b(None|nan|NaN)\b", page.split("<script>")[0]), path
        assert report.terminal_table(comparison).row_count == len([row for row in comparison["rows"] if row])


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def test_the_least_there_can_be_is_still_a_page():
    page = report.render({"task": "chorales", "rows": [{"model": "lstm"}]})
    assert drawings(page) == []
    assert set(cells(page, "lstm")) == {"–"}
    assert "No verdict." in page


def test_one_model_without_its_memory_is_a_page_without_that_chart():
    comparison = example_comparison(models=("lstm",)) | {"memory": {}}
    ids = {chart["id"] for chart in drawings(report.render(comparison))}
    assert "chart-truncation" not in ids
    assert "chart-training" in ids


def test_k_star_beyond_the_longest_window_is_given_as_a_bound():
    comparison = example_comparison(models=("lstm",))
    comparison["rows"][0]["k_star"] = None
    comparison["memory"]["lstm"] |= {"k_star": None, "k_star_low": None, "k_star_high": None}
    assert cells(report.render(comparison), "lstm")[1] == "> 64"
    assert "> 64" in printed(comparison, 80)


@pytest.mark.parametrize("missing", ["task", "rows"])
def test_what_is_not_a_comparison_is_refused_in_one_sentence(missing):
    comparison = example_comparison() | {missing: None}
    with pytest.raises(InputError, match=f"^this comparison has no {missing}: give what"):
        report.render(comparison)
    with pytest.raises(InputError, match=f"has no {missing}"):
        report.terminal_table(comparison)


# --- saving


def test_saving_writes_the_page_and_leaves_nothing_else(tmp_path: Path):
    path = tmp_path / "report.html"
    report.save(example_comparison(), path)
    assert path.read_text("utf-8") == report.render(example_comparison())
    assert os.listdir(tmp_path) == ["report.html"]
    assert stat.S_IMODE(path.stat().st_mode) & stat.S_IRUSR


def test_a_full_disk_is_one_sentence_and_the_old_report_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="No space left on device") as caught:
        report.save(example_comparison(), path)
    assert "\n" not in str(caught.value)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.html"]


def test_a_missing_folder_and_a_folder_for_a_file_are_refused(tmp_path: Path):
    with pytest.raises(InputError, match=r"report\.html"):
        report.save(example_comparison(), tmp_path / "nowhere" / "report.html")
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="folder"):
        report.save(example_comparison(), tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"]


def test_a_task_named_after_a_file_with_a_broken_name_can_be_saved(tmp_path: Path):
    report.save(example_comparison() | {"task": "text:\udcff.txt"}, tmp_path / "report.html")
    assert "text:?.txt" in (tmp_path / "report.html").read_text("utf-8")


# --- the terminal


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_table_fits(width):
    text = printed(example_comparison(), width)
    assert max(map(len, text.splitlines())) <= width
    assert "*6.629 ± 0.017" in text
    assert "…" not in text
    for word in ("stable-lstm", "nll", "params", "9.87k", "*402k", "k*", "all", "lower is better"):
        assert word in text


def test_long_names_fold_and_no_number_is_lost_at_80_columns():
    comparison = example_comparison(models=("lstm", "tcn"))
    comparison["rows"][0]["model"] = "certified-lstm-coupled"
    text = printed(comparison, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    folded = "".join(line.split(" ")[0] for line in text.splitlines())
    assert "certified-lstm-coupled" in folded


@pytest.mark.parametrize(
    ("mean", "std", "text"),
    [
        (8.4123, 0.0213, "8.412 ± 0.021"),
        (11.4264, 0.0047, "11.426 ± 0.005"),
        (146.73, 2.31, "146.7 ± 2.3"),
        (0.000234567, 0.0000012, "0.0002346 ± 0.0000012"),
        (-1.25, 0, "-1.250 ± 0.000"),
        (8.4, None, "8.400"),
    ],
)
def test_a_score_shows_four_digits_and_its_spread(mean, std, text):
    comparison = example_comparison(models=("lstm",))
    comparison["rows"][0] |= {"mean": mean, "std": std}
    assert f" {text} " in printed(comparison, 120)
    assert cells(report.render(comparison), "lstm")[0] == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0"), (843, "843"), (999.7, "1.00k"), (12345, "12.3k"), (1234567, "1.23M"), (2.5e9, "2.50G")],
)
def test_large_numbers_are_short(value, text):
    comparison = example_comparison(models=("lstm",))
    comparison["rows"][0]["params"] = value
    assert f" {text} " in printed(comparison, 120)


# --- colours

# Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB.
COLOUR_VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
SRGB_TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
)
WHITE = SRGB_TO_XYZ.sum(axis=1)


def linear(colour: str) -> np.ndarray:
    channels = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    ratio = SRGB_TO_XYZ @ rgb.clip(0, 1) / WHITE
    f = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


PALETTES = pytest.mark.parametrize(
    ("colours", "paper"),
    [(report.LIGHT_COLOURS, report.LIGHT_PAPER), (report.DARK_COLOURS, report.DARK_PAPER)],
    ids=["light", "dark"],
)


@PALETTES
def test_colours_stand_out_from_the_page(colours, paper):
    for colour in colours:
        light, dark = sorted((float(SRGB_TO_XYZ[1] @ linear(c)) for c in (colour, paper)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 3
    assert f"--paper: {paper};" in report.render(EXAMPLE)


@PALETTES
@pytest.mark.parametrize("vision", COLOUR_VISION)
def test_colours_differ_for_every_kind_of_colour_vision(colours, paper, vision):
    seen = [lab(np.array(COLOUR_VISION[vision]) @ linear(colour)) for colour in colours]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 17

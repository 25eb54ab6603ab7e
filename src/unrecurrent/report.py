"""The report of a comparison: one HTML page that opens offline, and the table for the terminal."""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, Literal

from rich import box
from rich.table import Table
from rich.text import Text

from unrecurrent.files import replacing
from unrecurrent.report_charts import Chart, build_charts
from unrecurrent.report_view import (
    MISSING,
    Kind,
    Row,
    View,
    as_number,
    badge,
    compact,
    count,
    decimals_of,
    four_digits,
    model_heading,
    model_of,
    plain,
    scrollable,
)

# One colour per model, told apart under the three kinds of colour blindness (least CIELAB distance 17)
# and against the page (contrast at least 3). Later models start over; symbols then tell them apart.
LIGHT_COLOURS = ("#005fcf", "#930000", "#088541", "#702a7a", "#949611", "#3d3d3d", "#7612f9", "#0e9ecb")
DARK_COLOURS = ("#2e73b6", "#c84c16", "#82c98b", "#9d5e76", "#eccb14", "#ecf5ec", "#8a49ed", "#07e0ff")
LIGHT_PAPER, DARK_PAPER = "#ffffff", "#14181d"

# The page may run its own script and nothing else: no request can leave it.
CONTENT_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def render(comparison: Mapping[str, Any]) -> str:
    """Return the report of a comparison as one HTML page without any external request.

    `comparison` is what `Comparison.to_dict()` gives; a value that is missing or None is shown as an en dash.
    Everything in it is escaped. Raises `InputError` where it has no task or no rows.

    >>> page = render({"task": "chorales", "rows": [{"model": "lstm", "mean": 8.4}]})
    >>> "Does chorales need a recurrent model?" in page
    True
    """
    view = View.of(comparison)
    charts = build_charts(view)
    question = escape(str(comparison.get("question") or f"Does {view.task} need a recurrent model?"))
    sections = [
        _results_section(view),
        *(_charts_section(heading, group) for heading, group in charts.items()),
        _rules_section(view),
        _configuration_section(view),
        _origin_section(view),
    ]
    return Template(files("unrecurrent").joinpath("report_template.html").read_text("utf-8")).substitute(
        policy=CONTENT_POLICY,
        title=question,
        question=question,
        verdict=_verdict(view),
        sections="\n".join(section for section in sections if section),
        light_colours=_colour_variables(LIGHT_COLOURS, len(view.models)),
        dark_colours=_colour_variables(DARK_COLOURS, len(view.models)),
        charts=_script_json([chart.drawing() for group in charts.values() for chart in group]),
        plotly=_plotly_script(),
    )


def save(comparison: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Write the report of a comparison to `path`; an older file stays whole until the new one is complete.

    Raises `InputError` where the folder is missing, the disk is full or the path cannot be written.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "report.html"
    >>> save({"task": "chorales", "rows": [{"model": "lstm", "mean": 8.4}]}, path)
    >>> path.read_text("utf-8").startswith("<!DOCTYPE html>")
    True
    """
    # A task may be named after a file whose name is not valid UTF-8.
    content = render(comparison).encode("utf-8", errors="replace")
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(content)


def terminal_table(comparison: Mapping[str, Any]) -> Table:
    """Return the rows of a comparison as a Rich table; the best value of a column is bold and has a star.

    It fits 120 columns, and 80 by folding long names.

    >>> table = terminal_table({"task": "chorales", "rows": [{"model": "lstm", "mean": 8.4}]})
    >>> table.row_count
    1
    """
    view = View.of(comparison)
    table = Table(
        title=Text(f"{view.task}: test {view.metric_title} ({view.better} is better)"),
        caption=Text(f"* best; k*: {view.k_star_meaning}, an estimate; tok: one {view.noun}"),
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("model", overflow="fold", min_width=8)
    for column in _TERMINAL_COLUMNS:
        heading = view.metric_name if column.key == "mean" else column.heading
        table.add_column(Text(heading), justify="right", no_wrap=True)
    best = {column.key: _best(view, column) for column in _TERMINAL_COLUMNS}
    for index, row in enumerate(view.rows):
        cells = [Text(model_of(row))]
        for column in _TERMINAL_COLUMNS:
            is_best = index in best[column.key]
            mark = "*" if is_best else ""
            cells.append(Text(mark + column.text(view, row), "bold green" if is_best else ""))
        table.add_row(*cells)
    return table


@dataclass(frozen=True)
class _Column:
    """One column of the table of results: which key it shows, how, and which value is the best."""

    key: str
    heading: str
    text: Callable[[View, Row], str]
    better: Literal["lower", "higher"] | None = None
    group: str = ""
    unit: str = ""
    kind: Kind | None = None


def _best(view: View, column: _Column) -> set[int]:
    """The rows that hold the best value of a column; none where there is nothing to choose from."""
    better = view.better if column.key == "mean" else column.better
    values = [as_number(row.get(column.key)) for row in view.rows]
    known = [value for value in values if value is not None]
    if better is None or len(known) < 2:
        return set()
    best = max(known) if better == "higher" else min(known)
    return {index for index, value in enumerate(values) if value == best}


def _score(_view: View, row: Row) -> str:
    mean, std = as_number(row.get("mean")), as_number(row.get("std"))
    if mean is None:
        return MISSING
    # Standard deviations over seeds are often a thousandth of the mean.
    decimals = max(decimals_of(mean), 3 if abs(mean) < 100 else 1)
    return f"{mean:,.{decimals}f}" + ("" if std is None else f" ± {std:,.{decimals}f}")


def _receptive_field(_view: View, row: Row) -> str:
    field = as_number(row.get("receptive_field"))
    if field is None:
        return "all" if row.get("recurrent") else MISSING
    return f"{field:,.0f}"


def _seeds(_view: View, row: Row) -> str:
    seeds = row.get("seeds")
    return str(len(seeds)) if isinstance(seeds, list | tuple) else count(seeds)


def _shown(key: str, show: Callable[[Any], str]) -> Callable[[View, Row], str]:
    return lambda _view, row: show(row.get(key))


_PAST, _SPEED, _SIZE = "Use of the past", "On this machine", "Size and training"
_COLUMNS = (
    _Column("mean", "", _score, group="Test"),
    _Column("k_star", "k*", View.k_star_range, group=_PAST, kind="estimate"),
    _Column("receptive_field", "receptive field", _receptive_field, group=_PAST),
    _Column("local_rate", "local rate", _shown("local_rate", four_digits), group=_PAST, kind="estimate"),
    _Column("certified_rate", "rate", _shown("certified_rate", four_digits), group=_PAST, kind="proved"),
    _Column("certified_horizon", "horizon", _shown("certified_horizon", count), group=_PAST, kind="proved"),
    _Column("train_tokens_per_s", "training", _shown("train_tokens_per_s", count), "higher", _SPEED, "tokens/s"),
    _Column("score_tokens_per_s", "scoring", _shown("score_tokens_per_s", count), "higher", _SPEED, "tokens/s"),
    _Column(
        "generate_steps_per_s",
        "generation",
        _shown("generate_steps_per_s", count),
        "higher",
        _SPEED,
        "steps/s",
    ),
    _Column("peak_memory_mib", "peak memory", _shown("peak_memory_mib", count), "lower", _SPEED, "MiB"),
    _Column("params", "parameters", _shown("params", count), group=_SIZE),
    _Column("hidden_size", "hidden size", _shown("hidden_size", count), group=_SIZE),
    _Column("seeds", "seeds", _seeds, group=_SIZE),
    _Column("epochs", "epochs", _shown("epochs", count), group=_SIZE),
    _Column("minutes", "minutes", _shown("minutes", count), group=_SIZE),
)
# Shown only where at least one model has a value.
_RARE = {"seeds", "local_rate", "certified_rate", "certified_horizon", "hidden_size", "epochs", "minutes"}

_TERMINAL_COLUMNS = (
    _Column("mean", "", _score),
    _Column("params", "params", _shown("params", compact)),
    _Column("train_tokens_per_s", "train\ntok/s", _shown("train_tokens_per_s", compact), "higher"),
    _Column("score_tokens_per_s", "score\ntok/s", _shown("score_tokens_per_s", compact), "higher"),
    _Column("generate_steps_per_s", "gen.\nsteps/s", _shown("generate_steps_per_s", compact), "higher"),
    _Column("peak_memory_mib", "peak\nMiB", _shown("peak_memory_mib", compact), "lower"),
    _Column("k_star", "k*", View.k_star_text),
    _Column("receptive_field", "recept.\nfield", _receptive_field),
)


def _verdict(view: View) -> str:
    """The verdict up to its first full stop or colon in large type, the reasons below it."""
    verdict = view.comparison.get("verdict") or {}
    answer, text = str(verdict.get("answer") or ""), str(verdict.get("text") or "")
    headline, reasons = text, ""
    if found := re.match(r"(.*?[.:])\s+(.*)", text, re.DOTALL):
        headline, reasons = found.groups()
    if not headline.lower().startswith(answer.lower()):
        headline, reasons = f"{answer.capitalize()}.", text
    parts = [f'<p class="answer" id="verdict">{escape(headline or "No verdict.")}</p>']
    if reasons:
        parts.append(f'<p class="why">{escape(reasons)}</p>')
    return "\n".join(parts)


def _results_section(view: View) -> str:
    columns = [
        column
        for column in _COLUMNS
        if column.key not in _RARE or any(column.text(view, row) != MISSING for row in view.rows)
    ]
    best = {column.key: _best(view, column) for column in columns}
    body = []
    for index, row in enumerate(view.rows):
        cells = "".join(_cell(column.text(view, row), index in best[column.key]) for column in columns)
        body.append(f"<tr>{model_heading(view, model_of(row))}{cells}</tr>")
    table = (
        f"<table><thead>{_group_headings(columns)}<tr>"
        + "".join(_column_heading(view, column) for column in columns)
        + f"</tr></thead><tbody>{''.join(body)}</tbody></table>"
    )
    note = (
        f"One token is one {view.noun}. k*: {view.k_star_meaning}. Receptive field: the {view.noun}s an "
        "output can depend on by construction; a recurrent model can depend on all of them. Shaded: the best "
        "value."
    )
    kinds = f" {badge('estimate')} was measured on this task's data and proves nothing beyond it."
    if any(column.kind == "proved" for column in columns):
        kinds += f" {badge('proved')} holds for every input the certificate covers."
    return f'<section><h2>Results</h2>{scrollable("Results", table)}<p class="note">{escape(note)}{kinds}</p></section>'


def _group_headings(columns: Sequence[_Column]) -> str:
    cells = ['<th class="stick" scope="col" rowspan="2">model</th>']
    groups = dict.fromkeys(column.group for column in columns)
    for group in groups:
        span = sum(column.group == group for column in columns)
        cells.append(f'<th scope="colgroup" colspan="{span}">{escape(group)}</th>')
    return f"<tr>{''.join(cells)}</tr>"


def _column_heading(view: View, column: _Column) -> str:
    heading, unit = column.heading, column.unit
    if column.key == "mean":
        heading, unit = view.metric_name, str(view.metric.get("unit") or "")
    note = badge(column.kind) if column.kind else f'<span class="unit">{escape(unit)}</span>' if unit else ""
    return f'<th scope="col">{escape(heading)} {note}</th>'


def _cell(text: str, is_best: bool) -> str:
    if is_best:
        return f'<td class="best">{escape(text)}<span class="unseen"> (best)</span></td>'
    return f"<td>{escape(text)}</td>"


def _rules_section(view: View) -> str:
    rules = (view.comparison.get("verdict") or {}).get("rules") or []
    if not rules:
        return ""
    items = "".join(f"<li>{escape(plain(rule))}</li>" for rule in rules)
    return f"<section><h2>The rules behind the verdict</h2><ol>{items}</ol></section>"


def _configuration_section(view: View) -> str:
    configuration = view.comparison.get("configuration") or {}
    budget = view.comparison.get("budget") or {}
    parts = []
    if budget:
        parts.append(f"<h3>Budget, the same for every model</h3>{_definitions(budget)}")
    if configuration:
        parts.append(scrollable("Configuration", _configuration_table(view, configuration)))
    return f"<section><h2>Configuration</h2>{''.join(parts)}</section>" if parts else ""


def _configuration_table(view: View, configuration: Mapping[str, Any]) -> str:
    models = list(configuration)
    settings = {model: configuration[model] or {} for model in models}
    heads = "".join(f'<th scope="col">{escape(str(model))}</th>' for model in models)
    body = []
    for key in dict.fromkeys(key for setting in settings.values() for key in setting):
        values = [plain(settings[model].get(key)) for model in models]
        if len(models) > 1 and len(set(values)) == 1:
            cells = f'<td class="same" colspan="{len(models)}">all models: {escape(values[0])}</td>'
        else:
            cells = "".join(f"<td>{escape(value)}</td>" for value in values)
        body.append(f'<tr><th class="stick" scope="row">{escape(str(key))}</th>{cells}</tr>')
    return (
        f'<table class="plain"><thead><tr><th class="stick" scope="col">setting</th>{heads}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def _definitions(values: Mapping[str, Any]) -> str:
    items = "".join(
        f"<dt>{escape(str(key).replace('_', ' '))}</dt><dd>{escape(plain(value))}</dd>" for key, value in values.items()
    )
    return f"<dl>{items}</dl>"


def _origin_section(view: View) -> str:
    comparison = view.comparison
    facts = {
        **{key: comparison[key] for key in ("created", "commit") if comparison.get(key)},
        **(comparison.get("machine") or {}),
        **(comparison.get("versions") or {}),
    }
    command = comparison.get("command")
    shown = f"<p>The exact command:</p><pre><code>{escape(str(command))}</code></pre>" if command else ""
    if not shown and not facts:
        return ""
    return f"<section><h2>How to repeat this</h2>{shown}{_definitions(facts) if facts else ''}</section>"


def _charts_section(heading: str, charts: Sequence[Chart]) -> str:
    figures = "".join(chart.figure() for chart in charts)
    return f'<section><h2>{escape(heading)}</h2><div class="charts">{figures}</div></section>'


def _colour_variables(colours: Sequence[str], count: int) -> str:
    lines = []
    for index in range(count):
        colour = colours[index % len(colours)]
        lines.append(f"  --m{index}: {colour}; --m{index}-band: {colour}24;")
    return "\n".join(lines)


def _script_json(value: Any) -> str:
    """JSON that may stand inside a script element: no `<` can end or nest it."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _plotly_script() -> str:
    # Imported here because the command line needs it for nothing else and it takes a moment.
    from plotly.offline import get_plotlyjs

    script: str = get_plotlyjs()
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")

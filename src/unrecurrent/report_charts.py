"""The charts of the report: for each, what plotly.js draws and the words and numbers that stand beside it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from unrecurrent.report_view import (
    MISSING,
    Kind,
    Row,
    View,
    as_number,
    as_numbers,
    badge,
    count,
    four_digits,
    model_heading,
    model_of,
    plain,
    scrollable,
)


@dataclass(frozen=True)
class Chart:
    """One drawing: what plotly.js draws, and the words that stand for it where it cannot be seen."""

    id: str
    heading: str
    caption: str
    description: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    height: int
    numbers: str = ""

    def drawing(self) -> dict[str, Any]:
        return {"id": self.id, "data": self.data, "layout": self.layout}

    def figure(self) -> str:
        heading = f"<h3>{escape(self.heading)}</h3>" if self.heading else ""
        numbers = f"<details><summary>The numbers</summary>{self.numbers}</details>" if self.numbers else ""
        return (
            f'<figure>{heading}<div class="chart" id="{self.id}" role="img" style="height:{self.height}px" '
            f'aria-label="{escape(self.description)}"></div>'
            f"<figcaption>{self.caption}</figcaption>{numbers}</figure>"
        )


def build_charts(view: View) -> dict[str, list[Chart]]:
    """The charts there is something to draw for, by the heading of their section."""
    groups = {
        "How much of the past each model uses": [_truncation_chart(view)],
        "How training went": [_training_chart(view)],
        "Speed and memory on this machine": [_bar_chart(view, *bars) for bars in _BARS],
        "What is proved beside what is measured": [_certificate_chart(view)],
    }
    drawn = {heading: [chart for chart in charts if chart] for heading, charts in groups.items()}
    return {heading: charts for heading, charts in drawn.items() if charts}


def _axis(title: str, **settings: Any) -> dict[str, Any]:
    return {
        "title": {"text": escape(title), "standoff": 8},
        "gridcolor": "var(--line)",
        "zerolinecolor": "var(--line)",
        "linecolor": "var(--line)",
        "automargin": True,
        **settings,
    }


def _layout(xaxis: dict[str, Any], yaxis: dict[str, Any], **settings: Any) -> dict[str, Any]:
    return {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "var(--ink)", "family": "system-ui, sans-serif", "size": 13},
        "margin": {"l": 50, "r": 16, "t": 10, "b": 44},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "hoverlabel": {
            "bgcolor": "var(--panel)",
            "bordercolor": "var(--line)",
            "font": {"color": "var(--ink)"},
        },
        "xaxis": xaxis,
        "yaxis": yaxis,
        **settings,
    }


def _loss_title(view: View) -> str:
    unit = view.metric.get("unit")
    return f"loss, {unit}" if unit and view.better == "lower" else "loss"


def _cropped(values: Sequence[float], share: float, steepness: float) -> dict[str, Any]:
    """The range of a loss axis on which a few huge values would flatten all the others; else nothing.

    The range then ends a little above the `share` of the values that come lowest, if the highest value is more
    than `steepness` times as far up.
    """
    ranked = sorted(values)
    lowest, usual, highest = ranked[0], ranked[int(share * (len(ranked) - 1))], ranked[-1]
    if not highest - lowest > steepness * (usual - lowest) > 0:
        return {}
    top = usual + 0.4 * (usual - lowest)
    return {"range": [lowest - 0.05 * (top - lowest), top]}


# --- the truncation curve


def _truncation_chart(view: View) -> Chart | None:
    points = {model: _curve_points(entry) for model, entry in view.memory.items()}
    points = {model: curve for model, curve in points.items() if curve}
    if not points:
        return None
    ks = sorted({k for curve in points.values() for k, *_ in curve})
    bands = [trace for model, curve in points.items() for trace in _band(view, model, curve)]
    lines = [trace for model, curve in points.items() for trace in _curve(view, model, curve, ks)]
    ticks = _spread(ks)
    positions = {entry.get("positions") for entry in view.memory.values()} - {None}
    sample = f" on {count(positions.pop())} sampled positions" if len(positions) == 1 else ""
    caption = (
        f"Loss{sample} when each prediction sees only the last k {view.noun}s; the band is its bootstrap "
        f"range. Dashed: the loss with the whole past. Star: k*, {view.k_star_meaning}. "
        "Click a name to hide it, double-click to see it alone."
    )
    limits = _cropped([value for trace in bands + lines for value in trace["y"]], share=0.75, steepness=5)
    if limits:
        caption += " The shortest windows leave the chart at the top; double-click it to see them."
    return Chart(
        id="chart-truncation",
        heading="",
        caption=f"{badge('estimate')} {escape(caption)}",
        description=_truncation_description(view, points),
        data=bands + lines,
        layout=_layout(
            _axis(
                f"last k {view.noun}s seen",
                type="log",
                tickvals=ticks,
                ticktext=[f"{k:g}" for k in ticks],
                tickangle=0,
            ),
            _axis(_loss_title(view), **limits),
            hovermode="closest",
        ),
        height=480,
        numbers=_truncation_numbers(view, points, ks),
    )


def _spread(ks: Sequence[float]) -> list[float]:
    """The values of k to print below the axis: far enough apart on a phone."""
    ratio = max(1.7, (ks[-1] / ks[0]) ** 0.1)
    kept = [ks[0]]
    for k in ks[1:]:
        if k / kept[-1] >= ratio:
            kept.append(k)
    return kept


Point = tuple[float, float, float | None, float | None]


def _curve_points(entry: Mapping[str, Any]) -> list[Point]:
    """The measured (k, mean, low, high) of one model, without those whose k or mean is missing."""
    ks, means = as_numbers(entry.get("ks")), as_numbers(entry.get("mean"))
    lows = as_numbers(entry.get("low")) or [None] * len(ks)
    highs = as_numbers(entry.get("high")) or [None] * len(ks)
    return [
        (k, mean, low, high)
        for k, mean, low, high in zip(ks, means, lows, highs, strict=False)
        if k is not None and k > 0 and mean is not None
    ]


def _band(view: View, model: str, curve: Sequence[Point]) -> list[dict[str, Any]]:
    edges = [(k, low, high) for k, _, low, high in curve if low is not None and high is not None]
    if len(edges) < 2:
        return []
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [k for k, *_ in edges] + [k for k, *_ in reversed(edges)],
            "y": [low for _, low, _ in edges] + [high for *_, high in reversed(edges)],
            "fill": "toself",
            "fillcolor": view.band(model),
            "line": {"width": 0},
            "hoverinfo": "skip",
            "showlegend": False,
            "legendgroup": escape(model),
        }
    ]


def _curve(view: View, model: str, curve: Sequence[Point], ks: Sequence[float]) -> list[dict[str, Any]]:
    entry, name, colour = view.memory[model], escape(model), view.colour(model)
    row = next((row for row in view.rows if model_of(row) == model), {"model": model})
    k_star, full = view.k_star(row), as_number(entry.get("full"))
    common = {"type": "scatter", "legendgroup": name, "name": name}
    traces: list[dict[str, Any]] = [
        {
            **common,
            "mode": "lines+markers",
            "name": f"{name}, k* {escape(view.k_star_text(row))}",
            "x": [k for k, *_ in curve],
            "y": [mean for _, mean, *_ in curve],
            "line": {"color": colour, "width": 2},
            "marker": {"color": colour, "size": 7, "symbol": view.symbol(model)},
            "hovertemplate": f"last %{{x}}: %{{y:.5~g}}<extra>{name}</extra>",
        }
    ]
    if full is not None:
        traces.append(
            {
                **common,
                "mode": "lines",
                "showlegend": False,
                "x": [ks[0], ks[-1]],
                "y": [full, full],
                "line": {"color": colour, "width": 1.2, "dash": "dash"},
                "opacity": 0.7,
                "hovertemplate": f"whole past: %{{y:.5~g}}<extra>{name}</extra>",
            }
        )
    at_k_star = next((mean for k, mean, *_ in curve if k == k_star), None)
    if at_k_star is not None:
        traces.append(
            {
                **common,
                "mode": "markers",
                "showlegend": False,
                "x": [k_star],
                "y": [at_k_star],
                "marker": {
                    "symbol": "star",
                    "size": 17,
                    "color": colour,
                    "line": {"width": 1.5, "color": "var(--edge)"},
                },
                "hovertemplate": f"k* {escape(view.k_star_range(row))}: %{{y:.5~g}}<extra>{name}</extra>",
            }
        )
    return traces


def _truncation_description(view: View, points: Mapping[str, Sequence[Point]]) -> str:
    sentences = [f"Line chart of the loss against the number of {view.noun}s seen."]
    for model, curve in points.items():
        (first, start, *_), (last, end, *_) = curve[0], curve[-1]
        row = next((row for row in view.rows if model_of(row) == model), {"model": model})
        sentences.append(
            f"{model}: {four_digits(start)} at {first:g}, {four_digits(end)} at {last:g}, "
            f"{four_digits(view.memory[model].get('full'))} with the whole past; "
            f"k* {view.k_star_range(row)}."
        )
    return " ".join(sentences)


def _truncation_numbers(view: View, points: Mapping[str, Sequence[Point]], ks: Sequence[float]) -> str:
    heads = "".join(f'<th scope="col">{k:g}</th>' for k in ks)
    body = []
    for model, curve in points.items():
        means = {k: mean for k, mean, *_ in curve}
        cells = "".join(f"<td>{four_digits(means.get(k))}</td>" for k in ks)
        full = four_digits(view.memory[model].get("full"))
        body.append(f"<tr>{model_heading(view, model)}{cells}<td>{full}</td></tr>")
    return scrollable(
        "Loss by number of inputs seen",
        f'<table><thead><tr><th class="stick" scope="col">k</th>{heads}<th scope="col">all</th></tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>",
    )


# --- the loss curves


def _training_chart(view: View) -> Chart | None:
    runs = [
        (model, run, kind) for model, seeds in view.training.items() for run in seeds for kind in ("train", "valid")
    ]
    named: set[str] = set()
    traces = []
    for model, run, kind in runs:
        trace = _loss_trace(view, model, run, kind)
        if trace:
            traces.append({**trace, "showlegend": model not in named and kind == "valid"})
            named |= {model} if kind == "valid" else set()
    if not traces:
        return None
    limits = _cropped([value for trace in traces for value in trace["y"]], share=0.9, steepness=3)
    caption = "Solid: validation. Dashed: training. One thin line a seed."
    if any("markers" in trace["mode"] for trace in traces):
        caption += " Open marks: training."
    if limits:
        caption += " The first epochs leave the chart at the top; double-click it to see them."
    return Chart(
        id="chart-training",
        heading="",
        caption=escape(caption),
        description=_training_description(view),
        data=traces,
        layout=_layout(_axis("epoch", dtick=_whole_tick(traces)), _axis(_loss_title(view), **limits)),
        height=440,
    )


def _loss_trace(view: View, model: str, run: Mapping[str, Any], kind: str) -> dict[str, Any] | None:
    known = _losses(run, kind)
    if not known:
        return None
    name, word = escape(model), "validation" if kind == "valid" else "training"
    seed = escape(plain(run.get("seed")))
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(known) < 3 else "lines",
        "x": [epoch for epoch, _ in known],
        "y": [loss for _, loss in known],
        "name": name,
        "legendgroup": name,
        "line": {
            "color": view.colour(model),
            "width": 1.6 if kind == "valid" else 1.1,
            "dash": "solid" if kind == "valid" else "dash",
        },
        "marker": {
            "color": view.colour(model),
            "symbol": view.symbol(model) + ("" if kind == "valid" else "-open"),
            "size": 7,
        },
        "hovertemplate": f"epoch %{{x}}, {word}: %{{y:.5~g}}<extra>{name}, seed {seed}</extra>",
    }


def _losses(run: Mapping[str, Any], kind: str) -> list[tuple[float, float]]:
    """The known (epoch, loss) of a training run."""
    epochs = [epoch for epoch in run.get("epochs") or [] if epoch]
    points = [(as_number(epoch.get("epoch")), as_number(epoch.get(f"{kind}_loss"))) for epoch in epochs]
    return [(epoch, loss) for epoch, loss in points if epoch is not None and loss is not None]


def _whole_tick(traces: Sequence[Mapping[str, Any]]) -> int:
    """Epochs are whole numbers: the smallest round step that gives at most eight ticks."""
    last = max(epoch for trace in traces for epoch in trace["x"])
    return next((step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500) if last / step <= 8), 1000)


def _training_description(view: View) -> str:
    sentences = ["Line chart of training and validation loss by epoch."]
    for model, runs in view.training.items():
        losses = [loss for run in runs for _, loss in _losses(run, "valid")]
        if losses:
            sentences.append(f"{model}: best validation loss {four_digits(min(losses))}.")
    return " ".join(sentences)


# --- the bars

_BARS = (
    ("train_tokens_per_s", "Training", "tokens a second", "More is better."),
    ("score_tokens_per_s", "Scoring", "tokens a second", "Whole sequences at once. More is better."),
    ("generate_steps_per_s", "Generation", "steps a second", "One step after another. More is better."),
    ("peak_memory_mib", "Peak memory", "MiB", "Less is better."),
)


def _bar_chart(view: View, key: str, heading: str, unit: str, caption: str) -> Chart | None:
    values = {model_of(row): as_number(row.get(key)) for row in view.rows}
    known = [value for value in values.values() if value is not None]
    if not known:
        return None
    trace = {
        "type": "bar",
        "orientation": "h",
        "y": [escape(label) for label in values],
        "x": [value or 0 for value in values.values()],
        "text": [count(value) for value in values.values()],
        "textposition": "outside",
        "cliponaxis": False,
        "marker": {"color": [view.colour(model_of(row)) for row in view.rows]},
        "hovertemplate": f"%{{y}}: %{{text}} {unit}<extra></extra>",
    }
    # Room for the number at the end of the longest bar.
    longest = 1.5 * max(*known, 1e-9)
    return Chart(
        id=f"chart-{key.replace('_', '-')}",
        heading=f"{heading}, {unit}",
        caption=escape(caption),
        description=f"Bar chart of {heading.lower()}, {unit}: "
        + "; ".join(f"{label} {count(value)}" for label, value in values.items()),
        data=[trace],
        layout=_layout(
            _axis("", range=[0, longest], showticklabels=False, showgrid=False, zeroline=True),
            _axis("", autorange="reversed", showgrid=False, type="category"),
            margin={"l": 10, "r": 4, "t": 4, "b": 10},
            bargap=0.3,
            showlegend=False,
        ),
        height=34 * len(values) + 30,
    )


# --- the certificate beside the measurement


def _certificate_chart(view: View) -> Chart | None:
    rows = [row for row in view.rows if (as_number(row.get("certified_horizon")) or 0) > 0]
    if not rows:
        return None
    traces: list[dict[str, Any]] = []
    for row in rows:
        ends = [view.k_star(row), as_number(row.get("certified_horizon"))]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": [end for end in ends if end is not None],
                "y": [escape(model_of(row))] * sum(end is not None for end in ends),
                "line": {"color": view.colour(model_of(row)), "width": 3},
                "hoverinfo": "skip",
                "showlegend": False,
            }
        )
    traces += [_certificate_marks(view, rows, "estimate"), _certificate_marks(view, rows, "proved")]
    caption = (
        "Open circle: k*, measured in the loss on this task's data. Filled diamond: the certified horizon, "
        "where leaving out all older inputs changes the hidden state by at most 0.01, for every input the "
        "certificate covers. They answer different questions: the ratio says how cautious the proof is."
    )
    return Chart(
        id="chart-certificate",
        heading="",
        caption=escape(caption),
        description="Certified horizon beside measured k*: "
        + "; ".join(
            f"{model_of(row)} proved {count(row.get('certified_horizon'))}, "
            f"estimate {view.k_star_text(row)}, ratio {_ratio(view, row)}"
            for row in rows
        ),
        data=traces,
        layout=_layout(
            _log_axis(f"{view.noun}s", [end for trace in traces for end in trace["x"] if end > 0]),
            _axis("", autorange="reversed", type="category", showgrid=False),
            margin={"l": 10, "r": 10, "t": 10, "b": 44},
        ),
        height=48 * len(rows) + 130,
        numbers=_certificate_numbers(view, rows),
    )


def _certificate_marks(view: View, rows: Sequence[Row], kind: Kind) -> dict[str, Any]:
    proved = kind == "proved"
    values = [as_number(row.get("certified_horizon")) if proved else view.k_star(row) for row in rows]
    kept = [(row, value) for row, value in zip(rows, values, strict=True) if value is not None]
    colours = [view.colour(model_of(row)) for row, _ in kept]
    return {
        "type": "scatter",
        "mode": "markers+text" if proved else "markers",
        "name": "certified horizon (proved)" if proved else "k* (estimate)",
        "x": [value for _, value in kept],
        "y": [escape(model_of(row)) for row, _ in kept],
        "text": [f"  ratio {_ratio(view, row)}" if proved else "" for row, _ in kept],
        "textposition": "top center",
        "marker": {
            "symbol": "diamond" if proved else "circle-open",
            "size": 14 if proved else 12,
            "color": colours,
            "line": {"width": 0 if proved else 3, "color": colours},
        },
        "hovertemplate": f"%{{y}}: %{{x}}<extra>{kind}</extra>",
    }


def _log_axis(title: str, values: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis around the values, with ticks at 1, 2, 5 (or 1) times the powers of ten."""
    low, high = math.log10(min(values)) - 0.3, math.log10(max(values)) + 0.4
    steps = (1, 2, 5) if high - low < 2.5 else (1,)
    powers = range(math.floor(low), math.ceil(high) + 1)
    ticks = [step * 10.0**power for power in powers for step in steps]
    return _axis(title, type="log", range=[low, high], tickvals=ticks, ticktext=[f"{tick:,.10g}" for tick in ticks])


def _ratio(view: View, row: Row) -> str:
    horizon, k = as_number(row.get("certified_horizon")), view.k_star(row)
    return MISSING if horizon is None or not k else f"{horizon / k:,.3g}"


def _certificate_numbers(view: View, rows: Sequence[Row]) -> str:
    body = "".join(
        f"<tr>{model_heading(view, model_of(row))}<td>{four_digits(row.get('certified_rate'))}</td>"
        f"<td>{count(row.get('certified_horizon'))}</td><td>{four_digits(row.get('local_rate'))}</td>"
        f"<td>{escape(view.k_star_range(row))}</td><td>{_ratio(view, row)}</td></tr>"
        for row in rows
    )
    kinds: tuple[tuple[str, Kind], ...] = (
        ("rate", "proved"),
        ("horizon", "proved"),
        ("local rate", "estimate"),
        ("k*", "estimate"),
    )
    heads = "".join(f'<th scope="col">{heading} {badge(kind)}</th>' for heading, kind in kinds)
    return scrollable(
        "Certificates beside measurements",
        f'<table><thead><tr><th class="stick" scope="col">model</th>{heads}'
        '<th scope="col">horizon / k*</th></tr></thead>'
        f"<tbody>{body}</tbody></table>",
    )

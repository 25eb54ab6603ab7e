"""A memory profile as a figure and as HTML: four charts, the numbers in words, and what is proved beside them."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from unrecurrent.bands import Decay
from unrecurrent.files import write_text

if TYPE_CHECKING:
    from unrecurrent.layer_memory import LayerMemory
    from unrecurrent.memory import MemoryProfile

#: colours that people with a colour-vision deficiency tell apart (Okabe and Ito)
BLUE, ORANGE, GREEN, GREY, PINK = "#0072B2", "#D55E00", "#009E73", "#666666", "#CC79A7"
LAYER_COLOURS = (ORANGE, GREEN, PINK, BLUE)
#: values below this share of the largest are left out of a logarithmic chart
SMALLEST = 1e-16
TITLES = (
    "{loss} when only the last k inputs are seen",
    "Gradient of the {goal} by inputs j steps back",
    "Distance between states that started apart",
    "Lyapunov exponents, a step",
)


def figure(profile: "MemoryProfile") -> go.Figure:
    """The truncation curve, the decay of gradients, the forgetting curves and the spectra."""
    loss, goal = ("Loss", "loss") if profile.scale is None else ("Change of the outputs", "outputs")
    titles = [title.format(loss=loss, goal=goal) for title in TITLES]
    chart = make_subplots(2, 2, subplot_titles=titles, horizontal_spacing=0.11, vertical_spacing=0.16)
    _truncation(chart, profile)
    if profile.gradient_decay is not None:
        _decay(chart, 1, 2, profile.gradient_decay, BLUE, "gradient")
    else:
        _absent(chart, 1, 2, "not measured")
    for number, layer in enumerate(profile.layers):
        colour = LAYER_COLOURS[number % len(LAYER_COLOURS)]
        _decay(chart, 2, 1, layer.forgetting, colour, layer.name or "the model")
        _spectrum(chart, layer, colour)
    if not profile.layers:
        _absent(chart, 2, 1, "no recurrent layer")
        _absent(chart, 2, 2, "no recurrent layer")
    _name_axes(chart, goal)
    if profile.layers:
        chart.update_yaxes(_at_least_a_decade([layer.forgetting for layer in profile.layers]), row=2, col=1)
    chart.update_layout(
        template="plotly_white",
        height=760,
        margin={"l": 70, "r": 20, "t": 60, "b": 60},
        showlegend=len(profile.layers) > 1,
        legend={"orientation": "h", "y": -0.1},
        font={"family": "system-ui, sans-serif", "size": 13},
    )
    return chart


def _name_axes(chart: go.Figure, goal: str) -> None:
    whole = {"dtick": 1, "minor": {"showgrid": False}}
    chart.update_xaxes(title_text="inputs seen, k", type="log", **_octaves(), row=1, col=1)
    chart.update_yaxes(title_text="mean loss" if goal == "loss" else "mean square", row=1, col=1)
    chart.update_xaxes(title_text="steps back, j", row=1, col=2)
    chart.update_yaxes(title_text=f"‖∂ {goal} / ∂ x‖", type="log", exponentformat="power", row=1, col=2, **whole)
    chart.update_xaxes(title_text="steps after the start", type="log", **_octaves(), row=2, col=1)
    chart.update_yaxes(title_text="largest |Δh|", type="log", exponentformat="power", row=2, col=1)
    chart.update_xaxes(title_text="number", row=2, col=2)
    chart.update_yaxes(title_text="log growth", row=2, col=2)


def _octaves() -> dict[str, Any]:
    powers = [4**n for n in range(9)]
    return {"tickvals": powers, "ticktext": [f"{power:,}" for power in powers]}


def _line(chart: go.Figure, row: int, col: int, x: Any, y: Any, colour: str, name: str, **line: Any) -> None:
    chart.add_trace(
        go.Scatter(
            x=x, y=y, mode="lines", name=name, legendgroup=name, showlegend=False, line={"color": colour, **line}
        ),
        row=row,
        col=col,
    )


def _band(chart: go.Figure, row: int, col: int, x: Any, low: Any, high: Any, colour: str) -> None:
    x, low, high = list(x), list(low), list(high)
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    chart.add_trace(
        go.Scatter(
            x=x + x[::-1],
            y=high + low[::-1],
            mode="lines",
            fill="toself",
            fillcolor=f"rgba({red},{green},{blue},0.2)",
            line={"width": 0},
            hoverinfo="skip",
            showlegend=False,
        ),
        row=row,
        col=col,
    )


def _truncation(chart: go.Figure, profile: "MemoryProfile") -> None:
    ks, mean, low, high = zip(*profile.curve, strict=True)
    _band(chart, 1, 1, ks, low, high, BLUE)
    _line(chart, 1, 1, ks, mean, BLUE, "truncation")
    _line(chart, 1, 1, [ks[0], ks[-1]], [profile.full] * 2, GREY, "the whole past", dash="dash", width=1)
    found = profile.k()
    if found is not None:
        place = {"x": [found], "y": [mean[ks.index(found)]], "text": [f"k* = {found:,}"]}
        star = {"symbol": "star", "size": 14, "color": BLUE}
        trace = go.Scatter(**place, mode="markers+text", marker=star, textposition="top center", showlegend=False)
        chart.add_trace(trace, row=1, col=1)


def _decay(chart: go.Figure, row: int, col: int, decay: Decay, colour: str, name: str) -> None:
    """The mean as a line in its bootstrap band, the worst dotted; zeros leave a logarithmic chart."""
    lags, worst, mean = np.array(decay.lags), decay.worst, decay.mean
    shown = worst > SMALLEST * max(worst.max(), 1e-300)
    low, high = decay.band
    if not shown.any():
        _absent(chart, row, col, "zero at every lag")
        return
    banded = shown & (low > 0)
    if banded.any():
        _band(chart, row, col, lags[banded], low[banded], high[banded], colour)
    _line(chart, row, col, lags[shown], mean[shown], colour, f"{name}, mean")
    _line(chart, row, col, lags[shown], worst[shown], colour, f"{name}, worst", dash="dot", width=1)


def _at_least_a_decade(decays: Sequence[Decay]) -> dict[str, Any]:
    """The range of a logarithmic axis that does not blow up a curve which hardly falls."""
    top = 2 * max(float(decay.worst.max()) for decay in decays)
    values = np.concatenate([decay.mean[decay.mean > SMALLEST * top] for decay in decays])
    bottom = min(float(values.min()) / 2 if len(values) else top, top / 20)
    return {"range": [np.log10(bottom), np.log10(top)]} if bottom > 0 else {}


def _spectrum(chart: go.Figure, layer: "LayerMemory", colour: str) -> None:
    rows = [(n, *row) for n, row in enumerate(layer.lyapunov, 1) if np.isfinite(row[0])]
    if not rows:
        _absent(chart, 2, 2, "no finite exponent" if layer.lyapunov else "not measured")
        return
    number, mean, low, high = (np.array(column) for column in zip(*rows, strict=True))
    bars = {"type": "data", "symmetric": False, "array": high - mean, "arrayminus": mean - low}
    trace = go.Scatter(
        x=number, y=mean, mode="markers", error_y=bars, marker={"color": colour}, name=layer.name or "the model"
    )
    chart.add_trace(trace, row=2, col=2)
    chart.add_hline(0, line={"color": GREY, "width": 1, "dash": "dash"}, row=2, col=2)


def _absent(chart: go.Figure, row: int, col: int, words: str) -> None:
    chart.add_annotation(text=words, x=0.5, y=0.5, xref="x domain", yref="y domain", showarrow=False, row=row, col=col)


def section(profile: "MemoryProfile", title: str) -> str:
    """HTML with the verdict, the numbers and the charts; plotly.js is expected on the page."""
    drawing = figure(profile).to_html(full_html=False, include_plotlyjs=False)
    return (
        f'<section class="memory"><h2>{escape(title)}</h2>'
        f"<p><strong>{escape(_sentence(profile.verdict()))}</strong></p>{drawing}"
        "<p>All of this is an estimate from data unless it says “proved”. Lines: means. Dotted: the worst"
        " sample. Shaded: 95 % bootstrap band of the mean; bars: 95 % over blocks of time.</p>"
        f"<details><summary>The numbers</summary><pre>{escape(repr(profile))}</pre></details></section>"
    )


def _sentence(words: str) -> str:
    return words[:1].upper() + words[1:] + "."


def page(profiles: Mapping[str, "MemoryProfile"], path: Path, title: str) -> None:
    """Write the sections of some profiles as a page of its own with plotly.js inside."""
    from plotly.offline import get_plotlyjs

    heading = f"<h1>{escape(title)}</h1>" if len(profiles) > 1 else ""
    sections = "".join(section(profile, name) for name, profile in profiles.items())
    write_text(
        path,
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><script>{get_plotlyjs()}</script>"
        "<style>body{font-family:system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}"
        "pre{overflow-x:auto}</style></head>"
        f"<body>{heading}{sections}</body></html>\n",
    )

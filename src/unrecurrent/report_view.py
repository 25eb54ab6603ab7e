"""What the report reads: a comparison with its gaps filled in, and how its numbers are written."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

from unrecurrent.errors import InputError

Row = Mapping[str, Any]
Kind = Literal["proved", "estimate"]

MISSING = "–"

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "triangle-down", "pentagon", "hexagon")


def as_number(value: Any) -> float | None:
    """The value as a finite number, or None where it is missing."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def as_numbers(values: Any) -> list[float | None]:
    return [as_number(value) for value in values] if isinstance(values, list | tuple) else []


def decimals_of(value: float) -> int:
    """The decimals that show four significant digits."""
    return 3 if value == 0 else min(8, max(0, 3 - math.floor(math.log10(abs(value)))))


def four_digits(value: Any) -> str:
    number = as_number(value)
    return MISSING if number is None else f"{number:,.{decimals_of(number)}f}"


def count(value: Any) -> str:
    number = as_number(value)
    if number is None:
        return MISSING
    return f"{number:,.0f}" if number == round(number) or abs(number) >= 100 else f"{number:,.3g}"


def compact(value: Any) -> str:
    """A number in at most five characters: 843, 12.3k, 1.23M."""
    number = as_number(value)
    if number is None:
        return MISSING
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * unit:
            return f"{number / unit:#.3g}".rstrip(".") + suffix
    return f"{number:.3g}"


def plain(value: Any) -> str:
    """A configuration value in words."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value) or MISSING
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {plain(item)}" for key, item in value.items()) or MISSING
    return str(value)


@dataclass(frozen=True)
class View:
    """A comparison with its optional parts filled in, and the words used for it everywhere."""

    task: str
    noun: str
    metric: Mapping[str, Any]
    rows: Sequence[Row]
    models: tuple[str, ...]
    training: Mapping[str, Sequence[Mapping[str, Any]]]
    memory: Mapping[str, Any]
    comparison: Mapping[str, Any]

    @classmethod
    def of(cls, comparison: Mapping[str, Any]) -> "View":
        for key in ("task", "rows"):
            if not comparison.get(key):
                raise InputError(f"this comparison has no {key}: give what Comparison.to_dict() returns")
        rows = [row for row in comparison["rows"] if row]
        training, memory = comparison.get("training") or {}, comparison.get("memory") or {}
        models = dict.fromkeys([*map(model_of, rows), *training, *memory])
        return cls(
            task=str(comparison["task"]),
            noun=str(comparison.get("step_noun") or "step"),
            metric=comparison.get("metric") or {},
            rows=rows,
            models=tuple(models),
            training={model: [run for run in runs or [] if run] for model, runs in training.items()},
            memory={model: entry for model, entry in memory.items() if entry},
            comparison=comparison,
        )

    @property
    def metric_name(self) -> str:
        return str(self.metric.get("name") or "score")

    @property
    def metric_title(self) -> str:
        unit = self.metric.get("unit")
        return f"{self.metric_name}, {unit}" if unit else self.metric_name

    @property
    def better(self) -> str:
        return "higher" if self.metric.get("direction") == "higher" else "lower"

    @property
    def k_star_meaning(self) -> str:
        deltas = [entry.get("delta") for entry in self.memory.values()]
        delta = next((delta for delta in map(as_number, deltas) if delta is not None), 0.01)
        within = f"{100 * delta:g} %"
        return f"the last {self.noun}s that bring the loss within {within} of the full past's"

    def colour(self, model: str) -> str:
        return f"var(--m{self.models.index(model)})"

    def band(self, model: str) -> str:
        return f"var(--m{self.models.index(model)}-band)"

    def symbol(self, model: str) -> str:
        return SYMBOLS[self.models.index(model) % len(SYMBOLS)]

    def k_star(self, row: Row) -> float | None:
        measured = as_number(row.get("k_star"))
        return measured if measured is not None else as_number(self.memory.get(model_of(row), {}).get("k_star"))

    def k_star_text(self, row: Row) -> str:
        k, entry = self.k_star(row), self.memory.get(model_of(row), {})
        if k is not None:
            return f"{k:g}"
        longest = max((k for k in as_numbers(entry.get("ks")) if k is not None), default=None)
        return MISSING if longest is None else f"> {longest:g}"

    def k_star_range(self, row: Row) -> str:
        """k* with its bootstrap range, where that is wider than one value."""
        entry = self.memory.get(model_of(row), {})
        low, high = as_number(entry.get("k_star_low")), as_number(entry.get("k_star_high"))
        text = self.k_star_text(row)
        return text if low is None or high is None or low == high else f"{text} ({low:g}–{high:g})"


def model_of(row: Row) -> str:
    return str(row.get("model") or MISSING)


def badge(kind: Kind) -> str:
    return f'<span class="kind {kind}">{kind}</span>'


def model_heading(view: View, model: str) -> str:
    """The head of a model's row: its colour in the charts and its name."""
    swatch = f'<span class="swatch" style="background:{view.colour(model)}" aria-hidden="true"></span>'
    return f'<th class="stick" scope="row">{swatch}{escape(model)}</th>'


def scrollable(label: str, table: str) -> str:
    """A wide table scrolls inside its own box, by keyboard as well, so that the page never does."""
    return f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">{table}</div>'

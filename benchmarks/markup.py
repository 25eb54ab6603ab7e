"""What the pages and drawings of results are made of: Markdown tables, and the frame, axes and words of a drawing."""

import math
from collections.abc import Iterable, Sequence
from decimal import ROUND_CEILING, Context
from html import escape
from typing import NamedTuple

#: what stands where there is no value
MISSING = "–"
UP = Context(prec=4, rounding=ROUND_CEILING)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def rough(rate: float) -> str:
    """Return a rate to two digits, as far as timings can be trusted."""
    return f"{float(f'{rate:.2g}'):,.0f}"


def text(x: float, y: float, words: str, anchor: str = "start", size: int = 13, colour: str | None = None) -> str:
    """Return words at a place of an SVG drawing, black unless a colour is given."""
    fill = f' fill="{colour}"' if colour else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"{fill}>{escape(words)}</text>'


class Box(NamedTuple):
    """The part of a drawing that a chart fills, in its units, down from the top."""

    left: float
    top: float
    right: float
    bottom: float


class LogAxes:
    """Where a pair of positive numbers lies in a box, both axes logarithmic."""

    def __init__(self, box: Box, xs: tuple[float, float], ys: tuple[float, float]):
        self.box, (self.first, self.last) = box, xs
        self.low, self.high = math.log(ys[0]), math.log(ys[1])

    def x(self, value: float) -> float:
        share = math.log(value / self.first) / math.log(self.last / self.first)
        return self.box.left + share * (self.box.right - self.box.left)

    def y(self, value: float) -> float:
        share = (math.log(value) - self.low) / (self.high - self.low)
        return self.box.bottom - share * (self.box.bottom - self.box.top)

    def path(self, points: Sequence[tuple[float, float]]) -> str:
        return "M" + " L".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)


def drawing(width: float, height: float, parts: Iterable[str], label: str | None = None) -> str:
    """Return a whole SVG drawing on white; `label` is what a reader who does not see it is told."""
    told = f' role="img" aria-label="{escape(label)}"' if label else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="system-ui, sans-serif"'
        f'{told}><rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def rounded_up(rate: float | None) -> str | None:
    """Return a proved rate with four significant digits, never less than it is."""
    return None if rate is None else f"{UP.create_decimal_from_float(rate):,f}"

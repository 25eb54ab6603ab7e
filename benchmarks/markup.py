"""What the pages and drawings of results are made of: Markdown tables, words in an SVG drawing."""

from collections.abc import Iterable, Sequence
from html import escape

#: what stands where there is no value
MISSING = "–"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text(x: float, y: float, words: str, anchor: str = "start", size: int = 13, colour: str | None = None) -> str:
    """Return words at a place of an SVG drawing, black unless a colour is given."""
    fill = f' fill="{colour}"' if colour else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}"{fill}>{escape(words)}</text>'

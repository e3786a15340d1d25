"""What all figures share: palette, style, SVG that is accessible, themable and byte-stable."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colour-blind-safe palette; grey is kept for controls.
INK, PAPER, FAINT, GREY = "#1b1b1a", "#fffffe", "#d5d3cd", "#7c7a75"
BLUE, VERMILLION, GREEN = "#0072b2", "#d55e00", "#009e73"
PURPLE, ORANGE, SKY, YELLOW = "#cc79a7", "#e69f00", "#56b4e9", "#f0e442"
VARIABLES = {
    INK: "ink",
    PAPER: "paper",
    FAINT: "rule",
    GREY: "control",
    BLUE: "blue",
    VERMILLION: "vermillion",
    GREEN: "green",
}
"""Colours that the report's style sheet re-defines in dark mode."""
ARM_COLOURS = {
    **{"own": BLUE, "mapped": VERMILLION, "full": GREEN},
    **dict.fromkeys(("seed_only", "random", "shuffled", "generic"), GREY),
}
STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "svg.fonttype": "none",
    "svg.hashsalt": "transfer",
    "text.parse_math": False,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "xtick.color": INK,
    "ytick.color": INK,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "none",
    "path.simplify": False,
}
MAX_ROWS = 72
"""Rows drawn in one figure; the caption says when there are more."""


@dataclass(frozen=True)
class Drawing:
    """One figure of the report."""

    name: str
    title: str
    """The finding, picked from the data."""
    caption: str
    svg: str
    """Inline ``<svg>`` element; loads nothing."""
    width: int
    """Natural width in points."""

    def standalone(self) -> str:
        """The same picture as an SVG file of its own."""
        return self.svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"


@contextmanager
def styled() -> Iterator[None]:
    """The house style; glyphs that the drawing font lacks are left to the reader's own fonts."""
    import matplotlib

    style: Any = STYLE
    with matplotlib.rc_context(style), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        yield


def new_figure(width: float, height: float, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure without global state, with one row of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False, **options)
    return figure, list(axes[0])


def grouped_rows(axes: Axes, groups: Sequence[tuple[str, Sequence[str]]]) -> list[list[float]]:
    """Name rows down the left side, each group under a bold heading.

    Returns:
        Per group the y position of each of its rows (the first group is on top).
    """
    positions: list[list[float]] = []
    ticks: list[float] = []
    labels: list[str] = []
    bold: list[bool] = []
    y = 0.0
    for heading, rows in groups:
        for heavy, words in [(True, heading), *((False, row) for row in rows)]:
            ticks.append(y)
            labels.append(shorten(words))
            bold.append(heavy)
            y += 1
        positions.append(ticks[len(ticks) - len(rows) :] if rows else [])
        y += 0.35
    axes.set_yticks(ticks, labels)
    for label, heavy in zip(axes.get_yticklabels(), bold, strict=True):
        label.set_fontweight("bold" if heavy else "normal")
    axes.set_ylim(y - 0.5, -0.7)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    return positions


def height_of(groups: Sequence[tuple[str, Sequence[str]]]) -> float:
    """Inches that ``grouped_rows`` needs, axis and legend included."""
    return 1.05 + 0.205 * sum(1.35 + len(rows) for _, rows in groups)


def shorten(words: str, room: int = 34) -> str:
    """Words that fit beside an axis."""
    words = " ".join(words.split())
    return words if len(words) <= room else words[: room - 1] + "…"


def point(axes: Axes, x: float, y: float, colour: str, *, hollow: bool = False, marker: str = "o") -> None:
    """One marker; hollow where its control is missing or its fit did not converge."""
    axes.plot(
        [x], [y], marker, color=colour, markerfacecolor=PAPER if hollow else colour, markeredgewidth=1.3, markersize=5.5
    )


def interval(axes: Axes, low: float | None, high: float | None, y: float, colour: str) -> None:
    """An interval as a line; nothing where an end is unknown."""
    if low is not None and high is not None:
        axes.plot([low, high], [y, y], "-", color=colour, linewidth=1.6, solid_capstyle="butt")


def legend(axes: Axes, handles: Sequence[Any], columns: int = 3) -> None:
    """A legend above the axes."""
    axes.legend(
        handles=list(handles),
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=columns,
        borderaxespad=0.2,
        handletextpad=0.4,
        columnspacing=1.2,
    )


def key(label: str, colour: str, *, hollow: bool = False, marker: str = "o") -> Any:
    """One entry of a legend made of markers."""
    from matplotlib.lines import Line2D

    face = PAPER if hollow else colour
    return Line2D([], [], linestyle="", marker=marker, color=colour, markerfacecolor=face, markersize=5.5, label=label)


def finish(figure: Figure, name: str, title: str, caption: str) -> Drawing:
    """Write the figure as an inline SVG element with a title and a description."""
    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", metadata=nothing)
    width, height = (round(72 * side, 2) for side in figure.get_size_inches())
    return Drawing(name, title, caption, _inline(buffer.getvalue(), name, title, caption, width, height), round(width))


def _inline(svg: str, name: str, title: str, caption: str, width: float, height: float) -> str:
    """Cut matplotlib's file down to what may stand inside an HTML page.

    Prolog, metadata and namespaces go (they name web addresses), ids get the figure's name (a page holds several
    figures), and palette colours become CSS variables (the page decides on light or dark).
    """
    body = svg[svg.index("<svg") :]
    body = body[body.index(">") + 1 : body.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style .*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r"<[^>]*>", lambda tag: _tag(tag.group(), name), body)
    body = re.sub(r"\n\s*", "\n", body).strip()
    head = (
        f'<svg role="img" aria-labelledby="fig-{name}-title fig-{name}-desc" viewBox="0 0 {width:g} {height:g}">\n'
        f'<title id="fig-{name}-title">{escape(title)}</title>\n<desc id="fig-{name}-desc">{escape(caption)}</desc>\n'
    )
    return head + body + "\n</svg>"


def _tag(tag: str, name: str) -> str:
    tag = re.sub(r' id="([^"]*)"', rf' id="fig-{name}-\1"', tag)
    tag = re.sub(r'(?:xlink:)?href="#([^"]*)"', rf'href="#fig-{name}-\1"', tag)
    tag = tag.replace("url(#", f"url(#fig-{name}-")
    return re.sub(
        r"\b(fill|stroke): (#[0-9a-f]{6})\b",
        lambda m: f"{m[1]}: var(--{VARIABLES[m[2]]}, {m[2]})" if m[2] in VARIABLES else m[0],
        tag,
    )

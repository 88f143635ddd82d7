"""Tables and figures that all suites share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nestlearn.files import write_atomic
from nestlearn.train.curves import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = (*COLOURS, "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all but the first column to the right.

    >>> print(table(["name", "loss"], [["m3", "0.5"]]), end="")
    | name | loss |
    |---|---:|
    | m3 | 0.5 |
    """
    marks = "|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|"
    lines = ["| " + " | ".join(header) + " |", marks, *("| " + " | ".join(row) + " |" for row in rows)]
    return "\n".join(lines) + "\n"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that needs no screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def panel_grid(count: int, most: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of ``count`` panels, ``most`` in a row, each of so many inches; and the panels."""
    columns = min(count, most)
    rows = -(-count // columns)
    figure = new_figure(width * columns, height * rows)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in panels[count:]:
        spare.remove()
    return figure, panels[:count]


def legend_below(figure: Figure, axes: Axes) -> None:
    """The labels of ``axes`` below all panels, never over the data."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)


def save_figure(figure: Figure, path: Path) -> Path:
    """Write a PNG atomically; its path."""
    write_atomic(path, lambda beside: figure.savefig(beside, format="png"))
    return path

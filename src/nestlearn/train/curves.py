"""``curves.png``: loss against tokens, one colour a model, validation over training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nestlearn.files import write_atomic

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # Okabe and Ito: told apart by colour-blind readers too


def plot_curves(path: Path, models: Mapping[str, Sequence[Mapping[str, Any]]], title: str) -> None:
    """Draw the rows of ``metrics.jsonl`` of each model (name to rows) as a PNG, written atomically.

    Training loss is thin and pale, validation loss thick with a dot at every evaluation; both in nats per token.
    The first tenth of the tokens may leave the frame at the top: the axis is scaled to what comes after it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    late: list[float] = []
    for (name, rows), colour in zip(models.items(), COLOURS * (1 + len(models) // len(COLOURS)), strict=False):
        train = [(row["tokens"], row["loss"]) for row in rows if "loss" in row]
        valid = [(row["tokens"], row["eval_loss"]) for row in rows if "eval_loss" in row]
        if train:
            axes.plot(*zip(*train, strict=True), color=colour, alpha=0.35, linewidth=1.2, label=f"{name}, training")
        if valid:
            label = f"{name}, validation ({valid[-1][1]:.3f} at the end)"
            axes.plot(*zip(*valid, strict=True), color=colour, linewidth=2.2, marker="o", markersize=4, label=label)
        points = train + valid
        end = max((tokens for tokens, _ in points), default=0)
        late += [loss for tokens, loss in points if tokens >= 0.1 * end]
    if late:
        low, high = min(late), max(late)
        margin = 0.06 * (high - low) + 1e-3
        axes.set_ylim(low - margin, high + margin)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("training tokens")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title, parse_math=False)  # a file's name may have dollar signs
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.has_data():
        axes.legend(frameon=False, loc="upper right")
    write_atomic(path, lambda beside: figure.savefig(beside, format="png"))

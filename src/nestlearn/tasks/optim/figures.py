"""The figures of the optimizer experiments: PNG files, written atomically."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nestlearn.tasks.layout import PALETTE, legend_below, new_figure, save_figure
from nestlearn.tasks.optim import DATASETS, MODEL_OPTIMIZERS, curvature
from nestlearn.tasks.optim.orthogonal_tasks import OPTIMIZERS, SETTINGS, TRACE
from nestlearn.tasks.optim.step_time import PARTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "osD^vP*"
STYLES = ("-", "-", "--", "-", "-", "-", "--")  # delta momentum often lies on momentum


def draw_curvature(folder: Path, result: Mapping[str, Any]) -> list[Path]:
    """The shortest path of each method on the contour lines of psi, on the first landscape."""
    name, methods = next(in_order(result["landscapes"], curvature.LANDSCAPES))
    figure = new_figure(9, 7.6)
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    points = np.array([curvature.START, *(point for found in methods.values() for point in found.get("path", []))])
    low, high = np.clip(points.min(0) - 0.6, -10, -2), np.clip(points.max(0) + 0.6, 2, 10)
    r, theta = np.meshgrid(*np.linspace(low, high, 500).T)
    k, a, omega = curvature.LANDSCAPES[name]
    heights = r**2 + k * (r - theta + a * np.sin(omega * r)) ** 2
    levels = 2.0 ** np.arange(-4, 10)
    for axes, (method, title), colour in zip(panels.flat, curvature.METHODS.items(), PALETTE, strict=False):
        axes.contour(r, theta, heights, levels=levels, colors="#9a9a9a", linewidths=0.6)
        found = methods[method]
        if found["steps"] is not None:
            path = np.array(found["path"])
            axes.plot(*path.T, color=colour, linewidth=1.1, marker=".", markersize=3.5)
            title = f"{title}\n{found['steps']} steps, lr {found['lr']:g}, momentum {found['momentum']:g}"
        else:
            title = f"{title}\nnot there after {result['budget']} steps"
        axes.plot(*curvature.START, marker="o", color="black", markersize=6)
        axes.plot(0, 0, marker="*", color="black", markersize=12)
        axes.set_title(title, fontsize=10)
        axes.set_xlim(low[0], high[0])
        axes.set_ylim(low[1], high[1])
    figure.supxlabel("r")
    figure.supylabel("theta")
    figure.suptitle(f"Eq. 53 with k={k:g}, a={a:g}, omega={omega:g}: from the dot to the star", fontsize=12)
    return [save_figure(figure, folder / "curvature.png")]


def draw_orthogonal(folder: Path, result: Mapping[str, Any]) -> list[Path]:
    """The first task's loss as later tasks are learned, and how long the momentum keeps the first task's direction."""
    settings = result["settings"]
    columns = min(2, len(settings))
    figure = new_figure(5.2 * columns, 4.1 * math.ceil(len(settings) / columns) + 0.7)
    panels = figure.subplots(math.ceil(len(settings) / columns), columns, squeeze=False, sharex=True)
    for axes, (setting, optimizers) in zip(panels.flat, in_order(settings, SETTINGS), strict=False):
        for index, (name, found) in enumerate(in_order(optimizers, OPTIMIZERS)):
            rows = [[after[0] for after in run["losses"]] for run in found["runs"] if not run["diverged"]]
            if rows:
                _band(axes, list(range(1, len(rows[0]) + 1)), rows, index, name, marker=True)
        axes.set_yscale("log")
        axes.set_title(setting, fontsize=11)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in panels[-1]:
        axes.set_xlabel("tasks learned so far")
    for axes in panels[:, 0]:
        axes.set_ylabel("relative loss of the first task")
    legend_below(figure, panels.flat[0])
    drawn = [save_figure(figure, folder / "orthogonal.png")]

    setting = "rotated" if "rotated" in settings else next(iter(settings))
    figure = new_figure(8, 4.6)
    axes = figure.add_subplot()
    for index, (name, found) in enumerate(in_order(settings[setting], OPTIMIZERS)):
        traces = [run["memory"] for run in found["runs"] if not run["diverged"] and run["memory"]]
        if traces:
            rows = [[max(cosine, 1e-12) for _, cosine in trace] for trace in traces]
            _band(axes, [step for step, _ in traces[0]], rows, index, name)
    for task in range(1, result["tasks"]):
        axes.axvline(task * result["steps"], color="#9a9a9a", linewidth=0.8, linestyle="--")
    axes.set_yscale("log")
    axes.set_ylim(1e-6, 2)
    axes.set_xlim(TRACE, min(3, result["tasks"]) * result["steps"])
    axes.set_xlabel("step (dashed: the next task begins)")
    axes.set_ylabel("cos(momentum, first task)")
    axes.set_title(f"The momentum's share of the first task, setting {setting}", fontsize=11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    legend_below(figure, axes)
    return [*drawn, save_figure(figure, folder / "orthogonal-memory.png")]


def draw_models(folder: Path, result: Mapping[str, Any]) -> list[Path]:
    """For each data set: training loss over steps, and the test loss of every seed."""
    drawn = []
    for setting, optimizers in in_order(result["settings"], DATASETS):
        figure = new_figure(10, 4.6)
        curves, ends = figure.subplots(1, 2, width_ratios=(1.6, 1))
        late: list[float] = []
        shown: list[str] = []
        for index, (name, found) in enumerate(in_order(optimizers, MODEL_OPTIMIZERS["vision"])):
            runs = [run for run in found["runs"] if not run["diverged"]]
            if not runs:
                continue
            rows = [[loss for _, loss in run["curve"]] for run in runs]
            _band(curves, [step for step, _ in runs[0]["curve"]], rows, index, f"{name} (lr {found['lr']:g})")
            late += [loss for row in rows for loss in row[len(row) // 10 :]]
            tests = [run["test_loss"] for run in runs]
            place = len(shown)
            ends.plot([place] * len(tests), tests, "o", color=PALETTE[index], alpha=0.5, markersize=5)
            ends.plot([place - 0.25, place + 0.25], [sum(tests) / len(tests)] * 2, color=PALETTE[index], linewidth=2.5)
            shown.append(name)
        if late:  # the axis is scaled to what comes after the first tenth
            margin = 0.06 * (max(late) - min(late)) + 1e-3
            curves.set_ylim(min(late) - margin, max(late) + margin)
        curves.set_xlabel("step")
        curves.set_ylabel("training loss (nats)")
        curves.set_title("training, mean and range over seeds", fontsize=11)
        ends.set_xticks(range(len(shown)), shown)
        ends.set_xlim(-0.6, len(shown) - 0.4)
        ends.set_ylabel("test loss (nats)")
        ends.set_title("test: seeds and mean", fontsize=11)
        for axes in (curves, ends):
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(setting, fontsize=12)
        legend_below(figure, curves)
        drawn.append(save_figure(figure, folder / f"models-{setting}.png"))
    return drawn


def draw_step_time(folder: Path, result: Mapping[str, Any]) -> list[Path]:
    """Seconds of a step of every candidate, with the range over the rounds."""
    figure = new_figure(11, 5.4)
    panels = figure.subplots(1, len(result), squeeze=False)
    titles = {"hidden": "hidden matrices", "all": "all parameters"}
    for axes, (part, measured) in zip(panels.flat, in_order(result, PARTS), strict=True):
        rows = measured["candidates"][::-1]
        for place, found in enumerate(rows):
            colour = "#9a9a9a" if found["name"].startswith("torch") else PALETTE[0]
            axes.barh(place, found["seconds"], color=colour, height=0.7)
            axes.plot([found["low"], found["high"]], [place, place], color="black", linewidth=1.2)
            axes.annotate(f" {found['seconds']:.2g}", (found["high"], place), va="center", fontsize=8)
        axes.set_yticks(range(len(rows)), [found["name"] for found in rows], fontsize=8)
        axes.set_xscale("log")
        low, high = (f([found[key] for found in rows]) for f, key in ((min, "low"), (max, "high")))
        axes.set_xlim(low / 2, high * 4)  # room for the numbers
        axes.set_title(f"{titles[part]}: {measured['parameters'] / 1e6:.3g} M", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3, axis="x")
        axes.set_axisbelow(True)
    figure.supxlabel("seconds per step, log scale (black line: fastest to slowest round)", fontsize=10)
    figure.suptitle("grey: torch, blue: nestlearn", fontsize=10)
    return [save_figure(figure, folder / "step-time.png")]


def in_order(table: Mapping[str, Any], names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """The entries of a table that was read from a file, in the order of ``names``, all others after them.

    >>> list(in_order({"a": 1, "b": 2, "c": 3}, ["b", "d", "a"]))
    [('b', 2), ('a', 1), ('c', 3)]
    """
    order = [name for name in names if name in table]
    return ((name, table[name]) for name in [*order, *(name for name in table if name not in order)])


def _band(
    axes: Axes, x: Sequence[float], rows: Sequence[Sequence[float]], index: int, label: str, marker: bool = False
) -> None:
    """The mean of the seeds as a line in their range."""
    values = np.array(rows)
    shape = MARKERS[index] if marker else ""
    style = {"color": PALETTE[index], "linestyle": STYLES[index], "marker": shape}
    axes.plot(x, values.mean(0), linewidth=1.6, markersize=4, label=label, **style)
    axes.fill_between(x, values.min(0), values.max(0), color=PALETTE[index], alpha=0.15, linewidth=0)


DRAW: dict[str, Callable[[Path, Mapping[str, Any]], list[Path]]] = {
    "curvature": draw_curvature,
    "orthogonal": draw_orthogonal,
    "vision": draw_models,
    "language": draw_models,
    "step-time": draw_step_time,
}

"""What a method loses against what it gains, over its learning rates, and a comparison at equal gain."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nestlearn.tasks.layout import PALETTE, legend_below, panel_grid, save_figure

REACHED = 0.9  # of the smallest of the methods' largest gains: where they are compared


@dataclasses.dataclass(frozen=True)
class Point:
    """One learning rate.

    Args:
        gain: fall of the loss on new text.
        lost: of every old ability, positive where it got worse.
    """

    gain: float
    lost: Mapping[str, float]


Curves = Mapping[str, Sequence[Point]]


def curves(
    found: Mapping[str, Mapping[str, Mapping[str, Any]]], before: str, gained: str, old: Mapping[str, int]
) -> dict[str, list[Point]]:
    """The points of every method in the order of its rates, from the outcomes of a plan.

    Args:
        found: outcomes by method, then by rate.
        before: the key in ``found`` of the model that learned nothing.
        gained: the number whose fall is the gain.
        old: the numbers that may get worse: 1 where a rise is worse, -1 where a fall is.
    """
    start = next(iter(found.get(before, {}).values()), {}).get("mean", {})
    lines: dict[str, list[Point]] = {}
    for method, outcomes in found.items():
        means = [outcome["mean"] for outcome in outcomes.values()]
        whole = [m for m in means if method != before and all(key in m and key in start for key in (gained, *old))]
        if whole:
            lines[method] = [
                Point(start[gained] - m[gained], {key: sign * (m[key] - start[key]) for key, sign in old.items()})
                for m in whole
            ]
    return lines


def matched(lines: Curves) -> tuple[float, dict[str, dict[str, float]]]:
    """A gain that every method reaches, and what each has lost there.

    The gain is nine tenths of the smallest of the methods' largest gains. A curve begins at no gain and no loss; where
    it first reaches the gain it is interpolated linearly. Methods that gain nothing are left out.

    >>> matched({"a": [Point(1.0, {"x": 2.0})], "b": [Point(2.0, {"x": 1.0})]})
    (0.9, {'a': {'x': 1.8}, 'b': {'x': 0.45}})
    """
    largest = {name: max(point.gain for point in points) for name, points in lines.items()}
    able = [name for name, gain in largest.items() if gain > 0]
    if not able:
        return 0.0, {}
    gain = REACHED * min(largest[name] for name in able)
    return gain, {name: _at(lines[name], gain) for name in able}


def _at(points: Sequence[Point], gain: float) -> dict[str, float]:
    last = Point(0.0, dict.fromkeys(points[0].lost, 0.0))
    for point in points:
        if point.gain >= gain:
            share = (gain - last.gain) / (point.gain - last.gain)
            return {key: (1 - share) * last.lost[key] + share * value for key, value in point.lost.items()}
        last = point
    raise AssertionError("the curve does not reach the gain")


def draw(lines: Curves, labels: Mapping[str, str], path: Path) -> Path:
    """A panel for each old ability, a line for each method."""
    figure, panels = panel_grid(len(labels), 3, 4.2, 3.9)
    for axes, (key, label) in zip(panels, labels.items(), strict=True):
        for place, (name, points) in enumerate(lines.items()):
            x, y = [0.0, *(point.gain for point in points)], [0.0, *(point.lost[key] for point in points)]
            dashed = "-" if name.startswith("hope") else "--"
            axes.plot(x, y, dashed, color=PALETTE[place % len(PALETTE)], label=name, marker="o", markersize=3)
        axes.axhline(0, color="#888888", linewidth=0.8)
        axes.set_title(label, fontsize=10)
        axes.set_xlabel("gained on new text, nats a token")
        axes.set_ylabel("lost")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    legend_below(figure, panels[0])
    return save_figure(figure, path)

"""The picture of a `Description`: levels as rows, boxes of gradient flow in them, knowledge transfer beside them."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestlearn.errors import UserError, nearest
from nestlearn.files import write_atomic
from nestlearn.levels.frequency import UpdateFrequency
from nestlearn.levels.system import Box, Level

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from nestlearn.levels.describe.description import Description

# Inches
LABEL, BOX, GAP, LANE, MARGIN = 1.75, 2.5, 0.14, 0.36, 0.25
TITLE, LINE, PAD = 0.17, 0.145, 0.1
PER_LINE, MOST = 4, 8  # boxes side by side; boxes of a level before like ones are joined
LETTERS = 41  # of a line in a box
FILLS = {  # Okabe and Ito, pale
    "context": ("#e9d3e0", "non-parametric"),
    "state": ("#fbe3c0", "updated by the forward pass"),
    "optimizer": ("#c9e7dc", "memory of the optimizer"),
    "weights": ("#cfe3f1", "weights"),
    "buffer": ("#e6e6e6", "buffer"),
}
STROKES = {
    "direct": "#0072b2",
    "backpropagation": "#000000",
    "initialisation": "#d55e00",
    "weight generation": "#cc79a7",
    "context generation": "#009e73",
}


@dataclass
class _Card:
    """A box as it is drawn."""

    title: list[str]
    lines: list[str]
    kind: str

    @property
    def height(self) -> float:
        return 2 * PAD + TITLE * len(self.title) + LINE * len(self.lines)


@dataclass
class _Band:
    """A level as it is drawn; ``top`` is its upper edge, downward from 0."""

    level: Level
    cards: list[_Card]
    top: float = 0.0
    ends: list[tuple[int, int, int]] = field(default_factory=list)  # of arrows, from the top, by `_end`

    @property
    def rows(self) -> list[list[_Card]]:
        return [self.cards[i : i + PER_LINE] for i in range(0, len(self.cards), PER_LINE)]

    @property
    def height(self) -> float:
        inside = sum(max(card.height for card in row) + GAP for row in self.rows) + GAP
        return max(inside, 0.8, 0.2 * (len(self.ends) + 1))

    def height_of(self, end: tuple[int, int, int]) -> float:
        """Where an arrow meets the right edge."""
        order = sorted(self.ends)
        return self.top + self.height * (order.index(end) + 1) / (len(order) + 1)


@dataclass(frozen=True)
class _Arrow:
    kind: str
    source: int
    target: int
    what: str


def draw(description: Description, path: Path) -> None:
    """Draw it to a file, written atomically. Raises `UserError` for an ending that matplotlib cannot write."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ModuleNotFoundError as error:
        raise UserError("a picture needs matplotlib: pip install 'nestlearn[train]'") from error
    kind = path.suffix.removeprefix(".").lower()
    allowed = FigureCanvasAgg.get_supported_filetypes()
    if kind not in allowed:
        raise UserError(f"cannot draw to {path}, whose ending is {path.suffix!r}; {nearest(kind, allowed)}")
    canvas = FigureCanvasAgg(make_figure(description))
    write_atomic(path, lambda beside: canvas.figure.savefig(beside, format=kind))


def make_figure(description: Description) -> Figure:
    """The picture, in inches, as high and as wide as it has to be."""
    from matplotlib.figure import Figure

    bands = [_band(description, level) for level in description.system.levels]
    arrows = _arrows(description)
    for lane, arrow in enumerate(arrows):
        bands[arrow.source].ends.append(_end(arrow.source, arrow.target, lane))
        bands[arrow.target].ends.append(_end(arrow.target, arrow.source, lane, head=True))
    trained = [i for i, band in enumerate(bands) if set(band.level.names) & description.trained]
    for i in trained:
        bands[i].ends.append(_end(i, len(bands), len(arrows)))

    across = max(min(PER_LINE, len(band.cards)) for band in bands)
    right = MARGIN + LABEL + across * (BOX + GAP) + GAP
    y = 0.95
    for band in bands:
        band.top = y
        y += band.height + GAP
    foot = 0.62 if trained else 0.1
    width = max(right + LANE * (len(arrows) + 1 + bool(trained)) + MARGIN, 9.5)
    height = y + foot
    figure = Figure(figsize=(width, height), dpi=150)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.axis("off")
    _heading(axes, description, arrows, bool(trained))
    for band in bands:
        _paint(axes, band, right)
    for lane, arrow in enumerate(arrows):
        start = bands[arrow.source].height_of(_end(arrow.source, arrow.target, lane))
        end = bands[arrow.target].height_of(_end(arrow.target, arrow.source, lane, head=True))
        _elbow(axes, right, right + LANE * (lane + 1), start, end, STROKES[arrow.kind], arrow.what)
    if trained:
        ends = [bands[i].height_of(_end(i, len(bands), len(arrows))) for i in trained]
        _loss(axes, right, right + LANE * (len(arrows) + 1), y + 0.12, ends)
    return figure


def _band(description: Description, level: Level) -> _Band:
    boxes = [(box, description.kind(box)) for box in level.boxes]
    if len(boxes) > MOST:
        boxes = _joined(description, level.boxes)
    return _Band(level, [_card(box, kind) for box, kind in boxes])


def _joined(description: Description, boxes: Iterable[Box]) -> list[tuple[Box, str]]:
    """Boxes of one kind, structure, objective and context as one; the others as they are."""
    alike: dict[tuple, list[Box]] = {}
    for box in boxes:
        alike.setdefault((description.kind(box), box.structure, box.objective, box.context), []).append(box)
    found = []
    for (kind, *_), group in alike.items():
        states = [box.state for box in group]
        common = replace(
            group[0],
            name=group[0].name if len(group) == 1 else f"{group[0].name} and {len(group) - 1} more",
            parameters=sum(box.parameters for box in group),
            state=None if None in states else sum(states),  # type: ignore[arg-type]
            count=sum(box.count for box in group),
        )
        found.append((common, kind))
    return found


def _card(box: Box, kind: str) -> _Card:
    """What is written into a box; the ``model.`` before most names of Hugging Face is left out."""
    name = f"{box.name}  x{box.count}" if box.count > 1 else box.name
    held = "grows with the context" if box.state is None and box.frequency.period is None else ""
    numbers = [f"{short(box.parameters)} parameters"] if box.parameters else []
    numbers += [f"state {short(box.state)}"] if box.state else [f"state {held}"] if held else []
    lines = [
        *_wrapped(box.structure, 2),
        *(["min  " + box.objective] if box.objective not in ("", "not known") else []),
        *([box.context] if box.context not in ("", "not known") else []),
        *_wrapped(box.rule, 2),
        ", ".join(numbers),
    ]
    return _Card(_wrapped(name.removeprefix("model."), 2, 30), [_cut(line) for line in lines if line], kind)


def _wrapped(text: str, most: int, width: int = LETTERS) -> list[str]:
    """Up to ``most`` lines; a path may break behind its punctuation."""
    opened = "".join(f"{letter}\u200b" if letter in ".,:}/" else letter for letter in text)
    words = [word for part in opened.split(" ") for word in _glued(part)]
    lines = [""]
    for word, space in words:
        joined = f"{lines[-1]}{' ' if space and lines[-1] else ''}{word}"
        if len(joined) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = joined
    if len(lines) > most:
        lines = [*lines[: most - 1], " ".join(lines[most - 1 :])]
    return [_cut(line, width) for line in lines]


def _glued(part: str) -> list[tuple[str, bool]]:
    pieces = [piece for piece in part.split("\u200b") if piece]
    return [(piece, i == 0) for i, piece in enumerate(pieces)]


def _cut(line: str, width: int = LETTERS) -> str:
    return line if len(line) <= width + 2 else f"{line[: width + 1]}\u2026"


def short(number: int) -> str:
    """A number as a talk shows it.

    >>> short(950), short(134_515_008)
    ('950', '135 M')
    """
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return str(number)


def _arrows(description: Description) -> list[_Arrow]:
    """Transfers between levels, those of one kind, content and direction once."""
    system = description.system
    level = {name: found.number for found in system.levels for name in found.names}
    found = [_Arrow(t.kind, level[t.source], level[t.target], t.what) for t in system.transfers]
    # Short ones first, so that they stay near the boxes.
    return sorted(dict.fromkeys(found), key=lambda a: (abs(a.source - a.target), a.source, a.target, a.kind))


def _end(here: int, there: int, lane: int, head: bool = False) -> tuple[int, int, int]:
    """What the ends of arrows at one level sort by, from the top, so that few of them cross.

    Lanes lie further out the further an arrow goes. Of those that go up the nearest comes first, of those that go down
    the farthest; an arrow inside the level is between them.
    """
    way = 0 if there < here else 1 if there == here else 2
    return (way, -there if way != 1 else lane, lane if way == 0 else int(head) if way == 1 else -lane)


# Ink


def _heading(axes: Axes, description: Description, arrows: list[_Arrow], trained: bool) -> None:
    axes.text(MARGIN, 0.27, f"{description.model} as a nested system", fontsize=14, weight="bold", va="center")
    words = f"{description.parameters:,} parameters; optimizer: {description.optimizer}; fastest level on top"
    axes.text(MARGIN, 0.52, words, fontsize=9, va="center", color="#444444")
    x = MARGIN
    for kind, (fill, words) in FILLS.items():
        if kind in description.kinds.values():
            axes.add_patch(_rectangle(x, 0.68, 0.2, 0.15, fill))
            axes.text(x + 0.26, 0.755, words, fontsize=8, va="center")
            x += 0.45 + 0.068 * len(words)
    used = {arrow.kind for arrow in arrows} | ({"backpropagation"} if trained else set())
    for kind in (kind for kind in STROKES if kind in used):
        axes.plot([x, x + 0.25], [0.755, 0.755], color=STROKES[kind], linewidth=2)
        axes.text(x + 0.31, 0.755, kind, fontsize=8, va="center")
        x += 0.5 + 0.068 * len(kind)


def _paint(axes: Axes, band: _Band, right: float) -> None:
    axes.add_patch(_rectangle(MARGIN, band.top, right - MARGIN, band.height, "#f7f7f7", "#bbbbbb"))
    middle, x = band.top + band.height / 2, MARGIN + 0.12
    axes.text(x, middle - 0.13, f"level {band.level.number}", fontsize=11, weight="bold", va="center")
    axes.text(x, middle + 0.1, _told(band.level.frequency), fontsize=8, va="top", linespacing=1.3)
    y = band.top + GAP
    for row in band.rows:
        tall = max(card.height for card in row)
        for column, card in enumerate(row):
            _write(axes, card, MARGIN + LABEL + column * (BOX + GAP), y, tall)
        y += tall + GAP


def _told(f: UpdateFrequency) -> str:
    words = f"f {f}" if f.said else f"f = {f}"
    return "\n".join(textwrap.wrap(words, 20, break_on_hyphens=False))


def _write(axes: Axes, card: _Card, x: float, y: float, height: float) -> None:
    axes.add_patch(_rectangle(x, y, BOX, height, FILLS[card.kind][0], "#777777"))
    y += PAD + TITLE / 2
    for line in card.title:
        axes.text(x + 0.09, y, line, fontsize=8.5, weight="bold", va="center", parse_math=False)
        y += TITLE
    for line in card.lines:
        axes.text(x + 0.09, y - 0.01, line, fontsize=7.5, va="center", color="#222222", parse_math=False)
        y += LINE


def _rectangle(x: float, y: float, width: float, height: float, fill: str, edge: str = "none") -> Any:
    from matplotlib.patches import FancyBboxPatch

    style = "round,pad=0,rounding_size=0.06"
    return FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=fill, edgecolor=edge, linewidth=0.8)


def _elbow(axes: Axes, edge: float, lane: float, start: float, end: float, colour: str, what: str) -> None:
    """From the edge of a band out to its lane, along it, and back in with a head."""
    axes.plot([edge, lane, lane], [start, start, end], color=colour, linewidth=1.5, solid_joinstyle="round", zorder=2)
    head = dict(arrowstyle="-|>", color=colour, linewidth=1.5, shrinkA=0, shrinkB=0, mutation_scale=10)
    axes.annotate("", xy=(edge, end), xytext=(lane, end), arrowprops=head, zorder=2)
    paper = dict(facecolor="white", edgecolor="none", pad=1.0)
    words = dict(rotation=90, fontsize=7, va="center", ha="center", bbox=paper, zorder=3)
    axes.text(lane + 0.13, (start + end) / 2, what, **words)


def _loss(axes: Axes, edge: float, lane: float, y: float, ends: list[float]) -> None:
    """The outer loss at the foot, and its gradient into every level that it trains."""
    axes.add_patch(_rectangle(edge - 1.1, y, 1.1, 0.34, "#ffffff", "#000000"))
    axes.text(edge - 0.55, y + 0.17, "outer loss L", fontsize=8.5, weight="bold", va="center", ha="center")
    for i, end in enumerate(ends):
        _elbow(axes, edge, lane, y + 0.17, end, STROKES["backpropagation"], "" if i else "dL/dy")

"""What `describe` found: a table of levels for a reader, JSON for a program, a picture for a talk."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from fractions import Fraction
from io import StringIO
from pathlib import Path
from typing import Any

from nestlearn.levels.describe.grouping import alike
from nestlearn.levels.system import Box, Level, NestedSystem, Transfer

WIDTH = 140
COLUMNS = {
    "component": 28,
    "numbers": 12,
    "memory": 17,
    "objective": 16,
    "learning rule": 17,
    "context flow": 11,
    "knowledge transfer": 25,
}
DITTO = '"'


@dataclass(frozen=True)
class Description:
    """A model and its optimizer as a nested system. ``str()`` of it is a table, at most 140 columns wide.

    Args:
        model, optimizer: class names.
        system: the boxes in their levels, and the transfers between them.
        kinds: of each box: "weights", "state" (updated by the forward pass), "context" (non-parametric), "buffer" or
            "optimizer".
        trained: names of the boxes that share the gradient flow of the outer loss (backpropagation).
        notes: classes that hold nothing, and what else there is to say.
    """

    model: str
    optimizer: str
    system: NestedSystem
    kinds: dict[str, str]
    trained: frozenset[str]
    notes: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """All parameters of the model, tied ones once."""
        return sum(box.parameters for box in self.system.boxes)

    def kind(self, box: Box) -> str:
        """Of ``kinds``."""
        return self.kinds[box.name]

    def transfers(self, name: str) -> tuple[list[Transfer], list[Transfer]]:
        """What comes into a box and what goes out of it."""
        every = self.system.transfers
        return [t for t in every if t.target == name], [t for t in every if t.source == name]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it: levels fastest first, rates as fractions and as numbers."""
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "parameters": self.parameters,
            "tokens_per_step": self.system.tokens_per_step,
            "levels": [
                {**_frequency(level), "boxes": [self._box(box) for box in level.boxes]} for level in self.system.levels
            ],
            "notes": list(self.notes),
        }

    def to_json(self) -> str:
        """`to_dict` as one line of JSON."""
        return json.dumps(self.to_dict(), allow_nan=False)

    def _box(self, box: Box) -> dict[str, Any]:
        came, went = self.transfers(box.name)
        shared = [{"kind": "backpropagation", "from": "outer loss"}] if box.name in self.trained else []
        return {
            "component": box.name,
            "count": box.count,
            "kind": self.kind(box),
            "memory": box.structure,
            "objective": box.objective,
            "rule": box.rule,
            "context": box.context,
            "parameters": box.parameters,
            "state": box.state,
            "needs": list(box.needs),
            "transfer_in": [*shared, *({"kind": t.kind, "from": t.source, "what": t.what} for t in came)],
            "transfer_out": [{"kind": t.kind, "to": t.target, "what": t.what} for t in went],
        }

    def __str__(self) -> str:
        """One table a level; a ditto mark repeats the cell above."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        out = StringIO()
        console = Console(file=out, width=WIDTH, color_system=None, force_terminal=False, legacy_windows=False)
        count = len(self.system.levels)
        head = f"{self.model}: {self.parameters:,} parameters, {count} level{'' if count == 1 else 's'}"
        console.print(f"{head}; optimizer: {self.optimizer}", markup=False, highlight=False)
        for level in self.system.levels:
            console.print(f"\n{_title(level)}", markup=False, highlight=False)
            table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=level.number == 0)
            for column, width in COLUMNS.items():
                table.add_column(column, width=width, overflow="fold")
            above: tuple[str, ...] = ()
            for box in level.boxes:
                row = self._row(box)
                table.add_row(*(Text(cell) for cell in (_dittoed(row, above) if above else row)))
                above = row
            console.print(table)
        for note in self.notes:
            console.print(f"\n{note}", markup=False, highlight=False)
        return "\n".join(line.rstrip() for line in out.getvalue().splitlines())

    def _row(self, box: Box) -> tuple[str, ...]:
        name = f"{box.name} x{box.count}" if box.count > 1 else box.name
        cells = (_broken(name, COLUMNS["component"]), _numbers(box), box.structure, box.objective, box.rule)
        return (*cells, box.context, "\n".join(self._moved(box)) or "-")

    def _moved(self, box: Box) -> list[str]:
        """Clauses on knowledge transfer, the exchange with the optimizer first."""
        came, went = self.transfers(box.name)
        inner = [t for t in (*came, *went) if "optimizer" not in (self.kinds[t.source], self.kinds[t.target])]
        clauses = ["in: backpropagation"] if box.name in self.trained else []
        for transfers in ([t for t in (*came, *went) if t not in inner], inner):
            clauses += _joined([t for t in transfers if t.target == box.name], "source", "in", "from")
            clauses += _joined([t for t in transfers if t.source == box.name], "target", "out", "to")
        return [_broken(clause, COLUMNS["knowledge transfer"]) for clause in clauses]

    def draw(self, path: str | Path) -> None:
        """Draw the levels as a picture (PNG, or by the ending PDF or SVG), written atomically.

        Raises:
            UserError: an ending that matplotlib cannot write.
        """
        from nestlearn.levels.describe.picture import draw

        draw(self, Path(path))


def _frequency(level: Level) -> dict[str, Any]:
    f = level.frequency
    period = f.period
    return {
        "level": level.number,
        "frequency": str(f),
        "rate": None if f.said or period is None else str(Fraction(f.rate)),
        "unit": f.unit,
        "period": None if f.said or period is None else float(period),
    }


def _title(level: Level) -> str:
    f, period = level.frequency, level.frequency.period
    words = f"level {level.number}   f = {f}"
    if f.said or period is None:
        return words if not f.said else f"level {level.number}   f {f}"
    number = str(period) if period.denominator == 1 else f"{float(period):.3g}"
    return f"{words}, period {number} {f.unit}{'' if period == 1 else 's'}"


def _numbers(box: Box) -> str:
    """Parameters, and the numbers that are held beside them."""
    held = "state grows" if box.state is None and box.frequency.period is None else "state not known"
    state = held if box.state is None else f"state {box.state:,}" if box.state else ""
    words = [f"{box.parameters:,}" if box.parameters or not state else "", state]
    return ", ".join(word for word in words if word)


def _dittoed(row: tuple[str, ...], above: tuple[str, ...]) -> list[str]:
    """Cells with a ditto mark where the row above says the same; of knowledge transfer, the clauses that it begins
    with."""
    cells = [DITTO if i > 1 and len(cell) > 1 and cell == above[i] else cell for i, cell in enumerate(row)]
    here, before = row[-1].split("\n"), above[-1].split("\n")
    same = alike([here, before])
    while same and same < len(here) and not here[same].startswith(("in:", "out:")):
        same -= 1  # not in mid-clause
    if cells[-1] != DITTO and same > 1:
        cells[-1] = "\n".join([DITTO, *here[same:]])
    return cells


def _joined(transfers: list[Transfer], end: str, way: str, preposition: str) -> list[str]:
    """One clause for each kind of transfer; many boxes are counted."""
    found: dict[tuple[str, str], list[str]] = {}
    for t in transfers:
        found.setdefault((t.kind, t.what), []).append(getattr(t, end))
    clauses = []
    for (kind, what), names in found.items():
        first = names[0].partition(" ")[0] + " "
        if len(names) > 1 and all(name.startswith(first) for name in names):  # AdamW m, AdamW v
            names = [names[0], *(name.removeprefix(first) for name in names[1:])]
        ends = ", ".join(names) if len(names) < 4 else f"{len(names)} components"
        clauses.append(f"{way}: {kind}{f' ({what})' if what else ''} {preposition} {ends}")
    return clauses


def _broken(name: str, width: int) -> str:
    """A long name on several lines, broken behind its punctuation."""
    lines = [""]
    for piece in re.split(r"(?<=[.,:}/ ])", name):
        if len(lines[-1]) + len(piece.rstrip()) > width and lines[-1]:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)

"""Nested systems: boxes of gradient flow, ordered into levels by how often they are updated (Definitions 2 to 4).

Nothing here runs. A `Box` says what a component stores, by which objective and rule, from which context and how often;
a `NestedSystem` orders boxes into levels and holds what flows between them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from itertools import groupby

from nestlearn.errors import UserError, nearest
from nestlearn.levels.frequency import UpdateFrequency

TRANSFERS = ("direct", "backpropagation", "initialisation", "weight generation", "context generation")


@dataclass(frozen=True)
class Box:
    """One component of a nested system: the optimization problem ``(L, C, Theta)`` of Definition 3 and its clock.

    Args:
        name: of the component.
        frequency: how often it is updated.
        objective: L, what an update minimises.
        context: C, its context flow: what it is updated from, as key -> value where it is a pair.
        structure: what the memory is made of, the feasible set Theta. A non-parametric box holds its context itself.
        rule: how an update is made.
        needs: names of boxes whose state at time t its state at time t needs.
        parameters: trainable or frozen numbers of the model that it is made of.
        state: numbers that it holds beside them, per sequence where its unit is the token; None if not known.
        count: equal components that the box stands for.

    >>> Box("W", UpdateFrequency.every(1), "L(W; x)", "x -> -dL/dy", rule="gradient descent", needs=("m",)).needs
    ('m',)
    """

    name: str
    frequency: UpdateFrequency
    objective: str = ""
    context: str = ""
    structure: str = ""
    rule: str = ""
    needs: tuple[str, ...] = ()
    parameters: int = 0
    state: int | None = 0
    count: int = 1


@dataclass(frozen=True)
class Transfer:
    """Knowledge that flows from one box to another (section 3.3).

    Args:
        kind: one of "direct", "backpropagation", "initialisation", "weight generation", "context generation".
        source, target: names of boxes.
        what: what is handed over.

    Raises:
        UserError: an unknown kind.
    """

    kind: str
    source: str
    target: str
    what: str = ""

    def __post_init__(self) -> None:
        if self.kind not in TRANSFERS:
            raise UserError(f"unknown knowledge transfer {self.kind!r}: {nearest(str(self.kind), TRANSFERS)}")


@dataclass(frozen=True)
class Level:
    """Boxes of one frequency whose states at a time do not need one another.

    Args:
        number: 0 is the fastest. The paper calls slow levels high; some of its equations count from the slowest.
        boxes: its boxes, in the order in which they were given.
    """

    number: int
    boxes: tuple[Box, ...]

    @property
    def frequency(self) -> UpdateFrequency:
        """How often its boxes are updated."""
        return self.boxes[0].frequency

    @property
    def names(self) -> tuple[str, ...]:
        """Names of its boxes."""
        return tuple(box.name for box in self.boxes)


@dataclass(frozen=True)
class NestedSystem:
    """Boxes in ordered levels, with the knowledge that flows between them (Definitions 3 and 4).

    ``A`` comes before ``B`` if it is updated more often or, at the same frequency, if B's state at a time needs A's
    state at that time (Definition 2). Otherwise they share a level, except that needs are followed to the end: a box
    stands one level behind the last of those that it needs at its frequency.

    Args:
        boxes: the components.
        transfers: what flows between them.
        tokens_per_step: tokens of one step of the outer optimizer, where known; see `UpdateFrequency.key`.

    Raises:
        UserError: no box, two of one name, a need or transfer of a box that is not there, boxes of one frequency that
            need one another in a circle, or ``tokens_per_step`` below 1.

    >>> once = UpdateFrequency.every(1)
    >>> system = NestedSystem((Box("W", once, needs=("m",)), Box("m", once)))
    >>> [level.names for level in system.levels]
    [('m',), ('W',)]
    """

    boxes: tuple[Box, ...]
    transfers: tuple[Transfer, ...] = ()
    tokens_per_step: int | None = None
    _by_name: dict[str, Box] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.boxes:
            raise UserError("a nested system without boxes: give at least one")
        if self.tokens_per_step is not None and self.tokens_per_step < 1:
            raise UserError(f"tokens_per_step={self.tokens_per_step}: it must be 1 or more")
        object.__setattr__(self, "_by_name", {box.name: box for box in self.boxes})
        if len(self._by_name) < len(self.boxes):
            names = [box.name for box in self.boxes]
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"two boxes are called {twice!r}: give each its own name")
        for box in self.boxes:
            self._check(box.needs, f"{box.name!r} needs")
        for transfer in self.transfers:
            self._check((transfer.source, transfer.target), f"a transfer ({transfer.kind}) joins")
        assert self.levels  # ordered at once, so that a circle is met here

    def _check(self, names: Iterable[str], who: str) -> None:
        for name in names:
            if name not in self._by_name:
                raise UserError(f"{who} {name!r}, which is no box of the system; {nearest(name, self._by_name)}")

    def __getitem__(self, name: str) -> Box:
        """The box of a name. Raises `UserError` for an unknown one."""
        self._check((name,), "asked for")
        return self._by_name[name]

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """The levels of Definition 2, fastest first."""

        def key(box: Box) -> tuple:
            # What is only assumed gets a level of its own, before what is known to be as fast.
            return (*box.frequency.key(self.tokens_per_step), not box.frequency.said)

        layers: list[tuple[Box, ...]] = []
        for _, equal in groupby(sorted(self.boxes, key=key), key):
            layers += _layers(list(equal))
        return tuple(Level(number, boxes) for number, boxes in enumerate(layers))

    def level_of(self, name: str) -> int:
        """The number of a box's level. Raises `UserError` for an unknown name."""
        box = self[name]
        return next(level.number for level in self.levels if box in level.boxes)


def _layers(boxes: list[Box]) -> list[tuple[Box, ...]]:
    """Boxes of one frequency by the longest chain of needs among them."""
    known = {box.name: box for box in boxes}
    sorter = TopologicalSorter({name: [n for n in box.needs if n in known] for name, box in known.items()})
    try:
        sorter.prepare()
    except CycleError as error:
        circle = " -> ".join(repr(name) for name in error.args[1])
        raise UserError(
            f"boxes of the frequency {boxes[0].frequency} need one another in a circle: {circle}; of two that exchange "
            "states one must be content with the other's last one"
        ) from None
    layers = []
    while sorter.is_active():
        ready = set(sorter.get_ready())
        layers.append(tuple(box for box in boxes if box.name in ready))
        sorter.done(*ready)
    return layers

"""Any model and optimizer as a nested system: `describe`."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace

from torch import nn
from torch.optim import Optimizer

from nestlearn.errors import UserError
from nestlearn.levels.describe.description import Description
from nestlearn.levels.describe.grouping import braces, group
from nestlearn.levels.describe.modules import Anatomy, take_apart
from nestlearn.levels.describe.optimizers import Plan, Rule, plan
from nestlearn.levels.describe.parts import Part, size
from nestlearn.levels.frequency import FROZEN, UpdateFrequency
from nestlearn.levels.system import Box, NestedSystem, Transfer

__all__ = ["Description", "describe"]

Key = tuple[str, str]


def describe(
    model: nn.Module, optimizer: Optimizer | None = None, *, tokens_per_step: int | None = None
) -> Description:
    """``model`` and its optimizer as one nested system of associative memories (Definitions 2 to 4, section 3).

    ``print`` shows the table of levels, fastest first; ``to_json`` and ``draw`` give it to a program and to a talk.
    Nothing is computed and no weight is read, so a model on the meta device will do. A layer is a memory from its input
    to its local surprise (Eq. 31); attention is a non-parametric memory; what is updated inside a sequence stands above
    what the optimizer updates; what nobody updates is frozen. Modules and optimizers that are not known are listed by
    their class. Attention and recurrences of other libraries are recognised by their class name and their projections.

    Args:
        model: any module.
        optimizer: any optimizer over some of its parameters; those that it does not have are frozen. Without one the
            frequency of trained weights is not given.
        tokens_per_step: tokens of one step of the optimizer, which puts frequencies per token and per step in one
            order. Without it the former count as faster.

    Raises:
        UserError: not a module, not an optimizer, or ``tokens_per_step`` below 1.

    >>> import torch
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> found = describe(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    >>> [level.names for level in found.system.levels]
    [('SGD m',), ('0,2',)]
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"describe got {type(model).__name__} as the model: give a torch.nn.Module")
    anatomy, outer = take_apart(model), plan(optimizer)
    pieces = [piece for part in anatomy.parts for piece in _pieces(part, outer, type(model).__name__)]
    grouped = group(pieces, lambda piece: piece.path, lambda piece: piece.sort)
    taken = [box.name for box in outer.boxes]
    rows = dict(zip(_row_names(grouped, taken), (found for _, found in grouped), strict=True))
    row_of: dict[Key, list[str]] = {}
    for name, found in rows.items():
        for piece in found:
            row_of.setdefault(piece.part.key, []).append(name)
    boxes = [*outer.boxes, *(_box(name, found, row_of) for name, found in rows.items())]
    if not boxes:  # a model that holds nothing at all, such as nn.ReLU()
        boxes = [Box(type(model).__name__, FROZEN, structure=f"function ({type(model).__name__})", rule="none")]
    transfers = dict.fromkeys([*_optimizer_transfers(rows, outer), *_transfers(rows, row_of)])
    kinds = {box.name: "buffer" for box in boxes} | {box.name: "optimizer" for box in outer.boxes}
    kinds |= {name: found[0].part.kind for name, found in rows.items()}
    trained = frozenset(
        name for name, found in rows.items() if found[0].part.kind == "weights" and found[0].frequency != FROZEN
    )
    system = NestedSystem(tuple(boxes), tuple(transfers), tokens_per_step)
    return Description(
        type(model).__name__, outer.name, system, kinds, trained, tuple(_notes(model, optimizer, anatomy, outer))
    )


@dataclass(frozen=True)
class _Piece:
    """A part, or what of its weights follows one rule."""

    path: str
    part: Part
    rule: Rule | None = None

    @property
    def frequency(self) -> UpdateFrequency:
        """How often it is updated."""
        found = self.part.frequency if self.rule is None else self.rule.frequency
        assert found is not None
        return found

    @property
    def sort(self) -> Hashable:
        """What equal pieces share."""
        part = self.part
        return part.kind, part.role, part.structure, part.objective, part.context, part.rule, part.frequency, self.rule


def _pieces(part: Part, outer: Plan, root: str) -> Iterator[_Piece]:
    if part.kind != "weights":
        yield _Piece(part.path or root, part)
        return
    rules: dict[Rule, list[tuple[str, nn.Parameter]]] = {}
    for name, p in part.parameters:
        rules.setdefault(outer.rule(p), []).append((name, p))
    if not rules:  # all of it is tied to what was met before
        yield _Piece(part.path or root, part, outer.rule(part.tied[0]))
    for rule, held in rules.items():
        path = part.path
        if len(rules) > 1 or part.structure.startswith("tensor ("):  # bare parameters go by their own names
            path = f"{path}.{braces([name for name, _ in held])}".lstrip(".")
        yield _Piece(path or root, replace(part, parameters=tuple(held)), rule)


def _row_names(grouped: list[tuple[str, list[_Piece]]], taken: list[str]) -> list[str]:
    """A name for each group that no other box has."""
    names = list(taken)
    for path, found in grouped:
        role = found[0].part.role
        name = plain = f"{path}: {role}" if role else path
        number = 1
        while name in names:
            number += 1
            name = f"{plain} ({number})"
        names.append(name)
    return names[len(taken) :]


def _box(name: str, found: list[_Piece], row_of: dict[Key, list[str]]) -> Box:
    part, rule = found[0].part, found[0].rule
    outer = part.objective.startswith("outer") or rule is None or rule.objective == Rule.objective
    states = [piece.part.state for piece in found]
    needs = [row for piece in found for key in piece.part.needs for row in row_of[key]]
    return Box(
        name,
        found[0].frequency,
        part.objective if outer or rule is None else rule.objective,
        part.context if rule is None or rule.context == Rule.context else rule.context,
        part.structure,
        part.rule if rule is None else rule.rule,
        tuple(dict.fromkeys([*(rule.needs if rule else ()), *needs])),
        sum(size(p) for piece in found for _, p in piece.part.parameters),
        None if None in states else sum(states),  # type: ignore[arg-type]
        len(found),
    )


def _transfers(rows: dict[str, list[_Piece]], row_of: dict[Key, list[str]]) -> Iterator[Transfer]:
    """What parts of the model hand to one another."""
    weights = [(piece.part.path, name) for name, found in rows.items() for piece in found if piece.rule is not None]
    for name, found in rows.items():
        for link in (link for piece in found for link in piece.part.links):
            path, role = link.other
            if role == "*":
                others = [row for p, row in weights if p == path or p.startswith(f"{path}.") or not path]
            else:
                others = row_of.get(link.other, [])
            for other in dict.fromkeys(others):
                source, target = (name, other) if link.outward else (other, name)
                yield Transfer(link.kind, source, target, link.what)


def _optimizer_transfers(rows: dict[str, list[_Piece]], outer: Plan) -> Iterator[Transfer]:
    """The architecture makes the optimizer's context, its gradients; what is stored of them is read into weights."""
    for name, found in rows.items():
        rule = found[0].rule
        if rule is None:
            continue
        if rule.error:
            yield Transfer("context generation", name, rule.error, "gradients")
            for reader in rule.needs or [name]:
                yield Transfer("direct", rule.error, reader, "sum of gradients")
        for memory in rule.needs:
            if not rule.error:
                yield Transfer("context generation", name, memory, "gradients")
            yield Transfer("direct", memory, name, "update")


def _notes(model: nn.Module, optimizer: Optimizer | None, anatomy: Anatomy, outer: Plan) -> Iterator[str]:
    for what, counter in (("functions", anatomy.functions), ("joined by", anatomy.containers)):
        if counter:
            yield f"{what}: " + ", ".join(f"{name} x{n}" if n > 1 else name for name, n in sorted(counter.items()))
    own = set(model.parameters())
    foreign = [p for p in outer.rules if p not in own]
    if foreign:
        yield f"the optimizer also has {len(foreign)} parameters ({sum(map(size, foreign)):,} numbers) of no module"
    yield from outer.notes

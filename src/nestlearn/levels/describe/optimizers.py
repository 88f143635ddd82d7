"""An optimizer as boxes of a nested system, and what it makes of each weight (sections 4 and 7.1, appendix B).

`optim` stands above `levels`, so it is imported when an optimizer is described and not when this module is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from nestlearn.errors import UserError
from nestlearn.levels.describe.parts import PAIR, SURPRISE, size
from nestlearn.levels.frequency import FROZEN, UpdateFrequency
from nestlearn.levels.system import Box

NOT_GIVEN = UpdateFrequency(1, said="not given")
NOT_KNOWN = "not known"
OF_THE_SHAPE = ("element-wise, shape of W", "matrix, shape of W")  # structures with one number per weight


@dataclass(frozen=True)
class Rule:
    """How the outer optimizer updates a weight.

    ``needs``: names of the memories that the update reads; ``error``: of the box that gathers the weight's gradients
    for them, if one does. ``objective`` and ``context`` are set where the weight is itself the optimizer's memory
    (Eq. 57 to 60).
    """

    rule: str
    frequency: UpdateFrequency
    needs: tuple[str, ...] = ()
    objective: str = SURPRISE
    context: str = PAIR
    error: str = ""


@dataclass
class Plan:
    """An optimizer taken apart: its memories as boxes, the rule of each parameter, and remarks."""

    name: str
    boxes: list[Box] = field(default_factory=list)
    rules: dict[nn.Parameter, Rule] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def rule(self, p: nn.Parameter) -> Rule:
        """The rule of a parameter of the model; one that the optimizer does not have is frozen."""
        return self.rules.get(p) or Rule("none", FROZEN)


class NoOptimizer(Plan):
    """What is trained, and what is not, before an optimizer is chosen."""

    def rule(self, p: nn.Parameter) -> Rule:
        """Not given, or frozen where no gradient is asked for."""
        return Rule("not given", NOT_GIVEN) if p.requires_grad else Rule("none", FROZEN)


def plan(optimizer: Optimizer | None) -> Plan:
    """Take an optimizer apart. Raises `UserError` for something else."""
    if optimizer is None:
        return NoOptimizer("none")
    if not isinstance(optimizer, Optimizer):
        raise UserError(
            f"describe got {type(optimizer).__name__} as the optimizer: give a torch.optim.Optimizer, or none"
        )
    from nestlearn.optim import LevelwiseOptimizer

    inner, periods, error, resting = optimizer, {}, "", False
    while isinstance(inside := getattr(inner, "optimizer", None), Optimizer):
        # Accelerate's wrapper, or a levelwise one
        if isinstance(inner, LevelwiseOptimizer):
            periods, error, resting = inner.periods, inner.error, inner.error == "last"
        inner = inside
    found = Plan(type(inner).__name__)
    groups = _known(inner, found) or [_Unknown(inner, i) for i in range(len(inner.param_groups))]
    drafts: dict[tuple, _Draft] = {}
    for number, (group, settings) in enumerate(zip(groups, inner.param_groups, strict=True)):
        for p in settings["params"]:
            period = periods.get(p, 1)
            if not p.requires_grad and not (resting and p in periods):
                continue
            for memory in group.memories:
                draft = drafts.setdefault((memory, group.key, period), _Draft(memory, group, period))
                draft.take(p, number)
    names = _names(found.name, list(drafts.values()))
    of = {key: name for key, name in zip(drafts, names, strict=True)}
    found.boxes = [draft.box(of[key], of) for key, draft in drafts.items()]
    for group, settings in zip(groups, inner.param_groups, strict=True):
        for p in settings["params"]:
            period = periods.get(p, 1)
            if p.requires_grad or (resting and p in periods):
                needs = tuple(of[memory, group.key, period] for memory in group.memories)
                rule = group.rule(found.name, settings, period, needs)
                gathers = period > 1 and error != "last"
                found.rules[p] = replace(rule, error=_error(period)) if gathers else rule
    if periods:
        found.name = f"{type(optimizer).__name__} of {found.name}"
        found.boxes += _kept(periods, error)
    return found


@dataclass(frozen=True)
class _Slot:
    """A memory that is not known."""

    name: str = "state"
    structure: str = NOT_KNOWN
    objective: str = NOT_KNOWN
    rule: str = NOT_KNOWN
    key: str = "none"
    value: str = "g"
    frequency: float = 1.0


class _Known:
    """A group of `as_memory`, without the weights where they are the memory themselves."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.own = next((m for m in group.memories if m.name == "W"), None)
        self.memories = tuple(m for m in group.memories if m.name != "W")
        self.key = ""

    def rule(self, name: str, settings: dict[str, Any], period: int, needs: tuple[str, ...]) -> Rule:
        decay = self.group.decay
        kept = f", keeps {1 - decay.rate:.6g}" if decay.kind == "decoupled" else ""
        kept = f", {decay.rate:g} W joins g" if decay.kind == "coupled" else kept
        words = f"{name}, lr {self.group.lr:g}{kept}"
        if self.own is None:
            return Rule(words, UpdateFrequency.every(period), needs)
        times = UpdateFrequency.every(period, updates=self.own.frequency)
        return Rule(f"{self.own.rule}, lr {self.group.lr:g}{kept}", times, needs, self.own.objective, _pair(self.own))


class _Unknown:
    """A group of an optimizer that has no derivation."""

    def __init__(self, optimizer: Optimizer, number: int) -> None:
        self.optimizer, self.memories, self.key = optimizer, (_Slot(),), "unknown"

    def rule(self, name: str, settings: dict[str, Any], period: int, needs: tuple[str, ...]) -> Rule:
        lr = settings.get("lr")
        at = f", lr {float(lr):g}" if isinstance(lr, (int, float, Tensor)) else ""
        return Rule(f"{name} (not known){at}", UpdateFrequency.every(period), needs)


def _known(optimizer: Optimizer, found: Plan) -> list[_Known]:
    from nestlearn.optim import as_memory

    try:
        return [_Known(group) for group in as_memory(optimizer).groups]
    except UserError as error:  # listed by its class, with the reason
        found.notes.append(str(error).partition(": did you mean")[0].partition(": allowed")[0])
        return []


class _Draft:
    """One memory of an optimizer, and the parameters that have it at one period."""

    def __init__(self, memory: Any, group: Any, period: int) -> None:
        self.memory, self.group, self.period = memory, group, period
        self.groups: set[int] = set()
        self.parameters: list[nn.Parameter] = []

    def take(self, p: nn.Parameter, group: int) -> None:
        self.parameters.append(p)
        self.groups.add(group)

    def box(self, name: str, names: dict[tuple, str]) -> Box:
        m = self.memory
        unknown = isinstance(m, _Slot)
        return Box(
            name,
            UpdateFrequency(1, said=NOT_KNOWN) if unknown else UpdateFrequency.every(self.period, updates=m.frequency),
            m.objective,
            f"{'gradients' if m.value == 'g' else m.value} of its weights" if m.key == "none" else _pair(m),
            m.structure,
            m.rule if unknown else f"{m.rule}, step {m.step_size:g}, keeps {m.retention:g}",
            tuple(names[other, self.group.key, self.period] for other in _reads(m, self.group.memories)),
            state=self._state(),
        )

    def _state(self) -> int | None:
        if self.memory.structure in OF_THE_SHAPE:
            return sum(map(size, self.parameters))
        if not isinstance(self.memory, _Slot):
            return None
        state = self.group.optimizer.state
        held = [v for p in self.parameters for v in state.get(p, {}).values() if isinstance(v, Tensor)]
        return sum(map(size, held)) if held else None


def _reads(memory: Any, others: Iterable[Any]) -> Iterator[Any]:
    """The memories that a write of ``memory`` reads: its value names them, or is the read-out ``m*`` of all others."""
    text = f"{memory.key} {memory.value}"
    for other in others:
        if other is not memory and ("m*" in text or re.search(rf"(?<![\w]){re.escape(other.name)}(?!\w)", text)):
            yield other


def _names(optimizer: str, drafts: list[_Draft]) -> list[str]:
    """A name for each: optimizer and memory, and its groups and period where that is not enough."""
    plain = [f"{optimizer} {draft.memory.name}" for draft in drafts]
    grouped = []
    for name, draft in zip(plain, drafts, strict=True):
        same = [d for n, d in zip(plain, drafts, strict=True) if n == name]
        if len({d.memory for d in same}) > 1:
            numbers = ", ".join(map(str, sorted(draft.groups)))
            name = f"{name} (group{'s' if len(draft.groups) > 1 else ''} {numbers})"
        grouped.append(name if draft.period == 1 else f"{name}, every {draft.period} steps")
    return grouped


def _kept(periods: dict[nn.Parameter, int], error: str) -> list[Box]:
    """What slow levels gather between two updates (Eq. 71)."""
    if error == "last":
        return []
    boxes = []
    for period in sorted(set(periods.values())):
        held = sum(size(p) for p, c in periods.items() if c == period)
        once, shape = UpdateFrequency.every(1), OF_THE_SHAPE[0]
        rule = f"running sum, emptied every {period} steps"
        boxes.append(Box(_error(period), once, "-<e, g>", "gradients of its weights", shape, rule, state=held))
    return boxes


def _error(period: int) -> str:
    return f"error of {period} steps"


def _pair(memory: Any) -> str:
    return f"{memory.key} -> {memory.value}"

"""Any known optimizer as associative memories of gradients (appendix B): `as_memory`.

This is a derivation, not an optimizer to train with. It names what an optimizer stores, the objective and the rule by
which it stores it, and how the stored is read into an update; where the recurrence that follows can be run, the tests
check it against the optimizer itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nestlearn.errors import UserError, nearest
from nestlearn.optim.derivations import matrix_recurrences, own_memories, recurrences
from nestlearn.optim.derivations.accumulators import Memory
from nestlearn.optim.derivations.recurrences import GroupMemory, Settings
from nestlearn.optim.levelwise import LevelwiseOptimizer

KNOWN: dict[str, Callable[[Settings], GroupMemory]] = {
    "torch.optim.SGD": recurrences.sgd,
    "torch.optim.Adam": recurrences.adam,
    "torch.optim.AdamW": recurrences.adam,
    "torch.optim.RMSprop": recurrences.rmsprop,
    "torch.optim.Adagrad": recurrences.adagrad,
    "torch.optim.NAdam": recurrences.nadam,
    "torch.optim.RAdam": recurrences.radam,
    "torch.optim.Muon": matrix_recurrences.muon,
    "pytorch_optimizer.SignSGD": recurrences.sign_sgd,
    "pytorch_optimizer.Lion": recurrences.lion,
    "pytorch_optimizer.Shampoo": matrix_recurrences.shampoo,
    "pytorch_optimizer.SOAP": matrix_recurrences.soap,
    **{f"nestlearn.optim.{name}": derive for name, derive in own_memories.BY_NAME.items()},
}
HEADER = ("memory", "structure", "objective", "rule", "step", "key -> value", "retained", "frequency")


@dataclass(frozen=True)
class OptimizerMemory:
    """An optimizer as memories. ``str()`` of it is a table.

    Args:
        name: class of the optimizer.
        groups: one entry per parameter group: its ``memories`` (structure, objective, rule, key, value, retention,
            writes per step), its ``read`` (Eq. 102) and its recurrence, ``init(p)`` and ``update(state, g, p)``.

    >>> p = torch.ones(2); group = as_memory(torch.optim.SGD([torch.nn.Parameter(p)], lr=0.1, momentum=0.9)).groups[0]
    >>> group.update(group.init(p), torch.tensor([1.0, 2.0]), p)
    (tensor([0.9000, 0.8000]), {'m': tensor([1., 2.]), 'step': 1})
    """

    name: str
    groups: tuple[GroupMemory, ...]

    @property
    def memories(self) -> tuple[Memory, ...]:
        """The memories of all groups, equal ones once."""
        return tuple(dict.fromkeys(memory for group in self.groups for memory in group.memories))

    def __str__(self) -> str:
        """A plain table of every group; equal groups share one."""
        same: dict[GroupMemory, list[int]] = {}
        for number, group in enumerate(self.groups):
            same.setdefault(group, []).append(number)
        parts = [f"{self.name} as memories of its gradients (appendix B)"]
        for group, numbers in same.items():
            plural = "groups" if len(numbers) > 1 else "group"
            parts.append(f"{plural} {', '.join(map(str, numbers))}: lr {group.lr:g}, {group.decay}")
            parts += ["  " + line for line in _table(group.memories)]
            parts.append(f"  read: {group.read}")
        return "\n".join(parts)


def as_memory(optimizer: torch.optim.Optimizer) -> OptimizerMemory:
    """What ``optimizer`` stores of its gradients, by which objective and rule, and how it reads it (appendix B).

    Known are PyTorch's SGD, Adam, AdamW (also AMSGrad), RMSprop, Adagrad, NAdam, RAdam and Muon; SignSGD, Lion,
    Shampoo and SOAP of pytorch-optimizer; and the optimizers of this package, which are described only, because their
    code is the recurrence. The hyper-parameters are those of the parameter groups at the time of the call: call again
    after a scheduler's step. Recurrences are for dense real gradients.

    Not covered, and refused: momentum of Shampoo; ``merge_dims`` and ``normalize_gradient`` of SOAP; ``use_gc``,
    ``adanorm`` and ``cautious`` of Lion; ``ns_coefficients`` and ``eps`` of PyTorch's Muon.

    Raises:
        UserError: not an optimizer, one that is not known (a subclass is another optimizer), or a setting above.

    >>> memory = as_memory(torch.optim.AdamW(torch.nn.Linear(2, 1).parameters()))
    >>> [(m.name, m.objective, m.retention) for m in memory.memories]
    [('m', '1/2 ||m - g||^2', 0.9), ('v', '1/2 ||v - g^2||^2', 0.999)]
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise UserError(f"as_memory got {type(optimizer).__name__}: give it an optimizer (torch.optim.Optimizer)")
    if isinstance(optimizer, LevelwiseOptimizer):
        raise UserError(
            "a LevelwiseOptimizer only says when: give as_memory its optimizer.optimizer, or see nestlearn.describe"
        )
    kind = type(optimizer)
    package = kind.__module__.partition(".")[0]
    name = f"{package}.{kind.__name__}" if package == "pytorch_optimizer" else f"{package}.optim.{kind.__name__}"
    if name not in KNOWN:
        raise UserError(f"as_memory does not know {kind.__module__}.{kind.__name__}: {nearest(name, KNOWN)}")
    # some optimizers keep settings beside the groups
    groups = tuple(KNOWN[name]({**vars(optimizer), **group}) for group in optimizer.param_groups)
    return OptimizerMemory(kind.__name__, groups)


def _table(memories: tuple[Memory, ...]) -> list[str]:
    if not memories:
        return ["stores nothing between steps"]
    rows = [HEADER, *(_row(memory) for memory in memories)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _row(m: Memory) -> tuple[str, ...]:
    numbers = (f"{m.retention:g}", f"{m.frequency:g}")
    return m.name, m.structure, m.objective, m.rule, f"{m.step_size:g}", f"{m.key} -> {m.value}", *numbers

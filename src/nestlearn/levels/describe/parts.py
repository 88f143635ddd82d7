"""What a model is taken apart into, before equal parts are put together: `Part`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import nn
from torch.nn.parameter import is_lazy

from nestlearn.levels.frequency import UpdateFrequency

Kind = Literal["weights", "state", "context", "buffer", "optimizer"]

# Eq. 31: a layer is a memory from its input to its local surprise signal, whatever the network around it.
SURPRISE = "<W x, dL/dy>"
PAIR = "x -> -dL/dy"


@dataclass(frozen=True)
class Link:
    """Knowledge handed to (``outward``) or taken from the parts whose key is ``other``, a (path, role) pair, or, where
    the role is ``"*"``, from all weights at that path and below."""

    kind: str
    other: tuple[str, str]
    what: str = ""
    outward: bool = True


@dataclass(frozen=True)
class Part:
    """One component of a model, at one path.

    Args:
        path: of its module, as `named_modules` has it.
        role: what it is of that module; "" for its weights as a whole.
        kind: "weights" (trained or frozen by the outer optimizer), "state" (updated by the forward pass), "context"
            (non-parametric), "buffer" (unknown), "optimizer".
        structure, objective, rule, context, frequency, state: as in `nestlearn.levels.Box`; of weights the rule and the
            frequency are the optimizer's to say.
        parameters: of weights, with their names in the module; those that were met before are left out.
        links: knowledge transfer beside backpropagation.
        needs: keys of parts whose state at time t its state at time t needs.
    """

    path: str
    role: str
    kind: Kind
    structure: str
    objective: str = SURPRISE
    context: str = PAIR
    rule: str = ""
    frequency: UpdateFrequency | None = None
    state: int | None = 0
    parameters: tuple[tuple[str, nn.Parameter], ...] = ()
    links: tuple[Link, ...] = ()
    needs: tuple[tuple[str, str], ...] = ()
    tied: tuple[nn.Parameter, ...] = field(default=())

    @property
    def key(self) -> tuple[str, str]:
        """What links and needs call it."""
        return self.path, self.role


def size(p: object) -> int:
    """Numbers of a parameter; 0 of a lazy one that has no shape yet."""
    return 0 if is_lazy(p) else p.numel()  # type: ignore[attr-defined]

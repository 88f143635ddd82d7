"""Every level at its own frequency in training (Eq. 71, unit = optimizer steps), under any optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nestlearn.errors import UserError, nearest
from nestlearn.optim.base import NotFiniteGradient
from nestlearn.optim.inputs import LayerOptimizer

ERRORS = ("sum", "mean", "last")
RESTS = "_rests_between_updates"  # an attribute of a parameter whose requires_grad is off for that reason alone


class LevelwiseOptimizer(Optimizer):
    """An optimizer that updates each level every C steps, from the error of the last C steps (Eq. 71).

    It stands in front of another optimizer and shares its groups and state. Parameters with the period C > 1 are shown
    to the inner optimizer, with a gradient, at the steps C, 2C, ...; at the others they have none, so their weights,
    their momenta and their weight decay rest. With periods of 1 it is the inner optimizer, bit for bit. Learning rate
    schedulers, gradient accumulation and `transformers.Trainer` work as with the inner one.

    Args:
        optimizer: any `torch.optim.Optimizer`.
        periods: steps between two updates of a parameter; 1 for those that are left out. `periods_of` makes it from
            names, `nestlearn.nn.continuum_periods` from the chunk sizes of a model's continuum memories.
        error: what a level is updated from. "sum", as printed: the sum of the C gradients; "mean": the same over C,
            so that an update has the size of an ordinary one under SGD (Adam sees no difference but for its eps).
            Both keep one gradient per slow parameter between updates. "last": the gradient of the C-th step alone; in
            between the parameters ask for no gradient, so a level that rests costs no backward pass through its weights
            either. ``requires_grad`` is then false until the step before the update; `flush` gives it back, so call it
            before you freeze a parameter yourself. Where everything would rest, the fastest level goes on asking, as a
            loss without any gradient has no backward pass; what it gets is dropped. Not for wrappers that fix the set
            of gradients, as DistributedDataParallel does.

    Raises:
        UserError: an unknown error, a period that is not a positive integer, or of a parameter of no group; an inner
            optimizer that evaluates the loss itself (LBFGS); or, but for "last", one that reads its layers' inputs
            (DGD, GGD), which are not kept between updates.
        NotFiniteGradient: a gradient that is to be kept is infinite or NaN, by name (on a CPU; on an accelerator the
            inner optimizer meets it at the update).

    >>> fast, slow = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    >>> optimizer = LevelwiseOptimizer(torch.optim.SGD([fast, slow], lr=1.0), {slow: 2})
    >>> for _ in range(2):
    ...     (fast + slow).sum().backward(); optimizer.step(); print(fast.item(), slow.item()); optimizer.zero_grad()
    -1.0 0.0
    -2.0 -2.0
    """

    _step_supports_amp_scaling = False  # of GradScaler: a fused inner optimizer does not see what is set here

    def __init__(self, optimizer: Optimizer, periods: Mapping[nn.Parameter, int], error: str = "sum") -> None:
        # Not the base's __init__: groups, state and hooks are the inner optimizer's.
        if error not in ERRORS:
            raise UserError(f"unknown error {error!r} of a LevelwiseOptimizer: {nearest(str(error), ERRORS)}")
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, LevelwiseOptimizer):
            raise UserError(
                f"a LevelwiseOptimizer steps another optimizer and got a {type(optimizer).__name__}: give one of "
                "torch.optim or nestlearn.optim, with all periods at once"
            )
        if not isinstance(periods, Mapping):
            raise UserError(
                f"a LevelwiseOptimizer got periods as {type(periods).__name__}: give one by parameter, as "
                'periods_of(model, {"layers.0": 8}) makes them'
            )
        known = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for p, period in periods.items():
            if not isinstance(p, Tensor):
                raise UserError(
                    f"a period is given for {p!r}, which is no parameter: nestlearn.optim.periods_of takes names"
                )
            check_period(period, f"a parameter of shape {tuple(p.shape)}")
            if id(p) not in known:
                raise UserError(
                    f"a period is given for a parameter of shape {tuple(p.shape)} that the optimizer does not have: "
                    "give it to the optimizer, or leave the period out"
                )
        self.optimizer, self.error = optimizer, error
        self.periods = {p: period for p, period in periods.items() if period > 1}
        self._check_inner(type(optimizer).__name__)
        self.steps = 0
        self._kept: dict[nn.Parameter, Tensor] = {}
        # Those that another LevelwiseOptimizer, which may be gone, has put to rest are not frozen.
        everyone = (p for group in self.param_groups for p in group["params"])
        self._resting: list[nn.Parameter] = [p for p in everyone if RESTS in p.__dict__]
        self._wake()
        self._rest()

    def _check_inner(self, name: str) -> None:
        closure = signature(self.optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is Parameter.empty:
            raise UserError(f"{name} evaluates the loss itself, so its steps have no gradients to gather: use another")
        reads = isinstance(self.optimizer, LayerOptimizer) and self.optimizer.watches
        if reads and self.periods and self.error != "last":
            raise UserError(
                f"{name} reads the inputs of its layers, which are not kept for a level that rests: use error='last'"
            )

    # A copy made together with the model, and pickling: not torch's own, which would leave everything here out

    def __getstate__(self) -> dict[str, Any]:
        # A scheduler has put its own ``step`` here, which steps this optimizer and no copy.
        return {name: value for name, value in self.__dict__.items() if name != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    # What is the inner optimizer's

    def __getattr__(self, name: str) -> Any:
        if name == "optimizer":  # before __init__ has set it
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The inner optimizer's."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The inner optimizer's."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The inner optimizer's."""
        return self.optimizer.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer; its period is 1."""
        self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As `torch.optim.Optimizer.zero_grad`; what is kept for slow levels stays."""
        self.optimizer.zero_grad(set_to_none)

    def __repr__(self) -> str:
        periods = sorted(set(self.periods.values()))
        return f"{type(self).__name__}(error={self.error!r}, periods={periods})\n{self.optimizer}"

    # Eq. 71

    def due(self, p: nn.Parameter) -> bool:
        """Whether the coming step updates ``p``."""
        return (self.steps + 1) % self.periods.get(p, 1) == 0

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the levels that are due; return the closure's loss, if one was given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.error == "last":
            for p in self.periods:
                if not self.due(p):
                    p.grad = None
            self.optimizer.step()
        else:
            self._step_gathered()
        self.steps += 1
        self._rest()
        return loss

    def _step_gathered(self) -> None:
        """A step in which slow parameters gather, or are given what they have gathered. If it is refused, nothing has
        changed."""
        given = {p: p.grad for p in self.periods}
        for p in given:
            self._check(p)
        try:
            for p, gradient in given.items():
                if not self.due(p):
                    p.grad = None
                elif p.requires_grad:
                    p.grad = self._gathered(p, gradient)
            self.optimizer.step()
        except BaseException:
            for p, gradient in given.items():
                p.grad = gradient
            raise
        for p, gradient in given.items():
            if self.due(p) or not p.requires_grad:
                self._kept.pop(p, None)
            elif gradient is not None:
                self._keep(p, gradient)

    def flush(self) -> None:
        """Update now what slow levels have kept of an unfinished chunk, and let every parameter ask for gradients."""
        given = [(p, p.grad) for group in self.param_groups for p in group["params"]]
        for p, _ in given:
            p.grad = None
        try:
            for p in self._kept:
                if p.requires_grad:
                    p.grad = self._gathered(p, None)
            if self._kept:
                self.optimizer.step()
            self._kept.clear()
        finally:
            for p, gradient in given:
                p.grad = gradient
            self._wake()

    def _keep(self, p: nn.Parameter, gradient: Tensor) -> None:
        kept = self._kept.get(p)
        if kept is None:  # a copy: the gradient may lie in a bucket of DistributedDataParallel that is written again
            self._kept[p] = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
        else:
            self._kept[p] = kept.add_(gradient) if gradient.layout == torch.strided else kept + gradient

    def _gathered(self, p: nn.Parameter, gradient: Tensor | None) -> Tensor | None:
        """The error of the chunk that ends with ``gradient``, in the precision of ``p``."""
        kept, period = self._kept.get(p), self.periods.get(p, 1)
        parts = [part for part in (kept, gradient) if part is not None]
        if not parts:
            return None
        total = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        made = (total / period if self.error == "mean" else total).to(p.dtype)
        if made.dtype != total.dtype and made.is_cpu and not made.to_dense().isfinite().all():
            raise NotFiniteGradient(
                f"the gradient of {self._name(p)} over {period} steps is too large for {made.dtype}: "
                "take error='mean', or a parameter in float32"
            )
        return made

    def _check(self, p: nn.Parameter) -> None:
        if p.grad is not None and p.grad.is_cpu and not p.grad.sum().isfinite():
            dense = p.grad.to_dense() if p.grad.is_sparse else p.grad
            if not dense.isfinite().all():
                raise NotFiniteGradient(
                    f"the gradient of {self._name(p)} is not finite: lower the learning rate or clip the gradients"
                )

    def _name(self, p: nn.Parameter) -> str:
        for number, group in enumerate(self.param_groups):
            for index, q in enumerate(group["params"]):
                if q is p:
                    names = group.get("param_names")
                    return repr(names[index]) if names else f"parameter {index} of group {number}"
        raise AssertionError("a period of no parameter")

    def _rest(self) -> None:
        """With ``error="last"``: parameters that the coming step does not update ask for no gradient."""
        if self.error != "last":
            return
        self._wake()
        asking = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        fastest = min((self.periods.get(p, 1) for p in asking), default=1)
        some = any(self.due(p) for p in asking)
        for p in self.periods:
            if not self.due(p) and p.requires_grad and (some or self.periods[p] > fastest):
                p.requires_grad_(False)
                p.__dict__[RESTS] = True
                self._resting.append(p)

    def _wake(self) -> None:
        for p in self._resting:
            p.requires_grad_(True)
            p.__dict__.pop(RESTS, None)
        self._resting.clear()

    # A checkpoint in mid-chunk goes on to the same bits

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's, with the steps taken and what is kept under ``"levelwise"``."""
        places = {id(p): i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}
        kept = {places[id(p)]: gradient for p, gradient in self._kept.items()}
        return {**self.optimizer.state_dict(), "levelwise": {"steps": self.steps, "kept": kept}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict`.

        Raises:
            UserError: a state that another optimizer saved, or one that went through
                `torch.distributed.checkpoint.state_dict`, which leaves out what is kept.
        """
        if "levelwise" not in state_dict:
            raise UserError(
                "this state holds no steps and kept gradients of a LevelwiseOptimizer: give it what its state_dict() "
                "returned, or load the state into the optimizer inside"
            )
        own = state_dict["levelwise"]
        self.optimizer.load_state_dict({key: value for key, value in state_dict.items() if key != "levelwise"})
        here = [p for group in self.param_groups for p in group["params"]]
        self.steps = own["steps"]
        self._kept = {here[int(i)]: g.to(here[int(i)].device, copy=True) for i, g in own["kept"].items()}
        self._rest()


def periods_of(model: nn.Module, periods: Mapping[str, int]) -> dict[nn.Parameter, int]:
    """The period of each parameter, from names of modules or parameters of ``model``.

    Args:
        periods: steps between two updates by name, as `named_modules` and `named_parameters` have them; ``*`` stands
            for anything (``"layers.*.mlp"``). A name covers everything below it.

    Raises:
        UserError: a name that fits nothing, a period that is not a positive integer, or a parameter under two periods.

    >>> periods = periods_of(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), {"1": 8})
    >>> sorted(periods.values())
    [8, 8]
    """
    if not isinstance(periods, Mapping) or not all(isinstance(name, str) for name in periods):
        raise UserError(
            f"periods_of got a {type(periods).__name__} that is no mapping of names: give steps by the name of a "
            'module, as {"layers.0": 8}'
        )
    found: dict[nn.Parameter, int] = {}
    source: dict[nn.Parameter, str] = {}
    modules = [name for name, _ in model.named_modules() if name]
    for pattern, period in periods.items():
        check_period(period, repr(pattern))
        covered = [name for name in modules if fnmatchcase(name, pattern)]
        matched = [
            p
            for name, p in model.named_parameters()
            if fnmatchcase(name, pattern) or any(name.startswith(f"{module}.") for module in covered)
        ]
        if not matched:
            raise UserError(f"no module or parameter with weights is called {pattern!r}; {_close(pattern, model)}")
        for p in matched:
            if found.setdefault(p, period) != period:
                raise UserError(f"{source[p]!r} and {pattern!r} give one parameter two periods: leave one of them out")
            source[p] = pattern
    return found


def check_period(period: Any, what: str) -> None:
    """Raise `UserError` unless ``period`` is a positive integer."""
    if type(period) is not int or period < 1:
        raise UserError(f"the period of {what} is {period!r}: it must be a whole number of steps, 1 or more")


def _close(pattern: str, model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters())]
    clause = nearest(pattern, names).partition(" (allowed")[0]
    return clause if clause.startswith("did you mean") else f"its modules are {', '.join(names[:8])}, ..."

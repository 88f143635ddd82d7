"""What every optimizer here shares: a memory per parameter, written from gradients, read into an update.

A subclass says which tensors a parameter's memory holds (`_memory`) and how a list of parameters is updated in
place (`_update`). Everything else that `torch.optim` users rely on is here: groups, closures, decoupled weight
decay, float32 state under half-precision weights and its exact round trip, and the refusal of gradients that are
not finite.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nestlearn.errors import UserError

State = dict[str, Any]
PIECE = 2**18  # elements of a float32 piece of 1 MiB: the passes over one piece stay in a core's cache


class NotFiniteGradient(RuntimeError):
    """A gradient was infinite or NaN. The message names its parameter."""


class MemoryOptimizer(Optimizer):
    """Base of all optimizers of this package.

    State is created with the parameters, so a checkpoint can be loaded before the first step. It is float32 for
    half-precision parameters and of the parameter's own type otherwise.

    A gradient that is not finite raises `NotFiniteGradient` with the parameter's name (its position, if the groups
    were built without names); of a rule that squares gradients, so does one whose squared norm is not finite (a norm of
    1.8e19 and more in float32). On a CPU that happens before anything is changed. On an accelerator nothing waits for
    the device: that step sees zero gradients instead, and the next `step` or `state_dict` raises.
    """

    _squares = False  # whether the rule squares gradients
    _pending: tuple[Tensor, Callable[[], None], list[Tensor]] | None = None  # a check that is under way; not copied

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        if isinstance(params, nn.Module):
            name, given = type(self).__name__, type(params).__name__
            raise UserError(f"{name} got the module {given}: give its parameters, {name}(model.parameters(), ...)")
        super().__init__(params, {"weight_decay": 0.0, **defaults})

    # For the subclass

    def _memory(self, p: Tensor, group: dict[str, Any]) -> State:
        """The memory of one parameter before the first gradient."""
        raise NotImplementedError

    def _check(self, group: dict[str, Any]) -> None:
        """Raise `UserError` if a hyper-parameter of this group is out of range."""

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], memories: list[State]) -> None:
        """Write the gradients to the memories and read them into the parameters, in place."""
        raise NotImplementedError

    # torch.optim.Optimizer

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see `torch.optim.Optimizer.add_param_group`. Its memories are created at once."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for name in ("lr", "weight_decay"):
                check_range(self, name, group[name], 0.0)
            self._check(group)
            for p in group["params"]:
                if p.is_complex():
                    raise UserError(f"{type(self).__name__} cannot train complex parameters: pass torch.view_as_real")
        except UserError:
            self.param_groups.pop()
            raise
        for p in group["params"]:
            if p.requires_grad:
                self.state[p].update(self._memory(p, group))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update the parameters that have a gradient; return the closure's loss, if one was given."""
        self._raise_pending()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ready = [[p for p in group["params"] if p.grad is not None and p.numel()] for group in self.param_groups]
        grads = self._checked(ready)
        for group, params in zip(self.param_groups, ready, strict=True):
            for p in params:
                self._place(p, group)
            if params and group["weight_decay"]:
                torch._foreach_mul_(params, 1 - float(group["lr"]) * group["weight_decay"])
            if params:
                self._update(group, params, [grads[p] for p in params], [self.state[p] for p in params])
        return loss

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`: tensors and numbers only."""
        self._raise_pending()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state, keeping the precision that it was saved in (torch would cast it to the parameter's)."""
        given: list[dict[str, Any]] = []
        hooks = (  # after the hooks of others that change what is loaded, before those that see what was
            self.register_load_state_dict_pre_hook(lambda _, state: given.append(state)),
            self.register_load_state_dict_post_hook(lambda _: self._refill(given[0]), prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _refill(self, state_dict: dict[str, Any]) -> None:
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        here = [p for group in self.param_groups for p in group["params"]]
        for index, p in zip(saved, here, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    device = p.device if value.ndim else value.device  # counters stay where they were
                    self.state[p][key] = value.detach().to(device=device, copy=True)

    # Gradients

    def _checked(self, ready: list[list[Tensor]]) -> dict[Tensor, Tensor]:
        """Every gradient, dense and in the precision of the state, after the refusal of those that are not finite."""
        params = [p for group in ready for p in group]
        grads = [_dense_gradient(p) for p in params]
        if not params:
            return {}
        if _on_cpu(grads):
            # A norm is finite only if its terms are, and is the cheapest pass. If one overflowed and the rule squares
            # nothing, the terms are looked at.
            finite = torch.stack([torch.linalg.vector_norm(g, dtype=state_dtype(g)) for g in grads]).isfinite()
            if not finite.all():
                suspects = [p for p, good in zip(params, finite.tolist(), strict=True) if not good]
                spoiled = [p for p in suspects if self._squares or not _dense_gradient(p).isfinite().all()]
                if spoiled:
                    raise NotFiniteGradient(self._refusal(spoiled))
        else:
            device = next((g.device for g in grads if not g.is_cpu), grads[0].device)
            largest = [n.to(state_dtype(n)) for n in torch._foreach_norm(grads, math.inf)]
            if self._squares:
                largest = [n.square() * g.numel() for n, g in zip(largest, grads, strict=True)]
            finite = torch.stack([n.to(device) for n in largest]).isfinite()
            self._pending = (*_copy_to_host(finite), params)
            every = finite.all()
            grads = [torch.where(every.to(g.device), g, 0) for g in grads]
        return {p: g.to(state_dtype(g)) for p, g in zip(params, grads, strict=True)}

    def _raise_pending(self) -> None:
        if self._pending is None:
            return
        flags, wait, params = self._pending
        self._pending = None
        wait()  # for the step before: done long since
        if not flags.all():
            spoiled = [p for p, good in zip(params, flags.tolist(), strict=True) if not good]
            raise NotFiniteGradient(self._refusal(spoiled, "; that step saw zero gradients"))

    def _refusal(self, spoiled: list[Tensor], after: str = "") -> str:
        names = [self._name(p) for p in spoiled]
        listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        fault = "is not finite" + (", or too large to be squared" if self._squares else "")
        return f"the gradient of {listed} {fault}{after}: lower the learning rate or clip the gradients"

    def _place(self, p: Tensor, group: dict[str, Any]) -> None:
        """The memory of a parameter that was frozen when it was added, or that has moved to another device."""
        state = self.state[p]
        if not state:
            state.update(self._memory(p, group))
        for key, value in state.items():
            if isinstance(value, Tensor) and value.ndim and value.device != p.device:
                state[key] = value.to(p.device)

    def _name(self, parameter: Tensor) -> str:
        for number, group in enumerate(self.param_groups):
            for index, p in enumerate(group["params"]):
                if p is parameter:
                    if "param_names" in group:
                        return repr(group["param_names"][index])
                    return f"parameter {index} of group {number}, shape {tuple(p.shape)}"
        raise AssertionError("a gradient of no group")


def _dense_gradient(p: Tensor) -> Tensor:
    assert p.grad is not None
    return p.grad.to_dense() if p.grad.is_sparse else p.grad


def _on_cpu(tensors: list[Tensor]) -> bool:
    return all(t.is_cpu for t in tensors)


def _copy_to_host(flags: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """A copy that is under way, and how to wait for it."""
    copy = torch.empty(flags.shape, dtype=flags.dtype, pin_memory=flags.is_cuda)
    copy.copy_(flags, non_blocking=True)
    event = torch.Event(flags.device)
    event.record()
    return copy, event.synchronize


def state_dtype(p: Tensor) -> torch.dtype:
    """The precision of a parameter's memory: float32, or float64 for float64."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def zeros(p: Tensor) -> Tensor:
    """A memory of the parameter's shape that knows nothing."""
    return torch.zeros_like(p, dtype=state_dtype(p), memory_format=torch.contiguous_format)


def is_sharded(t: Tensor) -> bool:
    """Whether several processes hold a part each (a `DTensor`, as FSDP2 makes it)."""
    return hasattr(t, "full_tensor")


def refuse_sharded(optimizer: object, parameters: Iterable[Tensor]) -> None:
    """Raise `UserError` if a parameter is sharded, for optimizers that need whole rows."""
    if any(map(is_sharded, parameters)):
        name = type(optimizer).__name__
        raise UserError(f"{name} got sharded parameters (DTensor): use it without FSDP, or with DDP")


def as_matrix(t: Tensor) -> Tensor:
    """A view (d_out, d_in): kernels of a convolution flattened per output, a vector as one row.

    >>> as_matrix(torch.zeros(8, 3, 5, 5)).shape, as_matrix(torch.zeros(7)).shape
    (torch.Size([8, 75]), torch.Size([1, 7]))
    """
    return t.reshape(1, -1) if t.ndim < 2 else t.flatten(1)


def sweep(*lists: list[Tensor]) -> Iterator[tuple[list[Tensor], ...]]:
    """Batches for element-wise work on lists of tensors of equal shapes.

    On an accelerator that is every tensor at once, for few and large kernels; on a CPU one cache-sized piece at a
    time, which is twice as fast as whole tensors when an update makes several passes; a sharded one cannot be cut
    into such pieces.
    """
    if not lists[0][0].is_cpu:
        yield lists
        return
    for tensors in zip(*lists, strict=True):
        small = tensors[0].numel() <= PIECE
        if small or is_sharded(tensors[0]) or not all(t.is_contiguous() for t in tensors):
            yield tuple([t] for t in tensors)
            continue
        for pieces in zip(*(t.view(-1).split(PIECE) for t in tensors), strict=True):
            yield tuple([piece] for piece in pieces)


def by_step(memories: list[State]) -> Iterator[tuple[int, list[int]]]:
    """Count one more step in each memory's ``"step"``; per count the positions that have it: all at once, as a rule."""
    positions: dict[int, list[int]] = {}
    for i, state in enumerate(memories):
        state["step"] += 1
        positions.setdefault(int(state["step"]), []).append(i)
    yield from positions.items()


def is_number(value: object) -> bool:
    """Whether ``value`` is a real number or a tensor of one."""
    return isinstance(value, Real) or (isinstance(value, Tensor) and value.numel() == 1)


def check_range(optimizer: object, name: str, value: Any, low: float, high: float | None = None) -> None:
    """Raise `UserError` unless ``value`` is a number (or a tensor of one) and ``low <= value <= high``; it must be
    finite without ``high``."""
    if not is_number(value) or not low <= float(value) <= (sys.float_info.max if high is None else high):
        if high is None:
            allowed = f"{low:g} or more, and finite"
        else:
            allowed = f"from {low:g} to {high:g}" if high < math.inf else f"{low:g} or more"
        raise UserError(f"{type(optimizer).__name__} got {name}={value!r}: it must be {allowed}")


def check_all(optimizer: object, group: dict[str, Any], ranges: Iterable[tuple[str, float, float]]) -> None:
    """`check_range` for several hyper-parameters of a group."""
    for name, low, high in ranges:
        check_range(optimizer, name, group[name], low, high)

"""What each layer reads: the keys of the associative memories that its weights are (Eq. 29-31).

A linear layer, a convolution or an embedding is a memory ``y = W x``: x is the layer's input, a patch of it, or a
one-hot token. Gradients do not hold x, so optimizers with an objective of their own (Eq. 56-60) watch the layers.
`Grams` keeps what the square objective needs, the second moment of x. `Pairs` keeps the rows (x, dL/dy) themselves.

Shapes: a weight is (o, k) with k inputs, or (groups, o / groups, k) for a grouped convolution; keys are (n, k) or
(groups, n, k). An embedding's keys are one-hot, so its second moment is diagonal: (num_embeddings,).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from nestlearn.errors import UserError
from nestlearn.optim.base import MemoryOptimizer, as_matrix, refuse_sharded, state_dtype

PATCHES = 2**22  # elements of the patches of a convolution that are unfolded at once: 16 MiB in float32
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
CONVOLUTIONS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward)
Kind = tuple[str, int]  # "rows" and the number of groups, or "table"


def kind_of(module: nn.Module) -> Kind | None:
    """The kind of keys that the weight of ``module`` multiplies, or None.

    A subclass with a forward of its own may multiply something else than its input, so it is not known.

    >>> kind_of(nn.Conv1d(4, 8, 3, groups=2)), kind_of(nn.Embedding(9, 4)), kind_of(nn.LayerNorm(4))
    (('rows', 2), ('table', 1), None)
    """
    forward = type(module).forward
    if forward is nn.Linear.forward:
        return "rows", 1
    if isinstance(module, Convolution) and forward in CONVOLUTIONS:
        return "rows", module.groups
    return ("table", 1) if forward is nn.Embedding.forward else None


def grouped(w: Tensor, groups: int = 1) -> Tensor:
    """A weight or its gradient as a matrix (o, k), or (groups, o / groups, k)."""
    matrix = as_matrix(w)
    return matrix if groups == 1 else matrix.unflatten(0, (groups, -1))


def pieces(module: nn.Module, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The input of a layer and its output (or dL/dy), cut so that the patches of a convolution stay small."""
    if not isinstance(module, Convolution):
        yield x, y
        return
    if x.ndim == 1 + len(module.kernel_size):  # no batch dimension
        x, y = x[None], y[None]
    patch = x.shape[1] * math.prod(module.kernel_size)
    size = max(1, PATCHES // max(1, patch * math.prod(y.shape[2:])))
    yield from zip(x.split(size), y.split(size), strict=True)


def keys_of(module: nn.Module, x: Tensor) -> Tensor:
    """The rows that the weight of a linear layer or convolution multiplies: (n, k) or (groups, n, k)."""
    if not isinstance(module, Convolution):
        return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])  # not by -1: a width may be 0
    keys = patches(module, x)
    return keys[0] if module.groups == 1 else keys


def answers_of(module: nn.Module, y: Tensor) -> Tensor:
    """The rows that belong to `keys_of` in the output, or in dL/dy: (n, o) or (groups, n, o / groups)."""
    if not isinstance(module, Convolution):
        return y.reshape(math.prod(y.shape[:-1]), y.shape[-1])
    rows = y.unflatten(1, (module.groups, -1)).flatten(3).permute(1, 0, 3, 2).flatten(1, 2)
    return rows[0] if module.groups == 1 else rows


def patches(layer: Convolution, x: Tensor) -> Tensor:
    """What each position of a convolution reads: (B, C, *space) -> (groups, B * positions, C / groups * kernel).

    >>> patches(nn.Conv2d(3, 8, 5, stride=2), torch.zeros(2, 3, 9, 9)).shape
    torch.Size([1, 18, 75])
    """
    dims = range(len(layer.kernel_size))
    margins: list[int] = []
    for i in reversed(dims):  # F.pad starts at the last dimension
        reach = layer.dilation[i] * (layer.kernel_size[i] - 1)
        if layer.padding == "same":
            margins += [reach // 2, reach - reach // 2]
        else:
            margins += [0, 0] if isinstance(layer.padding, str) else [layer.padding[i]] * 2
    if any(margins):
        x = F.pad(x, margins, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    for i in dims:
        step = layer.dilation[i]
        x = x.unfold(2 + i, step * (layer.kernel_size[i] - 1) + 1, layer.stride[i])[..., ::step]
    n = len(dims)
    x = x.unflatten(1, (layer.groups, -1))  # (B, groups, C / groups, *positions, *kernel)
    x = x.permute(1, 0, *range(3, 3 + n), 2, *range(3 + n, 3 + 2 * n))
    return x.flatten(2 + n).flatten(1, 1 + n)


class Inputs:
    """Forward hooks on the layers of a model whose kind of keys is known.

    They look only in training mode and while gradients are enabled. A weight that is two kinds of key at once (an
    embedding tied to a head) is left out. A copy of the model is not watched, and nothing here is kept alive by the
    model: the hooks go with this object, or with ``close()``.
    """

    def __init__(self, model: nn.Module, kinds: tuple[str, ...] = ("rows", "table")) -> None:
        claims: dict[Tensor, set[Kind]] = {}
        layers: list[tuple[nn.Module, Tensor]] = []
        for module in model.modules():
            kind, weight = kind_of(module), module._parameters.get("weight")  # a parametrized weight is not in there
            if kind and weight is not None:
                claims.setdefault(weight, set()).add(kind)
                layers.append((module, weight))
        self.kinds = {p: next(iter(found)) for p, found in claims.items() if len(found) == 1}
        self.kinds = {p: kind for p, kind in self.kinds.items() if kind[0] in kinds}
        hook = _Hook(self)
        handles = [m.register_forward_hook(hook, with_kwargs=True) for m, p in layers if p in self.kinds]
        self.close = weakref.finalize(self, _remove, handles)

    def clear(self) -> None:
        """Forget everything read so far, as zero_grad forgets the gradients."""
        raise NotImplementedError

    def read(self, weight: Tensor, module: nn.Module, x: Tensor, y: Tensor) -> None:
        """Record one call of a layer."""
        raise NotImplementedError


class _Hook:
    """The forward hook of `Inputs`. A copied or unpickled model gets one that does nothing."""

    def __init__(self, inputs: Inputs | None = None) -> None:
        self._inputs: Callable[[], Inputs | None] = weakref.ref(inputs) if inputs else lambda: None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Hook, ()

    @torch.compiler.disable
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> None:
        inputs, weight = self._inputs(), module._parameters.get("weight")
        if inputs is None or weight is None or weight not in inputs.kinds:  # a functional call swaps the weight
            return
        if module.training and torch.is_grad_enabled() and weight.requires_grad:
            x = args[0] if args else kwargs["input"]
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                inputs.read(weight, module, x.detach(), y)


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


class Grams(Inputs):
    """The second moment ``mean_b x_b x_b^T`` of what each weight read since `clear`.

    Sums and counts grow over micro-batches. A forward that activation checkpointing repeats doubles both, which
    leaves the mean as it is.

    >>> layer = nn.Linear(2, 1); grams = Grams(layer)
    >>> y = layer(torch.tensor([[1.0, 0.0], [0.0, 2.0]])); grams.mean(layer.weight)
    tensor([[0.5000, 0.0000],
            [0.0000, 2.0000]])
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._sums: dict[Tensor, Tensor] = {}
        self._rows: dict[Tensor, int] = {}

    def clear(self) -> None:
        self._sums.clear()
        self._rows.clear()

    def read(self, weight: Tensor, module: nn.Module, x: Tensor, y: Tensor) -> None:
        if weight not in self._sums:
            self._sums[weight] = self._nothing(weight, x.device)
        total, rows = self._sums[weight], self._rows.get(weight, 0)
        if isinstance(module, nn.Embedding):
            ones = torch.ones(x.numel(), dtype=total.dtype, device=x.device)
            if module.padding_idx is not None:  # reads as a key of zeros: that row has no gradient either
                ones = (x.reshape(-1) != module.padding_idx).to(total.dtype)
            total.scatter_add_(0, x.reshape(-1).long(), ones)
            self._rows[weight] = rows + x.numel()
            return
        for part, _ in pieces(module, x, y):
            keys = keys_of(module, part).to(total.dtype)
            total += keys.mT @ keys
            rows += keys.shape[-2]
        self._rows[weight] = rows

    def _nothing(self, weight: Tensor, device: torch.device) -> Tensor:
        kind, groups = self.kinds[weight]
        k = math.prod(weight.shape[1:])
        square = (k, k) if groups == 1 else (groups, k, k)
        shape = (weight.shape[0],) if kind == "table" else square
        return torch.zeros(shape, dtype=state_dtype(weight), device=device)

    def mean(self, weight: Tensor) -> Tensor | None:
        """The moment (k, k), (groups, k, k) or, for an embedding, its diagonal; None if the weight read nothing.

        One that is not finite comes back as zeros: the gradient of that weight is then about to be refused.
        """
        if weight not in self.kinds or (not parallel() and not self._rows.get(weight)):
            return None
        total, rows = self._sums.get(weight), self._rows.get(weight, 0)
        if total is None:
            total = self._nothing(weight, weight.device)
        if parallel():  # rows travel with the sum, so that nothing waits for a number from the device
            whole = over_processes(torch.cat([total.flatten(), total.new_tensor([float(rows)])]))
            mean = whole[:-1].view_as(total) / whole[-1].clamp(min=1)
        else:
            mean = total / rows
        return torch.where(mean.sum().isfinite(), mean, 0)


@dataclass(eq=False)
class _Call:
    """One call of a layer: what it read."""

    module: nn.Module
    x: Tensor


class Pairs(Inputs):
    """The rows (x, dL/dy) of each linear layer and convolution since `clear`.

    A row counts when a backward pass reaches it, so a repeated forward adds nothing. The inputs stay in memory until
    then, those of checkpointed layers too.

    >>> layer = nn.Linear(2, 1); pairs = Pairs(layer)
    >>> layer(torch.ones(3, 2)).sum().backward(); pairs.rows(layer.weight)
    3
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, kinds=("rows",))
        self._deltas: dict[Tensor, dict[_Call, Tensor]] = {}

    def clear(self) -> None:
        self._deltas.clear()

    def read(self, weight: Tensor, module: nn.Module, x: Tensor, y: Tensor) -> None:
        if not y.requires_grad:
            return
        call = _Call(module, x)
        owner = weakref.ref(self)

        def arrive(delta: Tensor) -> None:
            here = owner()
            if here is not None:
                here._arrive(weight, call, delta.detach())

        y.register_hook(arrive)

    @torch.compiler.disable
    def _arrive(self, weight: Tensor, call: _Call, delta: Tensor) -> None:
        deltas = self._deltas.setdefault(weight, {})
        deltas[call] = deltas[call] + delta if call in deltas else delta  # two backward passes through one call

    def rows(self, weight: Tensor) -> int:
        """How many rows the weight read, over all processes; 0 for a weight that is not watched."""
        if weight not in self.kinds:
            return 0
        rows = sum(delta.numel() for delta in self._deltas.get(weight, {}).values()) // max(1, weight.shape[0])
        return int(over_processes(torch.tensor(rows, device=weight.device))) if parallel() else rows

    def of(self, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The rows of this process in the precision of the state: (n, k) and (n, o), or with groups in front."""
        dtype = state_dtype(weight)
        for call, whole in self._deltas.get(weight, {}).items():
            for x, delta in pieces(call.module, call.x, whole):
                yield keys_of(call.module, x).to(dtype), answers_of(call.module, delta).to(dtype)


def parallel() -> bool:
    """Whether `torch.distributed` runs several processes."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def over_processes(t: Tensor) -> Tensor:
    """``t`` summed over the processes, in place."""
    if parallel():
        distributed.all_reduce(t)
    return t


class LayerOptimizer(MemoryOptimizer):
    """An optimizer that sees what each layer reads. It takes the model, not its parameters.

    What was read is treated like the gradients: it grows over micro-batches, and `step` and `zero_grad` forget it.
    A forward in training mode with gradients enabled counts even if its loss is not used; put one that should not
    under ``torch.no_grad()``. Under `torch.distributed` the rows of all processes count, as for gradients (DDP).
    """

    _inputs: Inputs | None = None

    def __init__(self, model: nn.Module, defaults: dict[str, Any]) -> None:
        name = type(self).__name__
        if not isinstance(model, nn.Module):
            raise UserError(f"{name} got {type(model).__name__}: it needs the inputs of the layers, give it the module")
        refuse_sharded(self, model.parameters())
        super().__init__(model.named_parameters(), defaults)
        self._model, self._inputs = model, self._watch(model)

    def _watch(self, model: nn.Module) -> Inputs | None:
        """What watches the layers of the model; None if nothing needs to."""
        raise NotImplementedError

    @property
    def watches(self) -> bool:
        """Whether it reads what the layers of its model read."""
        return self._inputs is not None and self._inputs.close.alive

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps only groups and state. A copy made together with its model watches the copied one.
        own = {name: value for name, value in self.__dict__.items() if name in ("_model", "_objective", "_value")}
        return {**super().__getstate__(), **own, "_watching": self.watches}

    def __setstate__(self, state: dict[str, Any]) -> None:
        watching = state.pop("_watching", None)
        super().__setstate__(state)
        if watching is not None:  # torch comes here with every load_state_dict too
            self._inputs = self._watch(self._model)
            if not watching:
                self.close()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """As `MemoryOptimizer.step`; then forget what the layers read."""
        loss = super().step(closure)
        self._forget()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As `torch.optim.Optimizer.zero_grad`; forget what the layers read too."""
        super().zero_grad(set_to_none)
        self._forget()

    def _forget(self) -> None:
        if self._inputs is not None:
            self._inputs.clear()

    def close(self) -> None:
        """Stop watching the model; from then on every parameter is treated as one without an input."""
        self._forget()
        if self._inputs is not None:
            self._inputs.close()

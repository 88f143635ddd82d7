"""Which implementation of the core runs: the environment variable ``NESTLEARN_OPS``.

``torch``, the default on every device, is the chunk-parallel form; ``reference`` the token-by-token oracle, in place of
it in any model; ``triton`` the kernels for a GPU, for linear and for MLP memories: they have never run on one and are
not chosen unasked.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nestlearn.errors import UserError, nearest
from nestlearn.ops import reference
from nestlearn.ops.rule import Start, WriteRule
from nestlearn.ops.state import CoreState

if TYPE_CHECKING:
    from nestlearn.ops.linear import LinearKernel, Packed
    from nestlearn.ops.mlp import MLPKernel

VARIABLE = "NESTLEARN_OPS"
BACKENDS = ("reference", "torch", "triton")


def backend() -> str:
    """The implementation that ``NESTLEARN_OPS`` asks for.

    Raises:
        UserError: another value, or Triton where it is not installed.

    >>> backend() in BACKENDS
    True
    """
    name = os.environ.get(VARIABLE, "torch")
    if name not in BACKENDS:
        raise UserError(f"unknown {VARIABLE}={name!r}: {nearest(name, BACKENDS)}")
    if name == "triton" and importlib.util.find_spec("triton") is None:
        raise UserError(f"{VARIABLE}=triton needs the triton package (pip install triton): or take 'torch'")
    return name


def by_reference(
    inputs: Mapping[str, Tensor],
    start: Start,
    rule: WriteRule,
    kernel: LinearKernel | MLPKernel,
    state: CoreState | None,
    lengths: Tensor | None,
) -> tuple[Tensor, CoreState]:
    """:func:`nestlearn.ops.self_modify` by the oracle. Rows that do not count read as zero.

    Raises:
        UserError: the Omega rule, whose carried pairs the oracle keeps in another form.
    """
    if rule.update == "omega":
        raise UserError(f"{VARIABLE}=reference does not carry the window of update='omega': take 'torch'")
    batch, heads, tokens, _ = inputs["q"].shape
    if state is not None and state.clock.shape[0] != batch:
        raise UserError(f"the state holds {state.clock.shape[0]} sequences, the input {batch}: they must agree")
    counts = [tokens] * batch if lengths is None else lengths.tolist()
    outputs, rows = [], []
    for b, count in enumerate(counts):
        ends = []
        for h in range(heads):
            head = reference.of_head(start, h)
            given = {name: x[b, h, :count] for name, x in inputs.items()}
            y, end = reference.run(
                given, head, rule, None if state is None else _unpack(kernel, head, rule, state, b, h)
            )
            outputs.append(torch.cat([y, y.new_zeros(tokens - count, y.shape[-1])]))
            ends.append(end)
        rows.append(ends)
    fields = ("state", "anchor", "momentum") if start.momentum is not None else ("state", "anchor")
    packed = {
        field: tuple(
            torch.stack(ws)
            for ws in zip(*(_pack(kernel, rule, [getattr(end, field) for end in ends]) for ends in rows), strict=True)
        )
        for field in fields
    }
    if rule.retention == "start":  # a state holds anchors as it holds what is written, on top of the start
        packed["anchor"] = tuple(a - w for a, w in zip(packed["anchor"], kernel.pack(), strict=True))
    clock = torch.tensor([ends[0].clock for ends in rows], dtype=torch.long)
    y = torch.stack(outputs).unflatten(0, (batch, heads))
    return y, CoreState(packed["state"], packed["anchor"], packed.get("momentum", ()), clock)


def _pack(kernel: LinearKernel | MLPKernel, rule: WriteRule, heads: list[dict[str, tuple[Tensor, ...]]]) -> Packed:
    weights = {name: tuple(map(torch.stack, zip(*(h[name] for h in heads), strict=True))) for name in kernel.names}
    return type(kernel)(Start(weights, kernel.start.bias), rule).pack()


def _unpack(
    kernel: LinearKernel | MLPKernel, head: Start, rule: WriteRule, state: CoreState, b: int, h: int
) -> reference.Carried:
    """What one head carries, from a packed state."""
    of = lambda packed: kernel.named(tuple(w[b, h] for w in packed))  # noqa: E731
    anchor = of(state.anchor)
    if rule.retention == "start":
        anchor = {name: tuple(map(torch.add, head.weights[name], ws)) for name, ws in anchor.items()}
    zero = {name: tuple(map(torch.zeros_like, ws)) for name, ws in anchor.items()}
    momentum = of(state.momentum) if state.momentum else zero
    return reference.Carried(of(state.current), anchor, momentum, [], int(state.clock[b]))

"""What the kernels can do, said before they are asked to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nestlearn.ops.rule import MEMORY, Start, WriteRule, transformed

MEMORIES = ("eta", "alpha", "k", "v", MEMORY)
"""The memories of the kernels, in packing order; the query is given."""
SWITCHES = {
    "update": "dgd",
    "read": "inclusive",
    "retention": "start",
    "delta": True,
    "decay": True,
    "self_values": True,
    "bounded": True,
    "normalize_v": True,
    "clip_values": True,
}
OBJECTIVES = {"linear": "dot", "mlp": "l2"}
"""The objective of each structure."""
SHORTEST = 16
"""The least tokens and channels of a tile, which a product takes."""
WIDEST, LONGEST = 128, 64
"""Channels of a head, hidden ones of an MLP memory, and tokens of a chunk that fit a tile. Where it does not fit the
memory of a GPU, the launch of a kernel says so in one line; `docs/performance.md` says what a compiler makes of it."""


def tile(size: int) -> int:
    """The tokens or channels of the tile that holds so many: a power of two.

    >>> tile(11), tile(33)
    (16, 64)
    """
    return max(SHORTEST, 1 << (size - 1).bit_length())


def unsupported(inputs: Mapping[str, Tensor], start: Start, rule: WriteRule) -> str | None:
    """The first thing asked for that the kernels do not do, in a sentence; None if they do all of it.

    They do the memories of :class:`nestlearn.nn.SelfReferentialTitans` at its default switches, linear or MLP, with any
    step sizes, write scales and norm limit; heads that accumulate, of linear memories; inputs in float32 or bfloat16,
    the start in float32. Everything else is the chunk form's, ``NESTLEARN_OPS=torch``.

    >>> start = Start({"memory": (torch.zeros(1, 4, 4),)}, {"eta": torch.zeros(1)})
    >>> unsupported({}, start, WriteRule(objective="l2"))
    "objective='l2' is not supported for linear memories, only objective='dot'"
    """
    if transformed():
        return "a transform of torch.func (grad, vmap, jvp) is not supported"
    kind = "linear" if len(start.weights[MEMORY]) == 1 else "mlp"
    if rule.objective != OBJECTIVES[kind]:
        known = f"only objective={OBJECTIVES[kind]!r}"
        return f"objective={rule.objective!r} is not supported for {kind} memories, {known}"
    for name, value in SWITCHES.items():
        if getattr(rule, name) != value:
            return f"{name}={getattr(rule, name)!r} is not supported, only {name}={value!r}"
    if rule.norm_limit is None:
        return "norm_limit=None is not supported, only a number"
    if rule.other != rule.chunk_size:
        return f"chunk_size_other={rule.other} is not supported, only that of the main memory, {rule.chunk_size}"
    if rule.chunk_size > LONGEST:
        return f"chunk_size={rule.chunk_size} is not supported, only up to {LONGEST} tokens"
    if start.momentum is not None:
        return "momentum is not supported, only an update without it"
    if start.names != MEMORIES:
        made, known = (", ".join(names) for names in (start.names, MEMORIES))
        return f"memories of {made} are not supported, only those of {known}"
    first = start.weights[MEMORY][-1]
    if first.shape[-1] > WIDEST:
        return f"a head of {first.shape[-1]} channels is not supported, only up to {WIDEST}"
    if kind == "mlp" and first.shape[-2] > WIDEST:
        return f"memory_hidden={first.shape[-2]} is not supported, only up to {WIDEST}"
    for what, tensor, known in (
        *((f"inputs[{name!r}]", x, (torch.float32, torch.bfloat16)) for name, x in inputs.items()),
        *((f"the start of {name!r}", w, (torch.float32,)) for name, ws in start.weights.items() for w in ws),
    ):
        if tensor.dtype not in known:
            return f"{what} in {tensor.dtype} is not supported, only in {' or '.join(map(str, known))}"
    return None

"""One token at a time: the core's update without the tables of a chunk.

Generating text calls the core with a single token, where the chunk-parallel form of ``nestlearn.ops`` is all overhead:
its tables are single numbers and its triangular solve does nothing. Here is the same update of linear memories (Eq. 92,
93) written down for one token inside a chunk. A token that begins a chunk, where anchors move, goes the general way, so
this is a third to a half of the work for all but one token in ``chunk_size``. No gradient is kept.

Shapes: B rows, H heads, d channels of a head, R rows of all memories packed as in ``ops.linear``.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from nestlearn.memory import objectives
from nestlearn.ops import GATES, MEMORY, CoreState, Start, WriteRule
from nestlearn.ops.backend import backend
from nestlearn.ops.rule import clip, gates, unit


def inside_chunk(start: Start, rule: WriteRule, state: CoreState) -> bool:
    """Whether :func:`write_token` covers the next token: memories that :func:`covered` names, no row at the beginning
    of a chunk."""
    return covered(start, rule) and within_chunk(rule, state.clock)


def covered(start: Start, rule: WriteRule) -> bool:
    """Whether the memories are linear and written by DGD or the delta rule, without momentum, no gradient is kept and
    no other implementation asked for."""
    return (
        backend() == "torch"
        and not torch.is_grad_enabled()
        and len(start.weights[MEMORY]) == 1
        and start.momentum is None
        and rule.update in ("dgd", "delta")
    )


def within_chunk(rule: WriteRule, clock: Tensor) -> bool:
    """Whether no row is at the beginning of a chunk."""
    return all(now % rule.chunk_size and now % rule.other for now in clock.tolist())


def write_token(
    inputs: Mapping[str, Tensor], start: Start, rule: WriteRule, state: CoreState
) -> tuple[Float[Tensor, "B H 1 d"], CoreState]:
    """What :func:`nestlearn.ops.self_modify` gives for one token of every row, where :func:`inside_chunk` holds.

    Args:
        inputs: by name, (B, H, 1, d), or (B, H, 1) of a gate that no memory generates.
        start: the learned initial state of every memory.
        rule: switches of the update.
        state: after the tokens before.
    """
    names, made = start.names, dict(inputs)
    base = torch.cat([start.weights[name][0] for name in names], dim=-2)
    (current,), (anchor,) = state.current, state.anchor
    from_start = rule.retention == "start"
    weights = base + anchor if from_start else anchor
    sizes = [start.weights[name][0].shape[-2] for name in names]

    row = 0
    for _, group in groupby(names[:-1], key=lambda name: id(inputs[name])):  # one product for those that read the same
        together = list(group)
        rows = [1 if name in GATES else sizes[-1] for name in together]
        y = inputs[together[0]] @ weights[..., row : row + sum(rows), :].mT
        for name, part in zip(together, torch.split_with_sizes(y, rows, dim=-1), strict=True):
            made[name] = part.squeeze(-1) if name in GATES else part
        row += sum(rows)
    eta, log_alpha = gates(made["eta"], made.get("alpha"), start, rule)
    alpha = log_alpha.exp().unsqueeze(-1)  # (B, H, 1, 1)
    eta = eta.unsqueeze(-1)
    k, q = unit(made["k"]), unit(made["q"])
    v = unit(made["v"]) if rule.normalize_v else made["v"]
    if rule.update == "delta":
        eta, v = eta * alpha, v / alpha

    target = _targets(weights, v, start, rule, len(names))
    answer = target if rule.objective == "dot" else k @ weights.mT
    error = objectives.get(rule.objective).error(answer, target)
    if start.write_scale:
        ones = eta.new_ones(eta.shape[1])
        scales = [
            start.write_scale.get(name, ones)[:, None].expand(-1, r) for name, r in zip(names, sizes, strict=True)
        ]
        error = error * torch.cat(scales, dim=-1).unsqueeze(1)
    write = -eta * error
    if rule.erases:
        erasing = eta if start.erase is None else eta * start.erase[:, None, None]
        write = write - erasing * (k @ current.mT)
    written = alpha * current + write.mT * k

    read = anchor if rule.read == "anchor" else written
    memory = read[..., -sizes[-1] :, :]
    y = q @ (memory + start.weights[MEMORY][0] if from_start else memory).mT
    return y, CoreState((written,), state.anchor, (), state.clock + 1)


def _targets(weights: Tensor, v: Tensor, start: Start, rule: WriteRule, memories: int) -> Tensor:
    """The value that each row is asked to give, (B, H, 1, R): self-generated (Eq. 84), or ``v``."""
    gated = sum(name in GATES for name in start.names)
    vectors = memories - gated
    if rule.self_values and rule.update == "dgd":
        made = v @ weights.mT
        values = clip(made[..., gated:].view(*v.shape[:2], vectors, 1, v.shape[-1]), rule)
        if start.accumulates is not None:
            given = start.accumulates[:, None, None, None]
            values = torch.cat([values[:, :, :-1], torch.where(given, v.unsqueeze(2), values[:, :, -1:])], dim=2)
        values = values.flatten(2).unsqueeze(2)
    else:
        made = v @ weights[..., :gated, :].mT if gated else v
        values = torch.cat([v] * vectors, dim=-1) if vectors > 1 else v
    # A gate's value is one number.
    return torch.cat([clip(made[..., :gated].unsqueeze(-1), rule).squeeze(-1), values], dim=-1) if gated else values

"""The oracle: the self-referential core token by token, as plain as Eq. 83-90. Slow, and right in float64.

Every fast form in this package is tested against it, outputs, states and gradients. One sequence, one head
at a time; differentiable in everything that it is given.

Notation: ``S`` is what a weight matrix carries through time and ``W = base + S`` what is read, where ``base``
is zero (retention toward zero, ``S`` starts at the learned weights) or the learned initial weights
(retention toward the start, ``S`` starts at zero).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from nestlearn.memory import objectives, rules
from nestlearn.memory.rules import dgd, outer
from nestlearn.memory.structures import LinearMemory, MLPMemory, Weights
from nestlearn.ops.rule import GATES, MEMORY, REACH, Start, WriteRule, clip, gates, limit, unit


def self_modify(
    inputs: Mapping[str, Tensor], start: Start, rule: WriteRule
) -> tuple[Tensor, list[list[dict[str, Weights]]]]:
    """Run the core from its initial state.

    Args:
        inputs: by the names of ``PROJECTIONS``, what the memory of that name reads, (B, H, T, d), or, where there
            is none, the projection itself: ``q``, ``k``, ``v`` (B, H, T, d), raw ``eta``, ``alpha`` (B, H, T).

    Returns:
        The outputs (B, H, T, d), and the final weights of every memory by ``[batch][head][name]``.
    """
    outputs, states = [], []
    batch, heads = inputs["q"].shape[:2]
    for b in range(batch):
        rows, finals = [], []
        for h in range(heads):
            head = of_head(start, h)
            y, end = run({name: x[b, h] for name, x in inputs.items()}, head, rule)
            on_top = rule.retention == "start"
            rows.append(y)
            finals.append(
                {
                    name: tuple(b + s for b, s in zip(head.weights[name], ss, strict=True)) if on_top else ss
                    for name, ss in end.state.items()
                }
            )
        outputs.append(torch.stack(rows))
        states.append(finals)
    return torch.stack(outputs), states


def of_head(start: Start, h: int) -> Start:
    """The start of one head, without the dimension of heads."""
    return Start(
        weights={name: tuple(w[h] for w in ws) for name, ws in start.weights.items()},
        bias={name: value[h : h + 1] for name, value in start.bias.items()},
        write_scale={name: value[h] for name, value in start.write_scale.items()},
        momentum=None if start.momentum is None else start.momentum[h],
        erase=None if start.erase is None else start.erase[h],
        accumulates=None if start.accumulates is None else start.accumulates[h],
    )


class Carried(NamedTuple):
    """What one head carries from token to token: ``S``, the anchors and the momentum of every memory, the last pairs
    of the Omega rule, and the tokens seen."""

    state: dict[str, Weights]
    anchor: dict[str, Weights]
    momentum: dict[str, Weights]
    pairs: list[tuple[Tensor, Tensor]]
    clock: int


def _structure(name: str, weights: Weights) -> LinearMemory | MLPMemory:
    if len(weights) == 1:
        return LinearMemory(weights[0].shape[1], weights[0].shape[0])
    skip = False if name in GATES else None  # also where a head has one channel
    return MLPMemory(weights[1].shape[1], weights[0].shape[0], weights[0].shape[1], skip)


def run(
    inputs: Mapping[str, Tensor], start: Start, rule: WriteRule, carried: Carried | None = None
) -> tuple[Tensor, Carried]:
    """Outputs (T, d) of one sequence and head, and what is carried after its last token."""
    memories = {name: _structure(name, start.weights[name]) for name in start.names}
    objective = objectives.get(rule.objective)
    from_start = rule.retention == "start"
    zero = {name: tuple(torch.zeros_like(w) for w in start.weights[name]) for name in start.names}
    base = {name: start.weights[name] if from_start else zero[name] for name in start.names}
    state = {name: zero[name] if from_start else start.weights[name] for name in start.names}
    anchor = {name: tuple(map(torch.add, base[name], state[name])) for name in start.names}
    carried = carried or Carried(state, anchor, zero, [], 0)
    state, anchor, momentum, pairs = dict(carried.state), dict(carried.anchor), dict(carried.momentum), carried.pairs
    accumulates = start.accumulates is not None and bool(start.accumulates)
    bound = rule.norm_limit if rule.norm_limit is None or not accumulates else REACH * rule.norm_limit
    erase = 1.0 if start.erase is None else start.erase
    outputs = []

    for t in range(inputs["q"].shape[0]):
        for name in start.names:  # the state after the last token of the previous chunk
            if (carried.clock + t) % (rule.chunk_size if name == MEMORY else rule.other) == 0:
                state[name] = tuple(limit(s, bound) for s in state[name])
                anchor[name] = tuple(b + s for b, s in zip(base[name], state[name], strict=True))

        # Everything of the token is generated by the anchors (Eq. 86, 90 line 1).
        def project(name: str, t: int = t) -> Tensor:
            x = inputs[name][t : t + 1]
            if name not in memories:
                return x
            y = memories[name].read(anchor[name], x)
            return y[:, 0] if name in GATES else y

        k, q, v = unit(project("k")), unit(project("q")), project("v")
        v = unit(v) if rule.normalize_v else v
        raw_alpha = project("alpha")[None, None] if rule.decay else None
        eta, log_alpha = gates(project("eta")[None, None], raw_alpha, start, rule)
        eta, alpha = eta.squeeze(), log_alpha.exp().squeeze()

        pairs = [*pairs, (k[0], v[0])][-rule.window :]
        if rule.update != "dgd":
            state[MEMORY] = (_other_update(rule, state[MEMORY][0], anchor[MEMORY][0], pairs, eta, alpha),)
        for name in start.names if rule.update == "dgd" else ():
            memory, scale = memories[name], start.write_scale.get(name, 1.0)
            generates = name in GATES or (rule.self_values and not (accumulates and name == MEMORY))
            target = clip(memory.read(anchor[name], v), rule) if generates else v  # Eq. 84, 87
            error = objective.error(memory.read(anchor[name], k), target)
            written = []
            # Weights of an MLP memory: W1 is the last layer, W2 the one whose input is the key. The erasure
            # eta k k^T acts where k is the input (SPEC 12.1, reading A), the decay everywhere.
            for i, (left, right) in enumerate(memory.factors(anchor[name], k, error)):
                s, gradient = state[name][i], outer(scale * left[0], right[0])
                if start.momentum is not None:
                    step = start.momentum * momentum[name][i] - eta * gradient
                    momentum[name] = (*momentum[name][:i], step, *momentum[name][i + 1 :])
                else:
                    step = -eta * gradient
                sees_key = i == len(state[name]) - 1
                if rule.delta and sees_key:
                    s = dgd(s, k[0], torch.zeros_like(s[:, 0]), erase * eta, alpha)  # s (alpha I - eta k k^T)
                else:
                    s = alpha * s
                written.append(s + step)
            state[name] = tuple(written)

        if rule.read == "anchor":
            weights = anchor[MEMORY]
        else:
            weights = tuple(b + s for b, s in zip(base[MEMORY], state[MEMORY], strict=True))
        outputs.append(memories[MEMORY].read(weights, q)[0])

    y = torch.stack(outputs) if outputs else torch.zeros_like(inputs["q"])
    return y, Carried(state, anchor, momentum, pairs, carried.clock + len(outputs))


def _other_update(
    rule: WriteRule, s: Tensor, anchor: Tensor, pairs: list[tuple[Tensor, Tensor]], eta: Tensor, alpha: Tensor
) -> Tensor:
    """A linear memory ``s`` after one token by a rule other than DGD; ``pairs`` (k, v), the token's own last."""
    k, v = pairs[-1]
    if rule.update == "delta":
        return rules.delta(s, k, v, eta, alpha)
    if rule.update == "oja":
        return rules.oja(s, k, v, eta, alpha)
    keys, values = (torch.stack(side) for side in zip(*pairs, strict=True))
    gamma = torch.full_like(keys[:, 0], 1 / rule.window)
    return alpha * s + rules.omega(anchor, keys, values, eta, gamma, objectives.get(rule.objective)) - anchor

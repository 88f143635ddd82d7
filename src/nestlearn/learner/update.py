"""One level's update at the end of its chunk (Eq. 71): its rule's step on the mean gradient of the chunk's tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim.adamw import adamw

from nestlearn.convert.kept import Kept
from nestlearn.learner.state import LevelState, Tensors
from nestlearn.optim import functional

ADAM_BETAS, ADAM_EPS = (0.9, 0.95), 1e-8
"""Of the rule "adamw": decay of the mean and of the mean square per update, and what is added to the root. There is no
decay toward zero: what a level returns to is its pretrained weights (``retention``)."""


class Rule(Protocol):
    """What of `nestlearn.convert.Level` an update needs; the fields are documented there."""

    @property
    def lr(self) -> float: ...
    @property
    def rule(self) -> str: ...
    @property
    def clip(self) -> float: ...
    @property
    def retention(self) -> float: ...
    @property
    def budget(self) -> float | None: ...


def update(
    state: LevelState, level: Rule, start: Mapping[str, Tensor], kept: Mapping[str, Kept] | None = None
) -> LevelState | None:
    """The level after the end of its chunk, or None if its new weights are not finite.

    The mean is taken over the tokens present, so that lr means the same for every chunk size and for a chunk that the
    end of a text cut short (the printed Eq. 71 sums). The norm of the whole level's mean gradient is clipped; then
    comes the rule's step, bent away from what is kept (`nestlearn.convert.kept`), then
    ``theta += retention (theta_0 - theta)``, then the projection to
    ``||theta - theta_0|| <= budget ||theta_0||``. A chunk without a predicted token changes no weight.

    Args:
        state: with the gradient gathered over the chunk.
        start: the pretrained weights theta_0, fp32, by name.
        kept: inputs whose answers a step leaves alone, of the weights that have some and have not more in the state.

    >>> from types import SimpleNamespace
    >>> sgd = SimpleNamespace(lr=0.5, rule="sgd", clip=10.0, retention=0.0, budget=None)
    >>> update(LevelState(gathered={"w": torch.ones(1, 2)}, scored=2), sgd, {"w": torch.zeros(1, 2)}).weights
    {'w': tensor([[-0.2500, -0.2500]])}
    """
    if state.scored == 0:
        return replace(state, tokens=0, gathered={})
    names = list(state.gathered)
    # Contiguous, as the fused AdamW reads gradients in the order of memory and not by their strides.
    grads = [state.gathered[name].div(state.scored).contiguous() for name in names]
    norm = float(get_total_norm(grads))
    if norm > level.clip:
        torch._foreach_mul_(grads, level.clip / norm)
    weights = [state.weights.get(name, start[name]) for name in names]
    old = weights
    weights, slots = _step(level, names, weights, grads, state.slots)
    kept = {**(kept or {}), **state.kept}
    if kept:
        weights = [o + kept[n].bend(w - o) if n in kept else w for n, o, w in zip(names, old, weights, strict=True)]
    pretrained = [start[name] for name in names]
    moved = torch._foreach_sub(weights, pretrained)
    distance, size = float(get_total_norm(moved)), float(get_total_norm(pretrained))
    if not math.isfinite(distance):
        return None
    share = 1.0 - level.retention
    if level.budget is not None and share * distance > level.budget * size:
        share = level.budget * size / distance
    if share < 1.0:
        torch._foreach_mul_(moved, share)
        weights = list(torch._foreach_add(pretrained, moved))
    return replace(
        state,
        weights=dict(zip(names, weights, strict=True)),
        slots=slots,
        gathered={},
        tokens=0,
        scored=0,
        updates=state.updates + 1,
        moved=share * distance / size if size else 0.0,
    )


def _step(
    level: Rule, names: list[str], weights: list[Tensor], grads: list[Tensor], slots: Mapping[str, tuple[Tensor, ...]]
) -> tuple[list[Tensor], dict[str, tuple[Tensor, ...]]]:
    """New weights and slots; the old ones are left as they are."""
    if level.rule == "adamw":
        return _adamw(level.lr, names, weights, grads, slots)
    rule = functional.get(level.rule)
    stepped, remembered = [], {}
    for name, w, g in zip(names, weights, grads, strict=True):
        # A bias is a matrix of one row to the rules on matrices.
        matrix = w[None] if w.ndim == 1 else w
        new, kept = rule(matrix, g.view_as(matrix), slots.get(name, ()), torch.tensor(level.lr, device=w.device))
        stepped.append(new.view_as(w))
        remembered[name] = kept
    return stepped, remembered


def _adamw(
    lr: float, names: list[str], weights: list[Tensor], grads: list[Tensor], slots: Mapping[str, tuple[Tensor, ...]]
) -> tuple[list[Tensor], dict[str, tuple[Tensor, ...]]]:
    new: Tensors = {n: w.clone(memory_format=torch.contiguous_format) for n, w in zip(names, weights, strict=True)}
    kept: dict[str, tuple[Tensor, ...]] = {}
    for name, w in new.items():
        old = slots.get(name)
        fresh = (torch.zeros_like(w), torch.zeros_like(w), torch.zeros((), device=w.device))
        kept[name] = fresh if old is None else tuple(t.clone() for t in old)
    means, squares, steps = (list(ts) for ts in zip(*kept.values(), strict=True))
    # PyTorch's fused form is in place and 3.5 times as fast on a CPU as the plain one; hence the copies.
    adamw(
        list(new.values()),
        grads,
        means,
        squares,
        [],
        steps,
        fused=True,
        amsgrad=False,
        beta1=ADAM_BETAS[0],
        beta2=ADAM_BETAS[1],
        lr=lr,
        weight_decay=0.0,
        eps=ADAM_EPS,
        maximize=False,
    )
    return list(new.values()), kept

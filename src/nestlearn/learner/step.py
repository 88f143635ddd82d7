"""One window read by one learned state or, in one forward pass, by many: predict, judge, gather, update (Eq. 71)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from nestlearn.convert import ContinualModel
from nestlearn.learner.guards import refusal
from nestlearn.learner.reading import Reading, token_losses
from nestlearn.learner.state import LearnerState, Tensors
from nestlearn.learner.update import update


@dataclass(frozen=True)
class Outcome:
    """What a window did: the loss in nats summed over its ``scored`` tokens, the norm of each level's mean gradient
    (empty if none was made), and why it was refused, if it was."""

    state: LearnerState
    loss: float
    scored: int
    norms: tuple[float, ...] = ()
    refused: str | None = None


def step(
    model: ContinualModel,
    states: Sequence[LearnerState],
    windows: Sequence[Tensor],
    reading: Reading,
    *,
    fixed: bool = False,
) -> list[Outcome]:
    """The next state of every row.

    All rows are in one forward pass, each with its own weights. A row learns from nothing but its own window.

    Args:
        states: of the B rows.
        windows: (n,) int64 with n from 0 (the row rests) to ``reading.window``.
        fixed: pad to the largest shape there can be, so that no bit of a row depends on the length of another.
    """
    rows = len(states)
    learned = rows_of(model, states) if rows > 1 else states[0].weights
    leaves = _leaves(model, learned, rows)
    with torch.enable_grad(), model.using({**learned, **leaves}):
        losses, scored = token_losses(model, [s.context for s in states], windows, reading, fixed=fixed)
        sums = losses.sum(1)
        counts = scored.sum(1).tolist()
        outcomes: list[Outcome | None] = [None] * rows
        totals = sums.tolist()
        for b, total in enumerate(totals):
            if counts[b]:
                share = len(windows[b]) / reading.window
                refused = refusal(states[b], total / counts[b], (), share, reading.deviations)
                if refused:
                    outcomes[b] = _refuse(states[b], windows[b], total, counts[b], (), refused)
            else:
                outcomes[b] = _unscored(model, states[b], windows[b], reading)
        accepted = [b for b in range(rows) if outcomes[b] is None]
        grads: Tensors = {}
        if accepted and leaves:
            # The weights of a row are in no other row's loss, so one backward pass makes every row's own gradient.
            made = torch.autograd.grad(sums[accepted].sum(), list(leaves.values()))
            grads = dict(zip(leaves, made, strict=True))
    for b in accepted:
        own = {name: g if rows == 1 else g[b].clone() for name, g in grads.items()}
        outcomes[b] = _learn(model, states[b], windows[b], reading, totals[b], counts[b], own)
    return [outcome for outcome in outcomes if outcome is not None]


def rows_of(model: ContinualModel, states: Sequence[LearnerState]) -> Tensors:
    """The weights that any of the states has learned, for `ContinualModel.using`: (B, *shape), row b is state b's."""
    weights = {}
    for level in model.levels:
        known = [state.levels[level.number].weights for state in states]
        for name in {name for own in known for name in own}:
            weights[name] = torch.stack([own[name] if name in own else level.start[name] for own in known])
    return weights


def _leaves(model: ContinualModel, learned: Tensors, rows: int) -> Tensors:
    """What the gradient is taken for: the weights of the levels that learn, as learned so far."""
    leaves = {}
    for level in model.levels:
        if level.config.lr > 0:
            for name, start in level.start.items():
                w = learned.get(name)
                if w is None:
                    w = start if rows == 1 else torch.stack([start] * rows)
                leaves[name] = w.detach().requires_grad_()
    return leaves


def _unscored(model: ContinualModel, state: LearnerState, window: Tensor, reading: Reading) -> Outcome:
    """A window of no token that is predicted: none at all, or the first of a text alone."""
    after = _advance(model, state, window, reading) if len(window) else state
    if after is None:
        return _refuse(state, window, 0.0, 0, (), "the updated weights are not finite")
    return Outcome(after, 0.0, 0)


def _learn(
    model: ContinualModel,
    state: LearnerState,
    window: Tensor,
    reading: Reading,
    loss: float,
    scored: int,
    grads: Tensors,
) -> Outcome:
    """The state after an accepted loss, if the gradients are accepted too."""
    share = len(window) / reading.window
    norms = []
    for level in model.levels:
        own = [grads[name] for name in level.start if name in grads]
        norms.append(float(get_total_norm(own)) / scored if own else 0.0)
    refused = refusal(state, loss / scored, norms, share, reading.deviations)
    if refused:
        return _refuse(state, window, loss, scored, tuple(norms), refused)
    levels = []
    for level, old, norm in zip(model.levels, state.levels, norms, strict=True):
        if level.config.lr == 0:
            levels.append(old)
            continue
        gathered = {name: old.gathered[name] + grads[name] if old.gathered else grads[name] for name in level.start}
        surprise = old.surprise.add(math.log(norm), share) if norm > 0 else old.surprise
        levels.append(replace(old, gathered=gathered, scored=old.scored + scored, surprise=surprise))
    learned = replace(state, levels=tuple(levels), surprise=state.surprise.add(loss / scored, share), refused=0)
    after = _advance(model, learned, window, reading)
    if after is None:
        return _refuse(state, window, loss, scored, tuple(norms), "the updated weights are not finite")
    return Outcome(after, loss, scored, tuple(norms))


def _advance(model: ContinualModel, state: LearnerState, window: Tensor, reading: Reading) -> LearnerState | None:
    """The state when the tokens of a window have passed: levels whose chunk ends are updated. None if one cannot be."""
    n = len(window)
    levels = []
    for level, old in zip(model.levels, state.levels, strict=True):
        counted = replace(old, tokens=old.tokens + n)
        due = level.config.lr > 0 and counted.tokens >= level.config.period
        new = update(counted, level.config, level.start, level.kept) if due else counted
        if new is None:
            return None
        levels.append(new)
    after = replace(
        state,
        levels=tuple(levels),
        clock=state.clock + n,
        read=state.read + n,
        context=reading.after(state.context, window),
    )
    return after.sampled(window) if model.consolidates else after


def _refuse(
    state: LearnerState, window: Tensor, loss: float, scored: int, norms: tuple[float, ...], reason: str
) -> Outcome:
    """As if the window had never been, but for the count of what was read and refused."""
    after = replace(state, read=state.read + len(window), refused=state.refused + 1)
    return Outcome(after, loss, scored, norms, reason)


def flush(model: ContinualModel, state: LearnerState, reading: Reading) -> LearnerState:
    """The end of a text: the levels of the shortest period learn from the tokens present, however few, so that a short
    text is learned at once. The slower ones go on gathering over the next texts. Then what consolidates does.

    An update that is not finite is dropped with what was gathered for it.
    """
    fastest = model.levels[0].config.period
    levels = []
    for level, old in zip(model.levels, state.levels, strict=True):
        if level.config.period > fastest or old.tokens == 0 or level.config.lr == 0:
            levels.append(old)
            continue
        new = update(old, level.config, level.start, level.kept)
        levels.append(replace(old, gathered={}, tokens=0, scored=0) if new is None else new)
    state = replace(state, levels=tuple(levels))
    reads = [partial(token_losses, model, [state.context[:0]], [window], reading) for window in state.sample]
    kept = model.consolidate(state.weights, [level.kept for level in state.levels], reads)
    return replace(state, levels=tuple(replace(level, kept=k) for level, k in zip(state.levels, kept, strict=True)))

"""One window read by one learned state or, in one forward pass, by many: predict, judge, gather, update (Eq. 71)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from nestlearn.convert import ContinualModel
from nestlearn.learner.guards import refusal
from nestlearn.learner.reading import Reading, token_losses
from nestlearn.learner.state import LearnerState, Tensors
from nestlearn.learner.update import certain, update

NOT_FINITE = "the updated weights are not finite"


@dataclass(frozen=True)
class Outcome:
    """What a window did: the loss in nats summed over its ``scored`` tokens, the norm of each level's mean gradient
    (empty if none was made), and why it was refused, if it was."""

    state: LearnerState
    loss: float
    scored: int
    norms: tuple[float, ...] = ()
    refused: str | None = None


@dataclass(frozen=True)
class Prediction:
    """A window as one row's weights predict it: the loss in nats summed over its ``scored`` tokens, its gradient by
    the name of a weight (empty if nothing learns), and why the window is refused, if it is."""

    loss: float
    scored: int
    gradient: Tensors = field(default_factory=dict)
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
    predictions = predict(model, states, windows, reading, fixed=fixed)
    rows = zip(states, windows, predictions, strict=True)
    return [learn(model, state, window, reading, prediction) for state, window, prediction in rows]


def predict(
    model: ContinualModel,
    states: Sequence[LearnerState],
    windows: Sequence[Tensor],
    reading: Reading,
    *,
    fixed: bool = False,
) -> list[Prediction]:
    """The forward and the backward pass of `step`, with its arguments."""
    rows = len(states)
    learned = rows_of(model, states) if rows > 1 else states[0].weights
    leaves = _leaves(model, learned, rows)
    with torch.enable_grad(), model.using({**learned, **leaves}):
        losses, scored = token_losses(model, [s.context for s in states], windows, reading, fixed=fixed)
        sums = losses.sum(1)
        predictions = [Prediction(*row) for row in zip(sums.tolist(), scored.sum(1).tolist(), strict=True)]
        for b, found in enumerate(predictions):
            if found.scored:
                share = len(windows[b]) / reading.window
                reason = refusal(states[b], found.loss / found.scored, (), share, reading.deviations)
                predictions[b] = replace(found, refused=reason)
        accepted = [b for b, found in enumerate(predictions) if found.scored and found.refused is None]
        if accepted and leaves:
            # The weights of a row are in no other row's loss, so one backward pass makes every row's own gradient.
            made = torch.autograd.grad(sums[accepted].sum(), list(leaves.values()))
            for b in accepted:
                own = {name: g if rows == 1 else g[b].clone() for name, g in zip(leaves, made, strict=True)}
                predictions[b] = replace(predictions[b], gradient=own)
    return predictions


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


def learn(
    model: ContinualModel,
    state: LearnerState,
    window: Tensor,
    reading: Reading,
    prediction: Prediction,
    own: set[int] | None = None,
) -> Outcome:
    """The state after a window, if its gradient and what it leads to are accepted too.

    Args:
        own: numbers of the levels whose tensors nobody has but the caller, in ``state``. Where an update is certain
            it takes them for the new ones, and ``state`` is of no more use. A level that is updated joins.
    """
    loss, scored = prediction.loss, prediction.scored
    if prediction.refused is not None:
        return _refuse(state, window, loss, scored, (), prediction.refused)
    if not scored:  # no token at all, or the first of a text alone
        after = _advance(model, state, window, reading, own) if len(window) else state
        return Outcome(after, 0.0, 0) if after is not None else _refuse(state, window, 0.0, 0, (), NOT_FINITE)
    share = len(window) / reading.window
    grads = prediction.gradient
    norms = []
    for level in model.levels:
        mine = [grads[name] for name in level.start if name in grads]
        norms.append(float(get_total_norm(mine)) / scored if mine else 0.0)
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
    after = _advance(model, learned, window, reading, own)
    if after is None:
        return _refuse(state, window, loss, scored, tuple(norms), NOT_FINITE)
    return Outcome(after, loss, scored, tuple(norms))


def _advance(
    model: ContinualModel, state: LearnerState, window: Tensor, reading: Reading, own: set[int] | None
) -> LearnerState | None:
    """The state when the tokens of a window have passed: levels whose chunk ends are updated. None if one cannot be."""
    n = len(window)
    levels = [replace(level, tokens=level.tokens + n) for level in state.levels]
    due = [
        (number, level)
        for number, level in enumerate(model.levels)
        if level.config.lr > 0 and levels[number].tokens >= level.config.period
    ]
    # All or none: a level that cannot be updated leaves those before it as they were.
    free = own if own and all(certain(levels[number], level.config) for number, level in due) else set()
    for number, level in due:
        new = update(levels[number], level.config, level.start, level.kept, in_place=number in free)
        if new is None:
            return None
        if own is not None and new.updates > levels[number].updates:
            own.add(number)
        levels[number] = new
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

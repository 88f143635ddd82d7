"""The self-referential core in chunk-parallel form (Eq. 90): outputs of a whole sequence, state in, state out.

Equal to ``ops.reference`` to rounding, for any sequence length, any split into pieces and two chunk sizes.
A *segment* runs to the next chunk boundary of either group of memories. At a boundary that group's anchor
becomes its current state; between boundaries writes accumulate, so nothing is buffered and a piece may end
anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nestlearn.errors import UserError
from nestlearn.ops.backend import backend, by_reference
from nestlearn.ops.linear import LinearKernel, Packed
from nestlearn.ops.linear_adjoint import LinearSegments
from nestlearn.ops.mlp import MLPKernel
from nestlearn.ops.mlp_adjoint import MLPSegments
from nestlearn.ops.oja import OjaKernel
from nestlearn.ops.omega import OmegaKernel
from nestlearn.ops.rule import MEMORY, Start, WriteRule, transformed, unit
from nestlearn.ops.state import CoreState
from nestlearn.ops.step import step

Refresh = bool | Tensor
"""Whether an anchor moves to the current state: for all rows, or per row (B,)."""


def kernel_for(start: Start, rule: WriteRule) -> LinearKernel | MLPKernel:
    """The packed form of the memories in ``start``: linear if they have one weight matrix, MLP if two.

    Raises:
        UserError: an update other than DGD for anything but one linear memory without momentum, or heads that
            accumulate for MLP memories.
    """
    linear = len(start.weights[MEMORY]) == 1
    if start.accumulates is not None and not linear:
        raise UserError("heads that accumulate have linear memories: leave them out with MLP memories")
    if rule.update == "dgd":
        return LinearKernel(start, rule) if linear else MLPKernel(start, rule)
    if not linear or start.names != (MEMORY,) or start.momentum is not None:
        raise UserError(
            f"update={rule.update!r} writes one linear memory without momentum, whose projections are given: "
            "take that, or update='dgd'"
        )
    return {"delta": LinearKernel, "oja": OjaKernel, "omega": OmegaKernel}[rule.update](start, rule)


def _begin(kernel: LinearKernel | MLPKernel, learned: tuple[Tensor, ...], rule: WriteRule, batch: int) -> CoreState:
    """The state before the first token."""
    weights = tuple(w.unsqueeze(0).expand(batch, *w.shape) for w in learned)
    current = tuple(torch.zeros_like(w) for w in weights) if rule.retention == "start" else weights
    return CoreState(current, current, kernel.carried(weights), torch.zeros(batch, dtype=torch.long))


def self_modify(
    inputs: Mapping[str, Tensor],
    start: Start,
    rule: WriteRule,
    state: CoreState | None = None,
    lengths: Int[Tensor, " B"] | None = None,
    steps: list[Tensor] | None = None,
) -> tuple[Float[Tensor, "B H T d"], CoreState]:
    """Run the core of Eq. 83-90.

    Args:
        inputs: by the names of ``PROJECTIONS``, what the memory of that name reads, (B, H, T, d); or, where
            ``start`` has no such memory, the projection itself: ``q``, ``k``, ``v`` as (B, H, T, d), raw ``eta``
            and ``alpha`` as (B, H, T). A rule without decay needs no ``alpha``.
        start: the learned initial state of every memory.
        rule: switches of the update.
        state: what an earlier piece returned; None starts afresh.
        lengths: how many of the T tokens of each row count, (B,); the others change no state and their
            outputs are meaningless. None means all.
        steps: gets the step sizes (B, H, T) that the tokens were written with, zero where one does not count.

    Returns:
        Outputs (B, H, T, d) and the state after the last token. Both are differentiable in everything.

    Raises:
        UserError: the state belongs to another batch size or another core, or ``NESTLEARN_OPS`` asks for an
            implementation that does not cover the rule, or that does not give ``steps``.
    """
    name, kernel = backend(), kernel_for(start, rule)
    if steps is not None and name != "torch":
        raise UserError(f"NESTLEARN_OPS={name} does not tell the step sizes: take 'torch'")
    if name == "reference":
        return by_reference(inputs, start, rule, kernel, state, lengths)
    batch, learned, begins = inputs["q"].shape[0], kernel.pack(), state is None
    if state is None:
        state = _begin(kernel, learned, rule, batch)
    else:
        _check_state(state, kernel, learned, batch)
    if name == "triton":
        from nestlearn.ops.triton.sequence import by_kernels  # here, as Triton is not installed everywhere

        return by_kernels(inputs, kernel, learned, state, lengths, by_chunks)
    return by_chunks(inputs, kernel, learned, state, lengths, steps, begins)


def by_chunks(
    inputs: Mapping[str, Tensor],
    kernel: LinearKernel | MLPKernel,
    learned: tuple[Tensor, ...],
    state: CoreState,
    lengths: Tensor | None,
    steps: list[Tensor] | None = None,
    begins: bool = False,
) -> tuple[Tensor, CoreState]:
    """:func:`self_modify` in PyTorch, from a state; ``learned`` is the start as the kernel packs it, and ``begins``
    that no row has seen a token, so that the clock need not be read, which torch.export could not."""
    start, rule = kernel.start, kernel.rule
    x = inputs["q"]
    batch, _, tokens, _ = x.shape
    base = tuple(w.unsqueeze(0) if rule.retention == "start" else torch.zeros_like(w).unsqueeze(0) for w in learned)
    current, anchor, momentum = state.current, state.anchor, state.momentum
    weights: tuple[Tensor, ...] = ()
    counts = None if lengths is None else torch.arange(tokens, device=x.device) < lengths[:, None].to(x.device)

    outputs, queries, etas = [], [], []
    clocks = [0] * (1 if lengths is None else batch) if begins else state.clock.tolist()
    segments = list(_segments(clocks, lengths, tokens, rule))
    inputs = dict(inputs)
    for name in ("q", "k"):
        if name not in start.weights:  # a projection that no memory makes: normalised at once
            inputs[name] = unit(inputs[name])
    # Split once: slicing piece by piece would make the backward pass fill the whole sequence for every piece.
    sizes = [j - i for i, j, *_ in segments]
    distinct: list[Tensor] = []
    source: dict[str, int] = {}
    for name, value in inputs.items():
        known = next((i for i, other in enumerate(distinct) if other is value), len(distinct))
        source[name] = known
        if known == len(distinct):
            distinct.append(value)
    split = [value.contiguous().split(sizes, dim=2) for value in distinct]
    advance: Callable[..., tuple[Tensor, Tensor, Packed, Packed, Tensor | None]] = partial(step, kernel)
    if transformed():
        pass  # by autograd alone
    elif isinstance(kernel, LinearKernel) and LinearSegments.covers(kernel):
        advance = LinearSegments(kernel, source, steps is not None)
    elif isinstance(kernel, MLPKernel) and MLPSegments.covers(kernel):
        advance = MLPSegments(kernel, source, steps is not None)
    for n, (i, j, refresh_others, refresh_memory) in enumerate(segments):
        refreshed = refresh_others is not False or refresh_memory is not False
        if refreshed:
            limited = kernel.limit(current)
            at_others = _choose(refresh_others, limited, current)
            at_memory = _choose(refresh_memory, limited, current)
            current = kernel.merge(at_others, at_memory) if at_others is not at_memory else at_others
            moved = _choose(refresh_others, current, anchor), _choose(refresh_memory, current, anchor)
            anchor = kernel.merge(*moved) if moved[0] is not moved[1] else moved[0]
        if refreshed or not weights:
            weights = tuple(b + a for b, a in zip(base, anchor, strict=True))
        piece = {name: split[k][n] for name, k in source.items()}
        valid = None if counts is None else counts[:, None, i:j].to(x.dtype)
        y, q, current, momentum, eta = advance(weights, current, momentum, piece, valid)
        outputs.append(y)
        etas.append(eta)
        queries.append(q)

    seen = torch.full((batch,), tokens) if lengths is None else lengths.cpu()
    if steps is not None:
        steps.append(torch.cat(etas, dim=2) if etas else x.new_zeros(x.shape[:3]))
    if not outputs:
        return x.new_zeros(x.shape), CoreState(current, anchor, momentum, state.clock + seen)
    q = torch.cat(queries, dim=2) if "q" in start.weights else inputs["q"]
    y = kernel.rest(torch.cat(outputs, dim=2), q)
    return y, CoreState(current, anchor, momentum, state.clock + seen)


def _check_state(state: CoreState, kernel: LinearKernel | MLPKernel, learned: tuple[Tensor, ...], batch: int) -> None:
    if state.clock.shape[0] != batch:
        raise UserError(f"the state holds {state.clock.shape[0]} sequences, the input {batch}: they must agree")
    carried = [tuple(w.shape) for w in kernel.carried(learned)]
    if [tuple(w.shape[1:]) for w in state.momentum] != carried:
        raise UserError(
            "the state and the core differ in what the update carries, a momentum or Omega's window: "
            "use a state of this core"
        )
    expected = [tuple(w.shape) for w in learned]
    given = [tuple(w.shape[1:]) for w in state.current]
    if expected != given:
        raise UserError(f"the state holds weights of shapes {given}, the core {expected}: use a state of this core")


def _choose(refresh: Refresh, new: tuple[Tensor, ...], old: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if isinstance(refresh, bool):
        return new if refresh else old
    picks = [refresh.to(n.device).view(-1, *[1] * (n.dim() - 1)) for n in new]
    return tuple(torch.where(p, n, o) for p, n, o in zip(picks, new, old, strict=True))


def _segments(
    clocks: list[int], lengths: Tensor | None, tokens: int, rule: WriteRule
) -> Iterator[tuple[int, int, Refresh, Refresh]]:
    """Segments [i, j) of a piece and whose anchors move at i: the projection memories', the main memory's."""
    if lengths is None and len(set(clocks)) <= 1:
        now, end = (clocks[0] if clocks else 0), (clocks[0] if clocks else 0) + tokens
        first = now
        while now < end:
            next_boundary = min((now // c + 1) * c for c in (rule.other, rule.chunk_size))
            stop = min(next_boundary, end)
            yield now - first, stop - first, now % rule.other == 0, now % rule.chunk_size == 0
            now = stop
        return
    counts = [tokens] * len(clocks) if lengths is None else lengths.tolist()
    starts = {0}
    for now, count in zip(clocks, counts, strict=True):
        for c in (rule.other, rule.chunk_size):
            starts.update(range((-now) % c, count, c))
    ordered = [*sorted(s for s in starts if s < tokens), tokens]
    for i, j in pairwise(ordered):
        alive = torch.tensor([i < count for count in counts])
        at = torch.tensor([now + i for now in clocks])
        yield i, j, alive & (at % rule.other == 0), alive & (at % rule.chunk_size == 0)

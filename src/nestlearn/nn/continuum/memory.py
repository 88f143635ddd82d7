"""The continuum memory system (CMS): MLPs, each with its own update frequency (Eq. 70-74).

Shapes: B rows, T tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nestlearn.errors import UserError, nearest
from nestlearn.memory import objectives
from nestlearn.memory.structures import Weights
from nestlearn.nn.continuum.level import ContinuumLevel
from nestlearn.nn.continuum.state import ContinuumState, LevelState
from nestlearn.nn.continuum.update import LevelUpdate
from nestlearn.nn.lengths import counted

ACTIVATIONS = ("swiglu", "mlp")
VARIANTS = ("sequential", "nested", "independent")
ONLINE = ("local", "next-token")


class ContinuumMemory(nn.Module):
    """MLP levels with their own norms and update frequencies, (B, T, dim) -> (B, T, dim).

    "sequential" (Eq. 73) and "nested" (Eq. 72) are the chain ``y = MLP_k(... MLP_1(x))`` of residual MLPs from fast
    to slow (Eq. 70); "independent" (Eq. 74) is ``x + sum_l w_l MLP_l(x)`` with learned weights w. One static level is
    the plain pre-norm residual MLP of a Transformer.

    With ``online=None`` the levels are static inside a sequence; the outer optimizer trains them, each at its
    frequency if it is a `nestlearn.optim.LevelwiseOptimizer`. Otherwise every level also learns inside the sequence,
    at the end of each of its chunks and without labels: its weights per row are the state, and the parameters are
    their start, which the outer loss trains through the learning. In the nested variant the start of a level is
    itself learned along the sequence, by the next slower level, and the level begins again from it at each of that
    level's updates; the start's error is taken to first order, as the sum of the level's errors.

    Args:
        dim: channels D.
        chunk_sizes: tokens between two updates of each level, fast to slow, so in increasing order.
        variant: how the levels are joined.
        hidden: hidden width of all levels together, in channels; every level gets an equal share. None gives
            each level 4 ``dim``.
        activation: "swiglu", or "mlp" for the paper's two-layer MLP.
        norm_eps: added to the mean square inside each norm.
        online: "local": each level learns to predict its own next input (up to a learned projection). "next-token":
            the levels learn from the model's own next-token loss, whose gradient the model brings (`gather`,
            `learn`); this layer then only reads.
        update: the learning rule, one for all levels or one for each.
        objective: of "local", by its name in `nestlearn.memory.objectives`: "l2", or "dot", which learned worse than
            static levels (`docs/log.md`), or another.

    Raises:
        UserError: an unknown name, chunk sizes that are not positive or not in increasing order or, nested, of which
            one is no multiple of the one before, a hidden width that does not split evenly, or updates that do not
            fit the levels.

    >>> import torch
    >>> ContinuumMemory(8, chunk_sizes=[16, 64])(torch.randn(2, 5, 8))[0].shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        dim: int,
        chunk_sizes: Sequence[int],
        variant: Literal["sequential", "nested", "independent"] = "sequential",
        *,
        hidden: int | None = None,
        activation: Literal["swiglu", "mlp"] = "swiglu",
        norm_eps: float = 1e-6,
        online: Literal["local", "next-token"] | None = None,
        update: LevelUpdate | Sequence[LevelUpdate] | None = None,
        objective: str = "l2",
    ) -> None:
        super().__init__()
        sizes = list(chunk_sizes) if isinstance(chunk_sizes, Sequence) else []
        for what, name, allowed in (
            ("ContinuumMemory variant", variant, VARIANTS),
            ("activation", activation, ACTIVATIONS),
            ("online learning of a ContinuumMemory", "local" if online is None else online, ONLINE),
        ):
            if name not in allowed:
                raise UserError(f"unknown {what} {name!r}: {nearest(str(name), allowed)}")
        whole = all(type(size) is int and size > 0 for size in sizes)
        if not sizes or not whole or sizes != sorted(sizes):
            raise UserError(
                f"chunk_sizes={chunk_sizes!r}: give at least one positive integer, in tokens, ordered fast to slow "
                "(increasing), e.g. [64, 512, 4096]"
            )
        if variant == "nested":
            for fast, slow in pairwise(sizes):
                if slow % fast:
                    raise UserError(
                        f"chunk_sizes={sizes}: in the nested variant a level begins again when the next slower one is "
                        f"updated, so {slow} must be a multiple of {fast}, e.g. {slow // fast * fast}"
                    )
        hidden = 4 * dim * len(sizes) if hidden is None else hidden
        share, rest = divmod(hidden, len(sizes))
        if share < 1 or rest:
            raise UserError(
                f"hidden={hidden} (intermediate_size of a Hope model) does not split evenly over {len(sizes)} levels: "
                f"use a positive multiple of {len(sizes)}, e.g. {max(share, 1) * len(sizes)}"
            )
        if online is None and update is not None:
            raise UserError(f"update is how levels learn along a sequence: give online={ONLINE[0]!r} or {ONLINE[1]!r}")
        one = LevelUpdate() if update is None else update
        updates = [one] * len(sizes) if isinstance(one, str | LevelUpdate) else list(one)
        for given in updates:
            if not isinstance(given, LevelUpdate):
                raise UserError(
                    f"update={given!r}: give a LevelUpdate, as LevelUpdate('sgd', lr=0.1), or a list of them"
                )
        if len(updates) != len(sizes):
            raise UserError(f"{len(updates)} updates for {len(sizes)} levels: give one for each, or one for all")
        self.dim, self.variant, self.online = dim, variant, online
        self.objective = objectives.get(objective)
        self.levels: list[ContinuumLevel] = nn.ModuleList(  # type: ignore[assignment]
            ContinuumLevel(
                dim, share, size, activation, norm_eps, None if online is None else rule, local=online == "local"
            )
            for size, rule in zip(sizes, updates, strict=True)
        )
        self.mix = nn.Parameter(torch.empty(len(sizes))) if variant == "independent" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The aggregation of the independent variant at its start, the mean of the levels."""
        if self.mix is not None:
            nn.init.constant_(self.mix, 1 / len(self.levels))

    def _parent(self, index: int) -> ContinuumLevel | None:
        """The next slower level, which re-initialises this one in the nested variant."""
        last = index + 1 == len(self.levels)
        return None if last or self.variant != "nested" else self.levels[index + 1]

    def begin(self, rows: int) -> ContinuumState:
        """The state before the first token of ``rows`` sequences."""
        levels = tuple(level.begin(self._parent(i) is not None) for i, level in enumerate(self.levels))
        return ContinuumState(levels, torch.zeros(rows, dtype=torch.long))

    def forward(
        self,
        x_BTD: Float[Tensor, "B T D"],
        state: ContinuumState | None = None,
        lengths: Int[Tensor, " B"] | None = None,
    ) -> tuple[Float[Tensor, "B T D"], ContinuumState | None]:
        """Apply the levels and, with ``online="local"``, let them learn.

        Args:
            x_BTD: the new tokens, the valid ones of every row first.
            state: what an earlier piece returned; None starts afresh.
            lengths: how many leading columns of each row are valid; None if all are.

        Returns:
            The output, and the state that continues the sequence; None for static levels.

        Raises:
            UserError: an input that is no (B, T, dim) of floats, a state of another batch or memory, or ``lengths``
                that are not one number from 0 to T per row.
        """
        if x_BTD.ndim != 3 or x_BTD.shape[-1] != self.dim or not x_BTD.is_floating_point():
            given = f"the input has shape {tuple(x_BTD.shape)}, {x_BTD.dtype}"
            raise UserError(f"{given}: it must be (batch, tokens, {self.dim}), floating point")
        x_BTD = counted(x_BTD, lengths)
        if self.online is None:
            if state is not None:
                raise UserError("a ContinuumMemory with online=None keeps no state: leave the state out")
            return self._join(x_BTD, lambda i, h: self.levels[i](h)), None
        if state is None:
            state = self.begin(x_BTD.shape[0])
        self._check(state, x_BTD.shape[0])
        if not x_BTD.shape[1]:
            return x_BTD, state
        levels, erasure = list(state.levels), [()] * len(self.levels)
        before = state

        def run(i: int, h: Tensor) -> Tensor:
            if self.online == "next-token":
                y, erasure[i] = self.levels[i].read(h, levels[i])  # type: ignore[call-overload]
                return y
            y, levels[i] = self.levels[i].write_along(
                h, levels[i], before.clock, lengths, self.objective, self._parent(i)
            )
            return y

        with torch.autocast(x_BTD.device.type, enabled=False):  # what is learned stays in float32
            y_BTD = self._join(x_BTD.to(torch.promote_types(x_BTD.dtype, torch.float32)), run).to(x_BTD.dtype)
        clock = state.clock + (x_BTD.shape[1] if lengths is None else lengths.cpu())
        return y_BTD, ContinuumState(tuple(levels), clock, tuple(erasure))

    def _join(self, x: Tensor, run) -> Tensor:  # type: ignore[no-untyped-def]
        """``run(i, h)`` is the output of level i on h."""
        if self.mix is not None:
            mixed = torch.stack([run(i, x) for i in range(len(self.levels))], dim=-1) @ self.mix.to(x.dtype)
            return x + mixed
        for i in range(len(self.levels)):
            x = x + run(i, x)
        return x

    def learn(self, state: ContinuumState, errors: Sequence[Weights]) -> ContinuumState:
        """Gather an error of the tokens since the last call, and update the levels whose chunk has just ended.

        For ``online="next-token"``: the caller stops at every boundary of `boundary`, differentiates the loss of
        those tokens with respect to the state's weights and brings the result, (B, o, i) for each weight.
        """
        levels: list[LevelState] = []
        for i, (level, at) in enumerate(zip(self.levels, state.levels, strict=True)):
            at = level.gather(at, errors[i])
            due = state.clock % level.chunk_size == 0
            if bool(due.any()):
                at = level.learn(at, bool(due.all()) or due, state.clock, self._parent(i))
            levels.append(at)
        return replace(state, levels=tuple(levels), erasure=())

    def boundary(self, clock: int) -> int:
        """The next token count after ``clock`` at which a level is updated."""
        return min((clock // level.chunk_size + 1) * level.chunk_size for level in self.levels)

    def _check(self, state: ContinuumState, rows: int) -> None:
        if not isinstance(state, ContinuumState):
            raise UserError(f"the state is a {type(state).__name__}: give what an earlier call returned, or None")
        if len(state.clock) != rows:
            raise UserError(f"the state holds {len(state.clock)} sequences, the input {rows}: they must agree")
        expected = [[tuple(w.shape) for w in level.weights] for level in self.levels]
        given = [[tuple(w.shape[-2:]) for w in level.weights] for level in state.levels]
        if expected != given:
            raise UserError(f"the state holds levels of shapes {given}, the memory {expected}: use a state of this one")
        begun = bool(state.clock.any())
        for i, (level, at) in enumerate(zip(self.levels, state.levels, strict=True)):
            if not level.continues(at, self._parent(i), begun):
                raise UserError(
                    f"level {i} of the state was not made with variant={self.variant!r}, online={self.online!r} and "
                    "the rules of this memory: use a state of this one"
                )

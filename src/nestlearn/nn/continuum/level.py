"""One level of a continuum memory: an MLP, and how it learns along a sequence.

Shapes: B rows, T tokens, D channels, c tokens of a piece; weights (o, i), per row (B, o, i).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.errors import UserError
from nestlearn.memory import MLPMemory, SwiGLUMemory
from nestlearn.memory.objectives import Objective
from nestlearn.memory.structures import Factors, Weights
from nestlearn.nn.continuum.state import LevelState, choose
from nestlearn.nn.continuum.update import LevelUpdate
from nestlearn.nn.mixer import normed


class ContinuumLevel(nn.Module):
    """The MLP ``W_down(act(norm(h)))`` of one level, its chunk size and its learning rule.

    Args:
        dim: channels D.
        hidden: hidden width, in channels.
        chunk_size: tokens between two updates of this level; the inverse of its update frequency.
        activation: "swiglu" for ``silu(W_gate x) * W_up x``, "mlp" for ``silu(W_up x)`` (two matrices).
        norm_eps: added to the mean square inside the norm.
        update: how it learns along a sequence; None keeps it static there.
        local: whether it learns from a local objective, which needs a projection to the values.
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        chunk_size: int,
        activation: str,
        norm_eps: float,
        update: LevelUpdate | None = None,
        local: bool = False,
    ) -> None:
        super().__init__()
        self.chunk_size, self.update = chunk_size, update
        self.norm = nn.RMSNorm(dim, eps=norm_eps)
        self.gate = nn.Linear(dim, hidden, bias=False) if activation == "swiglu" else None
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)
        self.structure = (
            MLPMemory(dim, dim, hidden, skip=False) if self.gate is None else SwiGLUMemory(dim, dim, hidden)
        )
        self.log_rate = None if update is None else nn.Parameter(torch.zeros(()))
        self.value = nn.Parameter(torch.zeros(dim, dim)) if local else None

    def reset_parameters(self) -> None:
        """What the level has beside its linear layers: the factor of the rate at 1, and values of zero, to which a
        fresh level's outputs shrink until the outer loss has taught it what to write."""
        for parameter in (self.log_rate, self.value):
            if parameter is not None:
                nn.init.zeros_(parameter)

    def extra_repr(self) -> str:
        rule = "" if self.update is None else f", rule={self.update.rule!r}"
        return f"chunk_size={self.chunk_size}{rule}"

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The learned weights in the order of `MLPMemory` and `SwiGLUMemory`: output matrix first."""
        linears = (self.down, self.up) if self.gate is None else (self.down, self.up, self.gate)
        for linear in linears:
            if self.update is not None and type(linear) is not nn.Linear:
                raise UserError(
                    f"a level that learns along the sequence writes to plain linear layers, and one is a "
                    f"{type(linear).__name__}, whose adapter would be left out: adapt other layers, or merge it first"
                )
        return tuple(linear.weight for linear in linears)

    @property
    def rate(self) -> Tensor:
        """The learning rate of an update: the rule's ``lr`` times the learned factor."""
        assert self.update is not None
        assert self.log_rate is not None
        return self.update.lr * _wide(self.log_rate).exp()

    def forward(self, h_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """The level's output with its learned weights; the caller adds the residual."""
        x_BTD = self.norm(h_BTD)
        if self.gate is None:
            return self.down(F.silu(self.up(x_BTD)))
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))

    def _normed(self, h_BTD: Tensor) -> Tensor:
        """What the weights read, in float32 or wider."""
        return normed(self.norm, h_BTD)

    def begin(self, nested: bool) -> LevelState:
        """The state before the first token; ``nested``: a slower level holds this level's start."""
        weights = tuple(_wide(w) for w in self.weights)
        return LevelState(weights, start=weights if nested else ())

    def continues(self, state: LevelState, parent: ContinuumLevel | None, begun: bool) -> bool:
        """Whether the state may be this level's, by what it remembers; ``begun``: of tokens."""
        assert self.update is not None
        if parent is not None and parent.update is not None and not parent.update.fits(state.start_slots):
            return False
        objective = not begun or (state.last is None) == (self.value is None)
        return self.update.fits(state.slots) and bool(state.start) == (parent is not None) and objective

    def read(self, h_BTD: Float[Tensor, "B T D"], state: LevelState) -> tuple[Tensor, Weights]:
        """The output with the state's weights, and, for DGD, ``W sum_t k_t k_t^T`` of each weight (else ())."""
        x_BTD = self._normed(h_BTD)
        y_BTD = self.structure.read(state.weights, x_BTD)
        assert self.update is not None
        if not self.update.erases or not torch.is_grad_enabled():
            return y_BTD, ()
        factors = self.structure.factors(state.weights, x_BTD, torch.zeros_like(y_BTD))
        return y_BTD, tuple((k @ w.mT).mT @ k for w, (_, k) in zip(state.weights, factors, strict=True))

    def write_along(
        self,
        h_BTD: Float[Tensor, "B T D"],
        state: LevelState,
        clock: Tensor,
        lengths: Tensor | None,
        objective: Objective,
        parent: ContinuumLevel | None,
    ) -> tuple[Float[Tensor, "B T D"], LevelState]:
        """Read along the tokens and learn at the end of every chunk, from a local objective.

        The memory is asked, from what the level reads of a token, for a projection of what it reads of the next one
        (a prediction of its own input, so no labels are needed). A pair belongs to the chunk of its second token.
        Inside a chunk the weights are constant and all tokens are done at once.

        Args:
            clock: tokens seen by each row, (B,).
            lengths: how many of the T tokens of each row count, (B,); None if all do.
            parent: the next slower level of the nested variant.
        """
        assert self.value is not None
        x_BTD = self._normed(h_BTD)
        B, T, _ = x_BTD.shape
        first = torch.zeros_like(x_BTD[:, :1]) if state.last is None else state.last[:, None]
        k_BTD = torch.cat([first, x_BTD[:, :-1]], dim=1)
        v_BTD = x_BTD @ _wide(self.value).mT
        columns = torch.arange(T)
        counts = torch.full((B,), T) if lengths is None else lengths.cpu()
        # A row's first token has no key before it.
        paired = (columns < counts[:, None]) & (clock[:, None] + columns > 0)
        mask_BT = None if bool(paired.all()) else paired.to(x_BTD.device, x_BTD.dtype)
        outputs = []
        for i, j, due in _pieces(clock, counts, T, self.chunk_size):
            outputs.append(self.structure.read(state.weights, x_BTD[:, i:j]))
            k = k_BTD[:, i:j]
            error = objective.error(self.structure.read(state.weights, k), v_BTD[:, i:j])
            factors = self.structure.factors(state.weights, k, error)
            state = self.gather(
                state, self._gradients(state.weights, factors, None if mask_BT is None else mask_BT[:, i:j])
            )
            if due is not False:
                state = self.learn(state, due, clock + j, parent)
        if lengths is None:
            last = x_BTD[:, -1]
        else:
            at = (counts - 1).clamp(min=0).to(x_BTD.device)
            newest = x_BTD.gather(1, at[:, None, None].expand(B, 1, x_BTD.shape[-1]))[:, 0]
            last = torch.where((counts > 0).to(x_BTD.device)[:, None], newest, first[:, 0])
        return torch.cat(outputs, dim=1), replace(state, last=last)

    def _gradients(self, weights: Weights, factors: Factors, mask: Tensor | None) -> Weights:
        assert self.update is not None
        gradients = []
        for w, (left, right) in zip(weights, factors, strict=True):
            if self.update.erases:  # DGD, Eq. 57: -lr (e + W k) k^T
                left = left + right @ w.mT
            gradients.append((left if mask is None else left * mask[..., None]).mT @ right)
        return tuple(gradients)

    def gather(self, state: LevelState, error: Weights) -> LevelState:
        """Add to the error since the last update (Eq. 71), (B, o, i) each."""
        summed = tuple(a + b for a, b in zip(state.error, error, strict=True)) if state.error else error
        return replace(state, error=summed)

    def learn(self, state: LevelState, due: bool | Tensor, clock: Tensor, parent: ContinuumLevel | None) -> LevelState:
        """The end of a chunk, in the rows that are ``due`` (Eq. 71).

        Nested (Eq. 72): where the parent's chunk ends too, the start of this level, a parameter of the parent, takes
        the parent's step on the error of the parent's whole chunk, and this level begins again from there.
        """
        assert self.update is not None
        old, error = state, state.error
        none = tuple(() for _ in error)
        zero = tuple(torch.zeros_like(g) for g in error)
        learned = tuple(_wide(w) for w in self.weights)
        weights, slots = self.update.step(
            old.weights,
            error,
            old.slots or none,
            self.rate,
            learned,
            self.chunk_size,  # type: ignore[arg-type]
        )
        state = replace(
            state,
            weights=choose(due, weights, old.weights),
            slots=choose(due, slots, old.slots),
            error=choose(due, zero, error),
        )
        if parent is None:
            return state
        assert parent.update is not None
        summed = tuple(a + b for a, b in zip(old.start_error, error, strict=True)) if old.start_error else error
        summed = choose(due, summed, old.start_error or zero)
        state = replace(state, start_error=summed)
        ends = clock % parent.chunk_size == 0
        if due is not True:
            ends = ends & cast(Tensor, due)
        if not bool(ends.any()):
            return state
        rows = True if bool(ends.all()) else ends
        start, start_slots = parent.update.step(
            old.start,
            summed,
            old.start_slots or none,
            parent.rate,
            learned,
            parent.chunk_size,  # type: ignore[arg-type]
        )
        start = choose(rows, start, old.start)
        fresh = tuple(tuple(torch.zeros_like(t) for t in s) for s in state.slots)
        return replace(
            state,
            weights=choose(rows, start, state.weights),
            slots=choose(rows, fresh, state.slots),
            start=start,
            start_slots=choose(rows, start_slots, old.start_slots),
            start_error=choose(rows, zero, summed),
        )


def _wide(w: Tensor) -> Tensor:
    """In float32 or wider."""
    return w.to(torch.promote_types(w.dtype, torch.float32))


def _pieces(clock: Tensor, counts: Tensor, tokens: int, chunk: int) -> Iterator[tuple[int, int, bool | Tensor]]:
    """Pieces [i, j) inside which no chunk ends, and the rows whose chunk ends at j."""
    ends = {tokens}
    for now, count in zip(clock.tolist(), counts.tolist(), strict=True):
        ends.update(range(chunk - now % chunk, count + 1, chunk))
    i = 0
    for j in sorted(ends):
        due = ((clock + j) % chunk == 0) & (counts >= j)
        yield i, j, bool(due.all()) or (due if bool(due.any()) else False)
        i = j

"""When a level's chunk ends: one step of its rule on the error that it has gathered (Eq. 71)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nestlearn.errors import UserError, nearest
from nestlearn.memory.structures import Weights
from nestlearn.optim import functional

REDUCTIONS = ("sum", "mean")
Slots = tuple[tuple[Tensor, ...], ...]


@dataclass(frozen=True)
class LevelUpdate:
    """The learning rule of a level: ``W <- step(W, error of the chunk)`` at the end of every chunk (Eq. 71).

    Args:
        rule: "sgd", "dgd" (delta gradient descent, Eq. 57: also erases along what the weight has read),
            "delta-momentum" (Eq. 49) or "m3" (Eq. 75), the last two with the defaults of `nestlearn.optim`.
        lr: learning rate at the start of training; a learned factor per level multiplies it. In units of the weight per
            unit of error; of m3 in units of spectral norm per update.
        reduction: whether the error of a chunk is the "sum" over its tokens, as printed, or their "mean".
        clip: largest Frobenius norm of the error of one matrix, after the reduction; None leaves it.
        norm_limit: largest distance of a matrix from its learned start, in units of the start's norm, which bounds
            the memory on any stream; None leaves it.

    Raises:
        UserError: an unknown rule or reduction, or a number out of range.

    >>> LevelUpdate("dgd", lr=0.01).rule
    'dgd'
    """

    rule: str = "sgd"
    lr: float = 0.1
    reduction: Literal["sum", "mean"] = "sum"
    clip: float | None = 1.0
    norm_limit: float | None = 1.0

    def __post_init__(self) -> None:
        functional.get(self.rule)
        if self.reduction not in REDUCTIONS:
            raise UserError(f"unknown reduction {self.reduction!r}: {nearest(str(self.reduction), REDUCTIONS)}")
        if not 0 <= self.lr < math.inf:
            raise UserError(f"lr={self.lr} of a level: it must be zero (no update) or positive, and finite")
        for name in ("clip", "norm_limit"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name}={value} of a level: it must be positive and finite, or None for no limit")

    @property
    def erases(self) -> bool:
        """Whether the error holds the weight's own output beside the derivative of the objective."""
        return self.rule == "dgd"

    def fits(self, slots: Slots) -> bool:
        """Whether this rule may have made them; before the first update there are none."""
        return all(len(own) == functional.SLOTS[self.rule] for own in slots)

    def step(
        self, weights: Weights, error: Weights, slots: Slots, lr: Tensor, start: Weights, tokens: int
    ) -> tuple[Weights, Slots]:
        """The weights (B, o, i) and the rule's memory after a chunk of ``tokens``.

        Args:
            weights: as they were through the chunk, (o, i) if all rows still share them.
            error: summed over the chunk, (B, o, i).
            slots: what the rule remembers, for each weight.
            lr: learning rate, a scalar.
            start: the learned start, (o, i), from which the distance is limited.
        """
        rule = functional.get(self.rule)
        stepped, remembered = [], []
        for w, g, s, w0 in zip(weights, error, slots, start, strict=True):
            if self.reduction == "mean":
                g = g / tokens
            if self.clip is not None:
                g = g * (self.clip / _norm(g)).clamp(max=1.0)
            w, s = rule(w.expand_as(g), g, s, lr)
            stepped.append(self._limit(w, w0))
            remembered.append(s)
        return tuple(stepped), tuple(remembered)

    def _limit(self, w: Tensor, w0: Tensor) -> Tensor:
        if self.norm_limit is None:
            return w
        moved = w - w0
        return w0 + moved * (self.norm_limit * _norm(w0) / _norm(moved)).clamp(max=1.0)


def _norm(w: Tensor) -> Tensor:
    """Frobenius norms (..., 1, 1); at zero the derivative is zero too."""
    return (w.square().sum((-2, -1), keepdim=True) + torch.finfo(w.dtype).tiny).sqrt()

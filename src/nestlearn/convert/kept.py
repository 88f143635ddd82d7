"""What learning must not disturb: the answers of a level's matrices to the inputs that they saw on a text.

A step D of a matrix moves its answer to an input x by ``D x``. The level's retention (Ret of Eq. 59) gets a term
for the inputs that are kept, so that of all steps near the rule's the one is taken that moves their answers little:

    argmin_D ||D - D_rule||^2 + strength / s E ||D x||^2  =  D_rule (I + strength / s C)^-1

with ``C = E x x^T`` over the kept inputs, E the mean, and s the mean of C's eigenvalues, so that ``strength`` has one
meaning for all models. The inverse is ``I - U U^T`` with U (inputs, rank), of which the largest directions may do.

What is to be kept of text after text adds up, ``A <- A_0 + fade (A - A_0) + strength / s C`` with A_0 what was kept
before the first of them, and the inverse is ``(I + A)^-1``: recursive least squares that forget. So however many texts
are read A is bounded, and a level never closes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nestlearn.convert.blocks import Piece, Scope, Using, Weights
from nestlearn.errors import UserError

FADE = 0.95  # of what was kept of texts, with each further text
OPEN = 1e-4  # of a step passes in every direction, also so that float32 can hold the inverse

Seen = Mapping[str, Sequence[Tensor]]


@dataclass(frozen=True)
class Kept:
    """The inputs of one weight that are kept.

    Args:
        matrix: U, or, where it has more than half as many directions as there are inputs, the inverse itself, which is
            (inputs, inputs) and then costs less. A bias has one input, which is 1.
        transposed: whether the weight is (inputs, outputs), as in `Conv1D`.
    """

    matrix: Tensor
    transposed: bool = False

    def bend(self, step: Tensor) -> Tensor:
        """A change of the weight without its part along the kept inputs.

        >>> fixed = Kept(torch.tensor([[1.0], [0.0], [0.0]]))  # the first of three inputs
        >>> fixed.bend(torch.tensor([[3.0, 4.0, 5.0]]))
        tensor([[0., 4., 5.]])
        """
        m = self.matrix.to(step)
        if step.ndim == 1:
            return step * m[0, 0]
        if m.shape[0] == m.shape[1]:
            return m @ step if self.transposed else step @ m
        return step - m @ (m.mT @ step) if self.transposed else step - (step @ m) @ m.mT

    def inverse(self) -> Tensor:
        """(inputs, inputs), fp64."""
        m = self.matrix.double()
        return m if m.shape[0] == m.shape[1] else torch.eye(len(m)).to(m) - m @ m.mT


def is_transposed(piece: Piece) -> bool:
    return isinstance(piece.layer, Conv1D) and piece.attribute == "weight"


@torch.no_grad()
def seen_inputs(scope: Scope, weights: Weights, reads: Iterable[Callable[[], object]]) -> Seen:
    """The inputs (..., d) of every matrix of the levels, by its name, while the model of ``scope`` reads with
    ``weights``: each of ``reads`` is one forward pass."""
    seen: dict[str, list[Tensor]] = {}
    with Using(scope, weights, seen):
        for read in reads:
            read()
    return seen


def kept_inputs(pieces: Mapping[str, Piece], seen: Seen, strength: float, rank: int | None) -> dict[str, Kept]:
    """The `Kept` of every piece, of one text.

    Args:
        pieces: by name.
        seen: of `seen_inputs`.
        strength: see above.
        rank: most directions of one weight; None for all that the text has.

    Raises:
        UserError: a number out of range, or a text of no token.
    """
    if not 0 <= strength < math.inf:
        raise UserError(f"strength={strength} of what is kept: give a finite number, 0 (nothing is kept) or more")
    if rank is not None and rank < 1:
        raise UserError(f"rank={rank} of what is kept: give 1 direction or more, or None for all")
    if not seen:
        raise UserError("the text to keep has no token: give some pages of what the model should stay good at")
    return _each(pieces, seen, lambda name, inputs: _inverse(inputs, strength, rank))


def kept_besides(
    pieces: Mapping[str, Piece], seen: Seen, strength: float, before: Mapping[str, Kept], first: Mapping[str, Kept]
) -> dict[str, Kept]:
    """The `Kept` of every piece when one more text has been read.

    Args:
        pieces, seen, strength: as in `kept_inputs`.
        before: what it returned after the last text; empty before the first.
        first: what was kept before the first text, which does not fade.
    """
    return _each(pieces, seen, lambda name, inputs: _joined(inputs, strength, before.get(name), first.get(name)))


def _each(pieces: Mapping[str, Piece], seen: Seen, invert: Callable[[str, Tensor], Tensor]) -> dict[str, Kept]:
    """``invert`` of all inputs of every piece, once for weights that see the same ones."""
    found: dict[str, Kept] = {}
    shared: dict[Any, Tensor] = {}
    for name, piece in pieces.items():
        if piece.attribute == "bias":
            found[name] = Kept(invert(name, next(iter(seen.values()))[0].new_ones(1, 1)))
            continue
        key = tuple(map(id, seen[name]))
        if key not in shared:
            shared[key] = invert(name, torch.cat([x.flatten(0, -2) for x in seen[name]]))
        found[name] = Kept(shared[key], is_transposed(piece))
    return found


def _inverse(inputs: Tensor, strength: float, rank: int | None) -> Tensor:
    """The matrix of `Kept`, for inputs (N, d)."""
    count, d = inputs.shape
    rank = min(count, d) if rank is None else min(rank, count, d)
    small = inputs.double()
    # The smaller of the two products has the same eigenvalues; its vectors are turned into directions of the inputs.
    gram = small.mT @ small if d <= count else small @ small.mT
    values, vectors = torch.linalg.eigh(gram)
    values, vectors = values[-rank:].clamp_min(0), vectors[:, -rank:]
    if d > count:
        vectors = nn.functional.normalize(small.mT @ vectors, dim=0)
    along = strength * values / _mean(gram, d)
    u = vectors * (along / (1 + along)).sqrt()
    return (u if 2 * rank <= d else torch.eye(d).to(u) - u @ u.mT).float()


def _joined(inputs: Tensor, strength: float, before: Kept | None, first: Kept | None) -> Tensor:
    """The inverse with the inputs (N, d) of one more text."""
    x = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    gram = (x.mT @ x).double()
    i = torch.eye(len(gram)).to(gram)
    a_0 = torch.zeros_like(i) if first is None else _invert(_opened(first.inverse())) - i
    a = a_0 if before is None else a_0 + FADE * (_invert(before.inverse()) - i - a_0)
    return _opened(_invert(i + a + strength / _mean(gram, len(gram)) * gram)).float()


def _opened(inverse: Tensor) -> Tensor:
    return (1 - OPEN) * inverse + OPEN * torch.eye(len(inverse)).to(inverse)


def _mean(gram: Tensor, d: int) -> Tensor:
    """Of the eigenvalues of the inputs' second moment, d of them."""
    return (gram.trace() / d).clamp_min(torch.finfo(gram.dtype).tiny)


def _invert(x: Tensor) -> Tensor:
    """Of a positive definite matrix."""
    return torch.cholesky_inverse(torch.linalg.cholesky(x))

"""What learning must not disturb: the answers of a level's matrices to the inputs that they saw on a text.

A step D of a matrix moves its answer to an input x by ``D x``. The level's retention (Ret of Eq. 59) gets a term
for the inputs that are kept, so that of all steps near the rule's the one is taken that moves their answers little:

    argmin_D ||D - D_rule||^2 + strength / s E ||D x||^2  =  D_rule (I + strength / s C)^-1

with ``C = E x x^T`` over the kept inputs, E the mean, and s the mean of C's eigenvalues, so that ``strength`` has one
meaning for all models. The inverse is ``I - U U^T`` with U (inputs, rank), of which the largest directions may do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nestlearn.convert.blocks import Piece
from nestlearn.errors import UserError


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


def is_transposed(piece: Piece) -> bool:
    return isinstance(piece.layer, Conv1D) and piece.attribute == "weight"


@torch.no_grad()
def kept_inputs(
    model: nn.Module, pieces: Mapping[str, Piece], windows: Iterable[Tensor], strength: float, rank: int | None
) -> dict[str, Kept]:
    """The `Kept` of every piece.

    Args:
        model: reads each window, (n,) int64, with its pretrained weights.
        pieces: of the levels, by name.
        windows: of the text.
        strength: see above.
        rank: most directions of one weight; None for all that the text has.

    Raises:
        UserError: a number out of range, or a text of no token.
    """
    if not 0 <= strength < math.inf:
        raise UserError(f"strength={strength} of what is kept: give a finite number, 0 (nothing is kept) or more")
    if rank is not None and rank < 1:
        raise UserError(f"rank={rank} of what is kept: give 1 direction or more, or None for all")
    seen: dict[nn.Module, list[Tensor]] = {piece.layer: [] for piece in pieces.values()}
    hooks = [layer.register_forward_pre_hook(lambda m, x: seen[m].append(x[0])) for layer in seen]
    try:
        for ids in windows:
            model(ids[None])
    finally:
        for hook in hooks:
            hook.remove()
    if not any(seen.values()):
        raise UserError("the text to keep has no token: give some pages of what the model should stay good at")
    found = {}
    shared: dict[
        Any, Tensor
    ] = {}  # by the very inputs, which two layers may see, and the part that a piece sees of them
    for name, piece in pieces.items():
        parts = seen[piece.layer]
        if piece.attribute == "bias":
            found[name] = Kept(_inverse(parts[0].new_ones(1, 1), strength, None))
            continue
        cut = None if piece.axis != int(not is_transposed(piece)) else (piece.start, piece.length)
        key = (*map(id, parts), cut)
        if key not in shared:
            inputs = torch.cat([x.flatten(0, -2) for x in parts])
            shared[key] = _inverse(inputs if cut is None else inputs.narrow(1, *cut), strength, rank)
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
    mean = small.square().sum() / d
    along = strength * values / mean.clamp_min(torch.finfo(mean.dtype).tiny)
    u = vectors * (along / (1 + along)).sqrt()
    return (u if 2 * rank <= d else torch.eye(d).to(u) - u @ u.mT).float()

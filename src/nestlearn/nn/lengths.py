"""Rows of different lengths: the leading tokens of each that count."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from nestlearn.errors import UserError
from nestlearn.ops.rule import may_look


def counted(x: Float[Tensor, "B T D"], lengths: Tensor | None) -> Float[Tensor, "B T D"]:
    """``x`` with zeros where a column does not count, so that nothing there, NaN neither, reaches a state.

    Raises `UserError` unless ``lengths`` is one whole number from 0 to T a row, or None, by which all columns count.

    >>> counted(torch.ones(2, 2, 1), torch.tensor([2, 0])).flatten().tolist()
    [1.0, 1.0, 0.0, 0.0]
    """
    if lengths is None:
        return x
    rows, tokens = x.shape[:2]
    whole = not lengths.is_floating_point() and not lengths.is_complex()
    fits = lengths.shape == (rows,) and whole
    if fits and may_look(lengths) and not torch.compiler.is_compiling():
        fits = not bool(((lengths < 0) | (lengths > tokens)).any())
    if not fits:
        raise UserError(f"lengths={lengths.tolist()}: give one whole number from 0 to {tokens} for each of {rows} rows")
    filler = torch.arange(tokens, device=x.device) >= lengths.to(x.device)[:, None]
    return x.masked_fill(filler[..., None], 0)

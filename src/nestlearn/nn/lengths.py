"""Rows of different lengths: the leading tokens of each that count."""

from __future__ import annotations

import torch
from torch import Tensor

from nestlearn.errors import UserError
from nestlearn.ops.rule import may_look


def check_lengths(lengths: Tensor | None, rows: int, tokens: int) -> None:
    """Raise `UserError` unless there is one whole number from 0 to ``tokens`` a row, or None.

    >>> check_lengths(torch.tensor([2, 0]), rows=2, tokens=2)
    """
    if lengths is None:
        return
    whole = not lengths.is_floating_point() and not lengths.is_complex()
    fits = lengths.shape == (rows,) and whole
    if fits and may_look(lengths) and not torch.compiler.is_compiling():
        fits = not bool(((lengths < 0) | (lengths > tokens)).any())
    if not fits:
        raise UserError(f"lengths={lengths.tolist()}: give one whole number from 0 to {tokens} for each of {rows} rows")

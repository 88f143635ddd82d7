"""Orthogonalising a matrix: Newton-Schulz and gradient descent on the memory's objective (Eq. 43-44, section 4.2).

The target is the polar factor ``U V^T`` of ``G = U S V^T``. Eq. 43 asks a memory O for it by
``1/2 ||O - G||^2 + 1/2 ||O^T O - I||^2``; its first gradient step of size 1/4 from ``O = G`` is the cubic
Newton-Schulz step, and Muon's quintic is another odd polynomial of that kind.

Shapes: every function takes (..., d_out, d_in) and works on all matrices of a batch at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nestlearn.errors import UserError, nearest

COEFFICIENTS = {"quintic": (3.4445, -4.7750, 2.0315), "cubic": (1.5, -0.5, 0.0)}
EPS = 1e-7


def _wide(g: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, bool]:
    """The matrix with its short side first, of Frobenius norm one (zero stays zero), and whether it was turned."""
    turned = g.shape[-2] > g.shape[-1]
    x = (g.mT if turned else g).to(dtype or g.dtype)
    return x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=EPS), turned


def newton_schulz(g: Tensor, steps: int = 5, coeffs: str = "quintic", dtype: torch.dtype | None = None) -> Tensor:
    """Newton-Schulz iteration ``X <- a X + (b A + c A^2) X`` with ``A = X X^T``, from ``X = G / ||G||_F``.

    Args:
        g: (..., d_out, d_in); zero gives zero, and a norm below 1e-7 is not brought to one: what decays to nothing
            must not step on at full size.
        steps: number of iterations.
        coeffs: ``"quintic"`` (Muon's, singular values end in about 0.7 to 1.2 after 5 steps) or ``"cubic"``
            (converges to the polar factor, slowly).
        dtype: computes in this type; by default in that of ``g``. The result has it.

    Raises:
        UserError: unknown ``coeffs``.

    >>> newton_schulz(torch.diag(torch.tensor([2.0, 1.0])), steps=20, coeffs="cubic")
    tensor([[1., 0.],
            [0., 1.]])
    """
    if coeffs not in COEFFICIENTS:
        raise UserError(f"unknown Newton-Schulz coefficients {coeffs!r}: {nearest(coeffs, COEFFICIENTS)}")
    a, b, c = COEFFICIENTS[coeffs]
    x, turned = _wide(g, dtype)
    multiply_add = torch.baddbmm if x.ndim == 3 else torch.addmm
    shape = x.shape
    if x.ndim > 3:
        x, multiply_add = x.flatten(0, -3), torch.baddbmm
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = multiply_add(gram, gram, gram, beta=b, alpha=c) if c else b * gram
        x = multiply_add(x, polynomial, x, beta=a)
    x = x.view(shape)
    return x.mT if turned else x


def descend_to_orthogonal(g: Tensor, steps: int = 10, step_size: float = 0.25, anchor: bool = True) -> Tensor:
    """Gradient descent on Eq. 43 (Eq. 44): ``O <- O - step_size (O - G + 2 O (O^T O - I))`` from ``O = G / ||G||_F``.

    With the anchor, the printed objective, a singular value s of the normalised G ends at the root of
    ``2 o^3 - o = s``, between 0.71 and 1. Without it (the proximal centre is the previous iterate) the steps are the
    cubic Newton-Schulz iteration and end at the polar factor.

    Args:
        g: (..., d_out, d_in); zero gives zero.
        steps: number of gradient steps.
        step_size: of the descent; above 0.4 it overshoots at singular value one.
        anchor: keep the term ``1/2 ||O - G||^2``.
    """
    g, turned = _wide(g, None)
    o = g
    for _ in range(steps):
        gradient = 2 * (o @ o.mT @ o - o)  # the short side's Gram matrix: O O^T O = O (O^T O)
        o = o - step_size * (gradient + (o - g) if anchor else gradient)
    return o.mT if turned else o

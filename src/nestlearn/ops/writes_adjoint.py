"""The writes of a segment and how they are read, beside their adjoint: the last lines of `ops.linear_adjoint`.

    Z = (I + T)^-1 (h - strength gamma k S^T)          what is written along each key
    S' = gamma_c S + Z^T (last k)
    y = gamma q S^T + (q k^T ratio) Z

Shapes and names as there; `ops.momentum_adjoint` has the same with a momentum.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nestlearn.ops.adjoint import Gates, Tables


class Given(NamedTuple):
    """What a segment starts from and reads."""

    k: Tensor
    """Keys (N, c, d)."""
    q: Tensor
    """Queries (N, c, d)."""
    s: Tensor
    """S (N, R, d)."""
    p: Tensor | None = None
    """The momentum, as S."""


class Derivatives(NamedTuple):
    """By what was given, by h, and what `Tables.adjoint` takes."""

    given: Given
    h: Tensor
    log_gamma: Tensor
    log_last: Tensor
    log_ratio: Tensor
    t: Tensor | None
    erasing_key: Tensor | None
    erasing: Tensor | None = None
    """By the step sizes of the erasure (N, c), besides what the tables have of them; with a momentum."""
    b: Tensor | None = None
    """By the momentum's retained fractions (H,)."""

    def plus(self, log_gamma: Tensor, log_last: Tensor, log_ratio: Tensor, b: Tensor | None) -> Derivatives:
        """With what others have of the tables."""
        return self._replace(
            b=self.b if b is None or self.b is None else self.b + b,
            log_gamma=self.log_gamma + log_gamma,
            log_last=self.log_last + log_last,
            log_ratio=self.log_ratio + log_ratio,
        )

    def through_tables(
        self, k: Tensor, gates: Gates, share: Tensor | None, tables: Tables
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Derivatives by k, eta, log alpha and the share of the erasure, with those that go through the tables."""
        logs = self.log_ratio, self.log_last, self.log_gamma
        d_k, d_eta, d_log_alpha, d_share = tables.adjoint(k, gates, share, self.t, self.erasing_key, *logs)
        d_k = self.given.k if d_k is None else d_k + self.given.k
        if self.erasing is not None:
            d_eta = d_eta + (self.erasing if share is None else self.erasing * share)
            if d_share is not None:
                d_share = d_share + self.erasing * gates.eta
        return d_k, d_eta, d_log_alpha, d_share


def advance(
    given: Given, h: Tensor, tables: Tables, delta: bool, anchor: Tensor | None, n: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What is read (N, c, d), the next S, Z, and ``q k^T ratio``.

    Args:
        h: the writes (N, c, R), which become Z.
        delta: whether anything is erased.
        anchor: the weights (N, R, d) that are read in place of the state, if they are.
        n: the first row of the main memory, which is read.
    """
    k, q, s, _ = given
    z = h
    if delta:
        z = torch.bmm(tables.inverse, torch.baddbmm(h, k * (tables.strength * tables.gamma), s.mT, alpha=-1))
    after = torch.baddbmm(s * tables.gamma[:, -1:], z.mT, k * tables.last)
    if anchor is not None:
        return torch.bmm(q, anchor[:, n:].mT), after, z, None
    scores = torch.bmm(q, k.mT).mul_(tables.ratio)
    y = torch.baddbmm(torch.bmm(scores, z[..., n:]), q * tables.gamma, s[:, n:].mT)
    return y, after, z, scores


def advance_adjoint(
    given: Given,
    z: Tensor,
    scores: Tensor | None,
    tables: Tables,
    delta: bool,
    anchor: Tensor | None,
    n: int,
    d_y: Tensor,
    d_after: Tensor,
) -> Derivatives:
    """:func:`advance` backward; the derivative by an anchor that is read is left to the caller, who has more of it."""
    k, q, s, _ = given

    # The state at the end.
    d_z = torch.bmm(k * tables.last, d_after.mT)
    d_k = torch.bmm(z, d_after).mul_(tables.last)
    d_log_last = (d_k * k).sum(-1)
    d_s = d_after * tables.gamma[:, -1:]
    d_log_gamma = torch.zeros_like(d_log_last)
    d_log_gamma[:, -1] = inner(d_s, s)

    # The read.
    if scores is None:
        assert anchor is not None
        d_q = torch.bmm(d_y, anchor[:, n:])
        d_log_ratio = torch.zeros_like(tables.ratio)
    else:
        d_q = torch.bmm(d_y, s[:, n:]).mul_(tables.gamma)
        d_log_gamma += (d_q * q).sum(-1)
        d_s[:, n:] += torch.bmm(d_y.mT, q * tables.gamma)
        d_z[..., n:] += torch.bmm(scores.mT, d_y)
        d_scores = torch.bmm(d_y, z[..., n:].mT)
        d_log_ratio = d_scores * scores
        d_scores *= tables.ratio
        d_q.baddbmm_(d_scores, k)
        d_k.baddbmm_(d_scores.mT, q)

    # The writes.
    d_t = d_erasing_key = None
    if delta:
        d_z = torch.bmm(tables.inverse.mT, d_z)
        d_t = torch.bmm(d_z, z.mT).neg_().tril_(-1)
        d_erasing_key = torch.bmm(d_z, s).neg_()
        d_s.baddbmm_(d_z.mT, k * (tables.strength * tables.gamma), alpha=-1)
    return Derivatives(Given(d_k, d_q, d_s), d_z, d_log_gamma, d_log_last, d_log_ratio, d_t, d_erasing_key)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of the matrices of each head, (N,)."""
    return torch.bmm(a.flatten(1).unsqueeze(1), b.flatten(1).unsqueeze(2)).flatten()

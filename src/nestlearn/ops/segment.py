"""The chunk-parallel form of a sequence of writes that share keys, step sizes and decays.

Inside a segment (at most a chunk) the additive writes ``h_t`` are known before it starts, since their errors
are taken at the anchor. The state after token t is then

    S_t = gamma_t S_0 + c_t P_0 + sum_{s<=t} U_ts h_s k_s^T + sum_{s<=t} Gamma_ts z_s k_s^T

with ``Gamma_ts = prod_{s<i<=t} alpha_i``, the write table ``U`` (``Gamma``, or with momentum ``Gamma B``), the
carried momentum ``P_0``, and the erase vectors ``z_t = -eta_t S_{t-1} k_t`` of DGD, which solve one unit
lower-triangular system. The tables and the triangular factor depend on k, eta and alpha alone: they are
computed once a segment and serve every memory.

Shapes: B batch, H heads, c tokens of the segment, d channels of a key, r rows (outputs) of a weight matrix, n its
columns; ``*b`` is (B, H), or (B, H, m) for memories that are stacked and broadcast against ``stacked()`` tables.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

Table = Float[Tensor, "*b c c"]
PerToken = Float[Tensor, "*b c"]
Terms = list[tuple[Tensor, Tensor]]
"""Pairs (table (*b, c, c), rows (*b, c, r)): coefficients of the rank-one terms ``rows_s key_s^T``."""


@dataclass
class Segment:
    """Keys and tables of one segment.

    Args:
        k: keys (B, H, c, d).
        eta: step sizes (B, H, c); zero where a token does not count.
        erasing: step sizes of the erasure (B, H, c).
        gamma: (B, H, c), retained fraction of ``S_0`` after each token.
        ratio: ``Gamma`` (B, H, c, c), lower triangular.
        write: ``U`` (B, H, c, c), lower triangular; the same tensor as ``ratio`` without momentum.
        carry: ``c`` (B, H, c), coefficient of the carried momentum, or None.
        momentum: (``b_bar`` (B, H, c), ``B`` (B, H, c, c)) for the momentum itself, or None.
        factor: ``I + T`` below its unit diagonal, (B, H, c, c), or None where nothing is erased.
        erase: ``eta_t gamma_{t-1}`` (B, H, c), what a token erases of ``S_0`` along its key.
        valid: which tokens count, (B, 1, c), or None if all do.
    """

    k: Float[Tensor, "*b c d"]
    eta: PerToken
    erasing: PerToken
    gamma: PerToken
    erase: PerToken
    ratio: Table
    write: Table
    carry: PerToken | None
    momentum: tuple[PerToken, Table] | None
    factor: Table | None
    valid: Float[Tensor, "B 1 c"] | None = None
    _rows: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(
        cls,
        k: Float[Tensor, "B H c d"],
        eta: Float[Tensor, "B H c"],
        log_alpha: Float[Tensor, "B H c"],
        b: Float[Tensor, " H"] | None,
        valid: Float[Tensor, "B 1 c"] | None,
        delta: bool,
        erase: Float[Tensor, " H"] | None = None,
    ) -> Segment:
        """Tables from keys (B, H, c, d), ``eta`` and ``log_alpha`` (B, H, c), momentum fraction ``b`` (H,), which
        tokens count, ``valid`` (B, 1, c), whether anything is erased, ``delta``, and which share of ``eta``, ``erase``
        (H,), None for all of it. A token that does not count leaves every state as it was."""
        if valid is not None:
            eta = eta * valid
            log_alpha = log_alpha * valid
        log_gamma = log_alpha.cumsum(-1)
        ratio = _ratios(log_gamma)
        write, carry, momentum = ratio, None, None
        if b is not None:
            log_b = b.log()[:, None].expand_as(eta)
            counts = ratio
            if valid is not None:
                log_b = log_b * valid
                counts = ratio * valid.unsqueeze(-2)
            log_b = log_b.cumsum(-1)
            momentum = (log_b.exp(), _ratios(log_b))
            write = counts @ momentum[1]
            carry = (counts @ momentum[0].unsqueeze(-1)).squeeze(-1)
        gamma = log_gamma.exp()
        erasing = eta if erase is None else eta * erase[:, None]
        strength = erasing * (-log_alpha).exp()  # eta_t gamma_{t-1} / gamma_s = (eta_t / alpha_t) Gamma_ts
        # The solve reads nothing on or above the diagonal.
        factor = strength.unsqueeze(-1) * ratio * (k @ k.mT) if delta else None
        return cls(k, eta, erasing, gamma, strength * gamma, ratio, write, carry, momentum, factor, valid)

    def stacked(self) -> Segment:
        """The same tables for memories stacked in a dimension after the heads; nothing is erased there."""
        return Segment(
            k=self.k.unsqueeze(2),
            eta=self.eta.unsqueeze(2),
            erasing=self.erasing.unsqueeze(2),
            gamma=self.gamma.unsqueeze(2),
            erase=self.erase.unsqueeze(2),
            ratio=self.ratio.unsqueeze(2),
            write=self.write.unsqueeze(2),
            carry=None if self.carry is None else self.carry.unsqueeze(2),
            momentum=None if self.momentum is None else (self.momentum[0].unsqueeze(2), self.momentum[1].unsqueeze(2)),
            factor=None,
        )

    def terms(
        self, h: Float[Tensor, "*b c r"], s0: Float[Tensor, "*b r n"], p0: Float[Tensor, "*b r n"] | None
    ) -> Terms:
        """The rank-one terms of writes ``h`` on a state ``s0`` with momentum ``p0``.

        With DGD the erase vectors come from one triangular solve for all r rows at once.
        """
        if self.factor is None:
            return [(self.write, h)]
        erased = -self.erase.unsqueeze(-1) * (self.k @ s0.mT)
        if p0 is None:
            # Writes and erasures have the same table, so one solve gives their sum.
            return [(self.ratio, self._solve(h + erased))]
        assert self.carry is not None
        erased = erased - (self.erasing * _shift_rows(self.carry)).unsqueeze(-1) * (self.k @ p0.mT)
        erased = erased - (self.erasing.unsqueeze(-1) * _shift(self.write) * (self.k @ self.k.mT)) @ h
        return [(self.write, h), (self.ratio, self._solve(erased))]

    def _solve(self, rows: Tensor) -> Tensor:
        assert self.factor is not None
        return torch.linalg.solve_triangular(self.factor, rows, upper=False, unitriangular=True)

    def read(
        self,
        q: Float[Tensor, "*b c n"],
        keys: Float[Tensor, "*b c n"],
        terms: Terms,
        s0: Float[Tensor, "*b r n"],
        p0: Float[Tensor, "*b r n"] | None,
    ) -> Float[Tensor, "*b c r"]:
        """``S_t q_t`` after each token, without ever forming ``S_t``: the dual form."""
        y = self.gamma.unsqueeze(-1) * (q @ s0.mT)
        if p0 is not None:
            assert self.carry is not None
            y = y + self.carry.unsqueeze(-1) * (q @ p0.mT)
        scores = q @ keys.mT
        for table, rows in terms:
            y = y + (scores * table) @ rows
        return y

    def last(
        self,
        keys: Tensor,
        h: Float[Tensor, "*b c r"],
        terms: Terms,
        s0: Float[Tensor, "*b r n"],
        p0: Float[Tensor, "*b r n"] | None,
    ) -> tuple[Float[Tensor, "*b r n"], Float[Tensor, "*b r n"] | None]:
        """State and momentum after the last token; ``keys`` (*b or B H, c, n)."""
        s = _at_end(self.gamma) * s0
        for table, rows in terms:
            s = s + rows.mT @ (self.row_at_end(table) * keys)
        if p0 is None:
            return s, None
        assert self.carry is not None
        assert self.momentum is not None
        b_bar, b_table = self.momentum
        p = _at_end(b_bar) * p0 + h.mT @ (self.row_at_end(b_table) * keys)
        return s + _at_end(self.carry) * p0, p

    def row_at_end(self, table: Table) -> Tensor:
        """The last row of a table as a column (*b, c, 1), picked once for all memories that use the table."""
        if id(table) not in self._rows:
            self._rows[id(table)] = table[..., -1, :, None]
        return self._rows[id(table)]


def _at_end(per_token: Tensor) -> Tensor:
    return per_token[..., -1:].unsqueeze(-1)


def _ratios(log: Tensor) -> Tensor:
    """``exp(log_t - log_s)`` for s <= t, zero above the diagonal: (..., c) -> (..., c, c)."""
    return (log.unsqueeze(-1) - log.unsqueeze(-2)).clamp_max(0).exp().tril()


def _shift(table: Tensor) -> Tensor:
    """A table one token earlier: row t holds row t-1, the first row is zero."""
    return torch.cat([torch.zeros_like(table[..., :1, :]), table[..., :-1, :]], dim=-2)


def _shift_rows(values: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(values[..., :1]), values[..., :-1]], dim=-1)

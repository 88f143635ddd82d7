"""`ops.writes_adjoint` with a momentum P, where the writes h and the erasures z have tables of their own.

    U = Gamma B                                        write table, B_ts = b^(t-s)
    z = (I + T)^-1 (-strength gamma k S^T - e c_- k P^T - (e U_- k k^T) h)
    S' = gamma_c S + c_c P + (U_c h + Gamma_c z)^T k
    P' = b^c P + (B_c h)^T k
    y = gamma q S^T + c q P^T + (q k^T U) h + (q k^T Gamma) z

``e`` is the step size of the erasure, ``c = Gamma b^t`` the carry of P, a minus below a table one token earlier, and a
``c`` below one its last row. Shapes and names as in `ops.linear_adjoint`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.ops.adjoint import Gates, Tables, each
from nestlearn.ops.rule import WriteRule
from nestlearn.ops.writes_adjoint import Derivatives, Given, inner


class Momentum(NamedTuple):
    """The tables of momentum, beside `Tables`."""

    kept: Tensor
    """(N, c), retained fraction of P after each token."""
    table: Tensor
    """B (N, c, c)."""
    counts: Tensor
    """(N, c, c), ``Gamma`` of the tokens that count."""
    write: Tensor
    """U (N, c, c)."""
    carry: Tensor
    """(N, c, 1), what there is of P in the state after each token."""

    @classmethod
    def of(cls, b: Tensor, ratio: Tensor, valid: Tensor | None) -> Momentum:
        """From the retained fractions of the heads (H,), ``Gamma``, and which tokens count (N, c), None for all."""
        log_b = each(b, len(ratio) // len(b)).log().unsqueeze(-1).expand(ratio.shape[:2])
        if valid is not None:
            log_b = log_b * valid
        log_b = log_b.cumsum(-1)
        table = (log_b.unsqueeze(-1) - log_b.unsqueeze(-2)).clamp_max_(0).exp_().tril_()
        counts = ratio if valid is None else ratio * valid.unsqueeze(-2)
        kept = log_b.exp()
        return cls(kept, table, counts, torch.bmm(counts, table), torch.bmm(counts, kept.unsqueeze(-1)))

    @property
    def last_write(self) -> Tensor:
        """(N, c, 1), what there is of each write in the last state."""
        return self.write[:, -1, :, None]

    @property
    def last_table(self) -> Tensor:
        """(N, c, 1), and in the last momentum."""
        return self.table[:, -1, :, None]

    def zeros(self) -> TableSums:
        """Derivatives to be added up."""
        return TableSums(*(torch.zeros_like(t) for t in (self.kept, self.table, self.write, self.carry)))

    def adjoint(self, b: Tensor, valid: Tensor | None, sums: TableSums) -> tuple[Tensor, Tensor]:
        """Derivatives by b (H,) and by the logarithm of ``Gamma`` (N, c, c)."""
        d_kept, d_table, d_write, d_carry = sums
        d_counts = torch.baddbmm(d_carry * self.kept.unsqueeze(-2), d_write, self.table.mT)
        d_log_table = (d_table + torch.bmm(self.counts.mT, d_write)) * self.table
        d_log = d_log_table.sum(-1) - d_log_table.sum(-2)
        d_log += (d_kept + torch.bmm(self.counts.mT, d_carry).squeeze(-1)) * self.kept
        # A power of b sums the logarithms of the tokens up to its own.
        up_to = d_log.flip(-1).cumsum(-1).flip(-1)
        d_log_b = (up_to if valid is None else up_to * valid).sum(-1).unflatten(0, (-1, len(b))).sum(0)
        return d_log_b / b, d_counts * self.counts


class TableSums(NamedTuple):
    """Derivatives by the tables of `Momentum`."""

    kept: Tensor
    table: Tensor
    write: Tensor
    carry: Tensor


def advance(
    given: Given, h: Tensor, tables: Tables, momentum: Momentum, erasing: Tensor | None, anchor: Tensor | None, n: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What is read (N, c, d), the next S and P, and z.

    Args:
        h: what is written along each key (N, c, R).
        erasing: e (N, c), or None where nothing is erased.
        anchor, n: as in `ops.writes_adjoint`.
    """
    k, q, s, p = given
    assert p is not None
    z, (gamma, carry) = None, (tables.gamma, momentum.carry)
    written = momentum.last_write * h
    if erasing is not None:
        across = _erasing_table(k, erasing, momentum)
        z = torch.bmm(k * (tables.strength * gamma), s.mT)
        z.baddbmm_(k * (erasing.unsqueeze(-1) * _later(carry)), p.mT).baddbmm_(across, h)
        z = torch.bmm(tables.inverse, z).neg_()
        written.addcmul_(tables.last, z)
    next_s = torch.baddbmm(s * gamma[:, -1:] + p * carry[:, -1:], written.mT, k)
    next_p = torch.baddbmm(p * momentum.kept[:, -1:, None], (momentum.last_table * h).mT, k)
    if anchor is not None:
        return torch.bmm(q, anchor[:, n:].mT), next_s, next_p, z
    y = torch.bmm(q * gamma, s[:, n:].mT).baddbmm_(q * carry, p[:, n:].mT)
    scores = torch.bmm(q, k.mT)
    y.baddbmm_(scores * momentum.write, h[..., n:])
    if z is not None:
        y.baddbmm_(scores * tables.ratio, z[..., n:])
    return y, next_s, next_p, z


def advance_adjoint(
    given: Given,
    h: Tensor,
    z: Tensor | None,
    tables: Tables,
    momentum: Momentum,
    erasing: Tensor | None,
    b: Tensor,
    valid: Tensor | None,
    anchor: Tensor | None,
    n: int,
    d_y: Tensor,
    d_s: Tensor,
    d_p: Tensor,
) -> Derivatives:
    """:func:`advance` backward, but for an anchor that is read."""
    k, q, s, p = given
    assert p is not None
    gamma, carry, ratio = tables.gamma, momentum.carry, tables.ratio

    # State and momentum at the end.
    last_write, last_table = momentum.last_write, momentum.last_table
    d_written, d_kept_write = torch.bmm(k, d_s.mT), torch.bmm(k, d_p.mT)
    d_h = last_write * d_written + last_table * d_kept_write
    d_k = torch.baddbmm(torch.bmm(last_table * h, d_p), last_write * h, d_s)
    sums = momentum.zeros()
    sums.write[:, -1] = (d_written * h).sum(-1)
    sums.table[:, -1] = (d_kept_write * h).sum(-1)
    d_old_s, d_old_p = d_s * gamma[:, -1:], d_s * carry[:, -1:] + d_p * momentum.kept[:, -1:, None]
    d_log_gamma = torch.zeros_like(gamma.squeeze(-1))
    d_log_gamma[:, -1], sums.carry[:, -1, 0], sums.kept[:, -1] = inner(d_old_s, s), inner(d_s, p), inner(d_p, p)
    d_log_last, d_z = torch.zeros_like(d_log_gamma), None
    if z is not None:
        d_z = tables.last * d_written
        d_log_last = (d_z * z).sum(-1)
        d_k.baddbmm_(tables.last * z, d_s)

    # The read.
    if anchor is not None:
        d_q, d_log_ratio = torch.bmm(d_y, anchor[:, n:]), torch.zeros_like(ratio)
    else:
        from_s, from_p = torch.bmm(d_y, s[:, n:]), torch.bmm(d_y, p[:, n:])
        d_q = from_s * gamma + from_p * carry
        d_log_gamma += (from_s * q).sum(-1) * gamma.squeeze(-1)
        sums.carry.add_((from_p * q).sum(-1, keepdim=True))
        d_old_s[:, n:].baddbmm_(d_y.mT, q * gamma)
        d_old_p[:, n:].baddbmm_(d_y.mT, q * carry)
        scores = torch.bmm(q, k.mT)
        d_h[..., n:].baddbmm_((scores * momentum.write).mT, d_y)
        along = torch.bmm(d_y, h[..., n:].mT)
        sums.write.addcmul_(along, scores)
        d_scores = along * momentum.write
        d_log_ratio = torch.zeros_like(ratio)
        if z is not None:
            assert d_z is not None
            d_z[..., n:].baddbmm_((scores * ratio).mT, d_y)
            d_read = torch.bmm(d_y, z[..., n:].mT) * ratio
            d_log_ratio = d_read * scores
            d_scores += d_read
        d_q.baddbmm_(d_scores, k)
        d_k.baddbmm_(d_scores.mT, q)

    # The erasures.
    d_erasing = d_t = d_erasing_key = None
    if erasing is not None:
        assert d_z is not None
        assert z is not None
        d_rows = torch.bmm(tables.inverse.mT, d_z)
        d_t = torch.bmm(d_rows, z.mT).neg_().tril_(-1)
        d_erasing_key = torch.bmm(d_rows, s).neg_()
        d_old_s.baddbmm_(d_rows.mT, k * (tables.strength * gamma), alpha=-1)
        e, before = erasing.unsqueeze(-1), _later(carry)
        d_old_p.baddbmm_(d_rows.mT, k * (e * before), alpha=-1)
        d_kept_key = torch.bmm(d_rows, p).neg_()
        d_k += d_kept_key * (e * before)
        d_strength = (d_kept_key * k).sum(-1, keepdim=True)
        sums.carry.add_(_sooner(d_strength * e))
        d_h.baddbmm_(_erasing_table(k, erasing, momentum).mT, d_rows, alpha=-1)
        d_across = torch.bmm(d_rows, h.mT).neg_()
        overlap, written = torch.bmm(k, k.mT), _later(momentum.write)
        d_erasing = (d_strength * before).squeeze(-1) + (d_across * overlap * written).sum(-1)
        d_across *= e
        sums.write.add_(_sooner(d_across * overlap))
        d_overlap = d_across * written
        d_k.baddbmm_(d_overlap + d_overlap.mT, k)
    d_b, d_from_write = momentum.adjoint(b, valid, sums)
    return Derivatives(
        Given(d_k, d_q, d_old_s, d_old_p),
        d_h,
        d_log_gamma,
        d_log_last,
        d_log_ratio + d_from_write,
        d_t,
        d_erasing_key,
        d_erasing,
        d_b,
    )


def erasing_steps(gates: Gates, share: Tensor | None, rule: WriteRule) -> Tensor | None:
    """The step sizes of the erasure (N, c), from the share of it (N, 1), None for all; None where nothing is erased."""
    if not rule.delta:
        return None
    return gates.eta if share is None else gates.eta * share


def _erasing_table(k: Tensor, erasing: Tensor, momentum: Momentum) -> Tensor:
    """What each token erases of the writes before it, (N, c, c) below the diagonal."""
    return torch.bmm(k, k.mT).mul_(_later(momentum.write)).mul_(erasing.unsqueeze(-1))


def _later(table: Tensor) -> Tensor:
    """Row t holds row t-1, the first is zero; (N, c, ...)."""
    return F.pad(table[:, :-1], (0, 0, 1, 0))


def _sooner(table: Tensor) -> Tensor:
    """The adjoint of :func:`_later`."""
    return F.pad(table[:, 1:], (0, 0, 0, 1))

"""The last layers W1 of MLP memories in a segment, how they are written and read, beside the adjoint.

    S1' = gamma_c S1 + r^T (last h)                    one matrix a memory
    y = gamma hq S1^T + (hq h^T ratio) r               of the main memory

and with a momentum P1, whose tables are those of `ops.momentum_adjoint`:

    S1' = gamma_c S1 + c_c P1 + r^T (U_c h)
    P1' = b^c P1 + r^T (B_c h)
    y = gamma hq S1^T + c hq P1^T + (hq h^T U) r

Nothing is erased there. Shapes and names as in `ops.mlp_adjoint`: r is a list over the n memories, h has the columns
of all of them, hq those of the main memory, which is the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nestlearn.ops.adjoint import Tables
from nestlearn.ops.momentum_adjoint import Momentum
from nestlearn.ops.writes_adjoint import inner


class Layers(NamedTuple):
    """S1, P1 or what they are derived by: (N, m, d, h) of vectors and (N, g, 1, h) of gates."""

    wide: Tensor
    gates: Tensor

    def each(self) -> list[Tensor]:
        """By memory, gates first."""
        return [*self.gates.unbind(1), *self.wide.unbind(1)]

    def scaled(self, factor: Tensor) -> Layers:
        """Times a number for each head (N, 1, 1, 1)."""
        return Layers(self.wide * factor, self.gates * factor)

    def plus(self, other: Layers, factor: Tensor) -> Layers:
        """With ``factor`` (N, 1, 1, 1) of another added in place."""
        return Layers(self.wide.addcmul_(other.wide, factor), self.gates.addcmul_(other.gates, factor))

    def inner(self, other: Layers) -> Tensor:
        """Inner products, (N,)."""
        return inner(self.wide, other.wide) + inner(self.gates, other.gates)


class Derivatives(NamedTuple):
    """By what :func:`advance` was given; ``hq`` is None where nothing is read, ``p`` and ``b`` without a momentum."""

    h: Tensor
    hq: Tensor | None
    r: list[Tensor]
    s: Layers
    p: Layers | None
    b: Tensor | None
    log_gamma: Tensor
    log_last: Tensor
    log_ratio: Tensor


def advance(
    h: Tensor,
    hq: Tensor | None,
    r: Sequence[Tensor],
    s: Layers,
    p: Layers | None,
    tables: Tables,
    momentum: Momentum | None,
) -> tuple[Tensor | None, Layers, Layers | None, Tensor | None]:
    """What is read (N, c, d), the next S1 and P1, and the table that r is read with; ``hq`` is None where the read is
    of other weights."""
    last, write = (tables.last, tables.ratio) if momentum is None else (momentum.last_write, momentum.write)
    after, carried = _outer(h * last, r, s).plus(s, _at_end(tables.gamma)), None
    if momentum is not None:
        assert p is not None
        after = after.plus(p, _at_end(momentum.carry))
        carried = _outer(h * momentum.last_table, r, s).plus(p, _at_end(momentum.kept))
    if hq is None:
        return None, after, carried, None
    scores = torch.bmm(hq, h[..., -hq.shape[-1] :].mT).mul_(write)
    y = torch.baddbmm(torch.bmm(scores, r[-1]), hq * tables.gamma, s.wide[:, -1].mT)
    if momentum is not None:
        assert p is not None
        y.baddbmm_(hq * momentum.carry, p.wide[:, -1].mT)
    return y, after, carried, scores


def advance_adjoint(
    h: Tensor,
    hq: Tensor | None,
    r: Sequence[Tensor],
    s: Layers,
    p: Layers | None,
    scores: Tensor | None,
    tables: Tables,
    momentum: Momentum | None,
    b: Tensor | None,
    valid: Tensor | None,
    d_y: Tensor,
    d_after: Layers,
    d_carried: Layers | None,
) -> Derivatives:
    """:func:`advance` backward."""
    n, width = len(r), h.shape[-1] // len(r)
    part = lambda t, m: t[..., m * width : (m + 1) * width]  # noqa: E731

    # The states at the end.
    d_s = d_after.scaled(_at_end(tables.gamma))
    d_log_gamma = torch.zeros_like(tables.gamma[..., 0])
    d_log_gamma[:, -1] = d_s.inner(s)
    by_last = torch.cat([torch.bmm(x, d) for x, d in zip(r, d_after.each(), strict=True)], -1)
    last = tables.last if momentum is None else momentum.last_write
    d_h, at_last = by_last * last, h * last
    d_r = [torch.bmm(part(at_last, m), d.mT) for m, d in enumerate(d_after.each())]
    d_last = (by_last * h).sum(-1)
    d_p = sums = None
    if momentum is not None:
        assert p is not None
        assert d_carried is not None
        sums = momentum.zeros()
        d_p = d_after.scaled(_at_end(momentum.carry)).plus(d_carried, _at_end(momentum.kept))
        sums.carry[:, -1, 0], sums.kept[:, -1] = d_after.inner(p), d_carried.inner(p)
        by_last = torch.cat([torch.bmm(x, d) for x, d in zip(r, d_carried.each(), strict=True)], -1)
        sums.write[:, -1], sums.table[:, -1] = d_last, (by_last * h).sum(-1)
        d_h.addcmul_(by_last, momentum.last_table)
        at_last = h * momentum.last_table
        for m, d in enumerate(d_carried.each()):
            d_r[m].baddbmm_(part(at_last, m), d.mT)

    # The read.
    d_hq, d_log_ratio = None, torch.zeros_like(tables.ratio)
    if hq is not None:
        assert scores is not None
        d_hq = torch.bmm(d_y, s.wide[:, -1]).mul_(tables.gamma)
        d_log_gamma += (d_hq * hq).sum(-1)
        d_s.wide[:, -1] += torch.bmm(d_y.mT, hq * tables.gamma)
        d_r[-1].baddbmm_(scores.mT, d_y)
        d_scores = torch.bmm(d_y, r[-1].mT)
        if momentum is None:
            d_log_ratio.addcmul_(d_scores, scores)
            d_scores *= tables.ratio
        else:
            assert p is not None
            assert d_p is not None
            assert sums is not None
            from_p = torch.bmm(d_y, p.wide[:, -1])
            d_hq.addcmul_(from_p, momentum.carry)
            sums.carry.add_((from_p * hq).sum(-1, keepdim=True))
            d_p.wide[:, -1] += torch.bmm(d_y.mT, hq * momentum.carry)
            sums.write.addcmul_(d_scores, torch.bmm(hq, part(h, n - 1).mT))
            d_scores *= momentum.write
        d_hq.baddbmm_(d_scores, part(h, n - 1))
        part(d_h, n - 1).baddbmm_(d_scores.mT, hq)
    if momentum is None:
        d_log_last, d_b = d_last * tables.last[..., 0], None
    else:
        assert b is not None
        assert sums is not None
        d_log_last = torch.zeros_like(d_last)
        d_b, d_log_ratio = momentum.adjoint(b, valid, sums)
    return Derivatives(d_h, d_hq, d_r, d_s, d_p, d_b, d_log_gamma, d_log_last, d_log_ratio)


def _outer(h: Tensor, r: Sequence[Tensor], like: Layers) -> Layers:
    """``r^T h`` of every memory."""
    width, g = h.shape[-1] // len(r), like.gates.shape[1]
    made = [torch.bmm(x.mT, h[..., m * width : (m + 1) * width]) for m, x in enumerate(r)]
    return Layers(torch.stack(made[g:], 1), torch.stack(made[:g], 1) if g else torch.zeros_like(like.gates))


def _at_end(table: Tensor) -> Tensor:
    """The last entry of a table by token, (N, c) or (N, c, 1), as (N, 1, 1, 1)."""
    return table[:, -1].reshape(-1, 1, 1, 1)

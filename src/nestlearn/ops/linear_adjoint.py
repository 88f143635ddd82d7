"""A segment of linear memories (Eq. 92, 93) as one node of the graph, its backward pass by hand.

Covers delta gradient descent for the objectives ``dot`` and ``l2``; ``ops.step`` has the rest, and the second
derivatives. The matrix S of a head has R rows in n blocks, one a memory:

    U = v A^T                                          self-generated values
    rhs = eta s (clip(U) - [l2: k A^T]) - strength gamma k S^T
    Z = (I + T)^-1 rhs                                 what is written along each key
    S' = gamma_c S + Z^T (last k)
    y = gamma q S^T + (q k^T ratio) Z                  without what is read from the learned start

With a momentum the last four lines are those of `ops.momentum_adjoint`.

Shapes: N = B H (sequences times heads), c tokens, d channels, g gates among the n memories. ``d_x`` is the derivative
of the loss by x.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nestlearn.ops import momentum_adjoint, writes_adjoint
from nestlearn.ops.adjoint import (
    Gates,
    Sums,
    Tables,
    each,
    outside_autocast,
    per_sequence,
    second_order,
    units,
    units_adjoint,
    write_scales,
)
from nestlearn.ops.momentum_adjoint import Momentum, erasing_steps
from nestlearn.ops.rule import GATES, MEMORY, Start
from nestlearn.ops.step import step
from nestlearn.ops.writes_adjoint import Given

if TYPE_CHECKING:
    from nestlearn.ops.linear import LinearKernel, Packed


@dataclass
class LinearSegments:
    """:func:`nestlearn.ops.step.step` for linear memories, with the backward pass of this module.

    Args:
        kernel: the packed form of the memories.
        source: for every name of ``PROJECTIONS`` in use, which of the distinct inputs it reads.
        tells_steps: whether the step sizes are given out too.
    """

    kernel: LinearKernel
    source: dict[str, int]
    tells_steps: bool = False

    @classmethod
    def covers(cls, kernel: LinearKernel) -> bool:
        """Whether the rule and the shapes of ``kernel`` are those of this module."""
        rule, rows = kernel.rule, [r for n, r in zip(kernel.names, kernel.rows, strict=True) if n not in GATES]
        square = all(r == kernel.start.weights[MEMORY][0].shape[-1] for r in rows)
        return rule.update == "dgd" and rule.objective in ("dot", "l2") and square

    def __post_init__(self) -> None:
        start, names = self.kernel.start, self.kernel.names
        grouped = groupby(names[:-1], key=self.source.__getitem__)
        self.groups = [(i, tuple(group)) for i, group in grouped]  # memories that share an input share a product
        self.scale = write_scales(start, names)
        self.gates = sum(name in GATES for name in names)

    def __call__(
        self, anchor: Packed, state: Packed, momentum: Packed, piece: Mapping[str, Tensor], valid: Tensor | None
    ) -> tuple[Tensor, Tensor, Packed, Packed, Tensor | None]:
        start = self.kernel.start
        distinct = {i: piece[name] for name, i in self.source.items()}
        y, q, s, p, eta = LinearSegment.apply(
            self,
            valid,
            anchor[0],
            state[0],
            momentum[0] if momentum else None,
            start.momentum,
            start.bias["eta"],
            start.bias.get("alpha"),
            self.scale,
            start.erase,
            *(distinct[i] for i in range(len(distinct))),
        )
        return y, piece["q"] if q is None else q, (s,), () if p is None else (p,), eta

    def by_autograd(
        self,
        valid: Tensor | None,
        anchor: Tensor,
        state: Tensor,
        momentum: Tensor | None,
        b: Tensor | None,
        bias_eta: Tensor,
        bias_alpha: Tensor | None,
        scale: Tensor,
        erase: Tensor | None,
        *inputs: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """The same by :func:`nestlearn.ops.step.step`: what a second derivative goes through."""
        start, rule = self.kernel.start, self.kernel.rule
        bias = {"eta": bias_eta} | ({} if bias_alpha is None else {"alpha": bias_alpha})
        scales = dict(zip(self.kernel.names, scale.unbind(-1), strict=True))
        again = Start(start.weights, bias, scales, b, erase, start.accumulates)
        piece = {name: inputs[i] for name, i in self.source.items()}
        carried = () if momentum is None else (momentum,)
        y, q, (s,), after, eta = step(type(self.kernel)(again, rule), (anchor,), (state,), carried, piece, valid)
        return y, q, s, after[0] if after else None, eta


class LinearSegment(torch.autograd.Function):
    """See the head of this file. Of each segment it keeps the two states and what is as large as its tokens."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        plan: LinearSegments,
        valid: Tensor | None,
        anchor: Tensor,
        state: Tensor,
        momentum: Tensor | None,
        b: Tensor | None,
        bias_eta: Tensor,
        bias_alpha: Tensor | None,
        scale: Tensor,
        erase: Tensor | None,
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
        kernel, rule, batch = plan.kernel, plan.kernel.rule, anchor.shape[0]
        a, s0 = anchor.flatten(0, 1), state.flatten(0, 1)
        x = [t.flatten(0, 1) for t in inputs]
        own = rule.self_values

        made = {name: x[i] for name, i in plan.source.items()}
        row = 0
        for i, names in plan.groups:
            rows = sum(kernel.rows[kernel.names.index(name)] for name in names)
            y = torch.bmm(x[i], a[:, row : row + rows].mT)
            row += rows
            for name, block in zip(names, y.split([1 if n in GATES else a.shape[-1] for n in names], -1), strict=True):
                made[name] = block.squeeze(-1) if name in GATES else block
        counts = None if valid is None else per_sequence(valid, batch, scale.shape[0])
        gates = Gates.of(made["eta"], made.get("alpha"), bias_eta, bias_alpha, counts, rule)
        (k, k_factor), (q, q_factor), (v, v_factor) = units(made, kernel.names, rule)

        # What each row is asked to give, clipped within its block by ``factor`` (N, c, n).
        generated = a if own else a[:, : plan.gates]
        u = torch.bmm(v, generated.mT)
        if not own:
            u = torch.cat([u, v.repeat(1, 1, len(kernel.names) - plan.gates)], -1)
        accumulates = None if kernel.start.accumulates is None else each(kernel.start.accumulates, batch)[:, None, None]
        if accumulates is not None:
            u[..., kernel.others :] = torch.where(accumulates, v, u[..., kernel.others :])
        factor = None
        if rule.clip_values:
            factor = torch.matmul(u * u, kernel.blocks.mT).clamp_min_(1.0).rsqrt_()
            if not own:
                factor[..., plan.gates :] = 1
            if accumulates is not None:
                factor[..., -1:].masked_fill_(accumulates, 1)
        steps = gates.eta.unsqueeze(-1) * each(scale, batch).unsqueeze(1)
        z = u * torch.matmul(steps if factor is None else steps * factor, kernel.blocks)
        answer = None
        if rule.objective == "l2":
            answer = torch.bmm(k, a.mT)
            z.addcmul_(answer, torch.matmul(steps, kernel.blocks), value=-1)

        share = None if erase is None else each(erase, batch).unsqueeze(-1)
        tables = Tables.of(k, gates, share, rule.delta)
        given = Given(k, q, s0, None if momentum is None else momentum.flatten(0, 1))
        at, n = a if rule.read == "anchor" else None, kernel.others
        h = p = scores = None
        moments: tuple[Tensor, ...] = ()
        if b is None:
            y, s, z, scores = writes_adjoint.advance(given, z, tables, rule.delta, at, n)
        else:
            moments = Momentum.of(b, tables.ratio, counts)
            h = z
            y, s, p, z = momentum_adjoint.advance(given, h, tables, moments, erasing_steps(gates, share, rule), at, n)

        ctx.plan, ctx.valid = plan, valid
        entered = (anchor, state, momentum, b, bias_eta, bias_alpha, scale, erase, *inputs)
        ctx.inputs = len(entered)
        made_here = (k, q, v, k_factor, q_factor, v_factor, u, factor, steps, answer, z, scores, h)
        ctx.save_for_backward(*entered, *gates, *tables, *made_here, *moments)
        heads = anchor.shape[:2]
        return (
            y.unflatten(0, heads),
            q.unflatten(0, heads) if "q" in kernel.names else None,
            s.unflatten(0, heads),
            None if p is None else p.unflatten(0, heads),
            gates.eta.unflatten(0, heads) if plan.tells_steps else None,
        )

    @staticmethod
    @outside_autocast
    def backward(  # type: ignore[override]
        ctx: Any, d_y: Tensor, d_queries: Tensor | None, d_s: Tensor, d_p: Tensor | None, d_told: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        plan, valid = ctx.plan, ctx.valid
        kept = ctx.saved_tensors  # read once: checkpointing recomputes at the first look and refuses a second
        entered, saved = kept[: ctx.inputs], kept[ctx.inputs :]
        if torch.is_grad_enabled():
            again, d_outputs = partial(plan.by_autograd, valid), (d_y, d_queries, d_s, d_p, d_told)
            return second_order(again, entered, ctx.needs_input_grad[2:], d_outputs)
        kernel, rule = plan.kernel, plan.kernel.rule
        anchor, state, momentum, b, _, _, scale, erase, *inputs = entered
        batch, heads = anchor.shape[:2]
        a, s0, d_s, d_y = (t.flatten(0, 1) for t in (anchor, state, d_s, d_y))
        gates, tables = Gates(*saved[:4]), Tables(*saved[4:10])
        k, q, v, k_factor, q_factor, v_factor, u, factor, steps, answer, z, scores, h = saved[10:23]
        n, own = kernel.others, rule.self_values
        counts = None if valid is None else per_sequence(valid, batch, heads)
        share = None if erase is None else each(erase, batch).unsqueeze(-1)

        given = Given(k, q, s0, None if momentum is None else momentum.flatten(0, 1))
        at = a if rule.read == "anchor" else None
        if b is None:
            back = writes_adjoint.advance_adjoint(given, z, scores, tables, rule.delta, at, n, d_y, d_s)
        else:
            assert d_p is not None
            back = momentum_adjoint.advance_adjoint(
                given,
                h,
                z,
                tables,
                Momentum(*saved[23:]),
                erasing_steps(gates, share, rule),
                b,
                counts,
                at,
                n,
                d_y,
                d_s,
                d_p.flatten(0, 1),
            )
        (_, d_q, d_s0, d_p0), d_h = back.given, back.h
        d_k, d_eta, d_log_alpha, d_share = back.through_tables(k, gates, share, tables)

        # Errors and self-generated values: with t = factor U, d U = factor (d t - [clipped] t (t . d t)).
        along = torch.matmul(u * d_h, kernel.blocks.mT)
        d_steps = along if factor is None else along * factor
        d_u = d_h * torch.matmul(steps if factor is None else steps * factor, kernel.blocks)
        if factor is not None:
            turn = (steps * along).mul_(factor**3).mul_(factor < 1)
            d_u.addcmul_(u, torch.matmul(turn, kernel.blocks), value=-1)
        d_v = torch.zeros_like(v)
        if kernel.start.accumulates is not None:
            mask = each(kernel.start.accumulates, batch)[:, None, None]
            d_v += d_u[..., n:] * mask
            d_u[..., n:].masked_fill_(mask, 0)
        if own:
            d_v.baddbmm_(d_u, a)
            d_a = torch.bmm(d_u.mT, v)
        else:
            d_v += d_u[..., plan.gates :].unflatten(-1, (-1, v.shape[-1])).sum(-2)
            d_a = torch.zeros_like(a)
            if plan.gates:
                d_v.baddbmm_(d_u[..., : plan.gates], a[:, : plan.gates])
                d_a[:, : plan.gates] = torch.bmm(d_u[..., : plan.gates].mT, v)
        if answer is not None:
            d_steps = d_steps - torch.matmul(answer * d_h, kernel.blocks.mT)
            d_answer = d_h * torch.matmul(steps, kernel.blocks)
            d_k.baddbmm_(d_answer, a, alpha=-1)
            d_a.baddbmm_(d_answer.mT, k, alpha=-1)
        if rule.read == "anchor":
            d_a[:, n:] += torch.bmm(d_y.mT, q)
        d_scale = (d_steps * gates.eta.unsqueeze(-1)).sum(1).unflatten(0, (batch, heads)).sum(0)
        d_eta = d_eta + torch.matmul(d_steps, each(scale, batch).unsqueeze(-1)).squeeze(-1)
        if d_told is not None:
            d_eta += d_told.flatten(0, 1)

        # Generation.
        d_raw_eta, d_raw_alpha = gates.adjoint(d_eta, d_log_alpha, counts, rule)
        if d_queries is not None:
            d_q = d_q + d_queries.flatten(0, 1)
        used = (k, k_factor), (q, q_factor), (v, v_factor)
        d_made = {"eta": d_raw_eta, "alpha": d_raw_alpha} | units_adjoint(used, (d_k, d_q, d_v))
        d_inputs = Sums(len(inputs))
        row = 0
        for i, names in plan.groups:
            parts = [d_made[name].unsqueeze(-1) if name in GATES else d_made[name] for name in names]
            d_rows = torch.cat(parts, -1) if len(parts) > 1 else parts[0]
            block = slice(row, row + d_rows.shape[-1])
            row = block.stop
            d_inputs.add(i, torch.bmm(d_rows, a[:, block]))
            d_a[:, block] += torch.bmm(d_rows.mT, inputs[i].flatten(0, 1))
        for name, i in plan.source.items():
            if name not in kernel.names:
                d_inputs.add(i, d_made[name])
        per_head = lambda t: t.sum(-1).unflatten(0, (batch, heads)).sum(0)  # noqa: E731
        shape = batch, heads
        return (
            None,
            None,
            d_a.unflatten(0, shape),
            d_s0.unflatten(0, shape),
            None if d_p0 is None else d_p0.unflatten(0, shape),
            back.b,
            per_head(d_raw_eta),
            per_head(d_raw_alpha) if rule.decay else None,
            d_scale,
            None if d_share is None else per_head(d_share),
            *(None if t is None else t.unflatten(0, shape) for t in d_inputs.found),
        )

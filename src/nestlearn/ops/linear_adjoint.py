"""A segment of linear memories (Eq. 92, 93) as one node of the graph, its backward pass by hand.

Covers delta gradient descent without momentum, for the objectives ``dot`` and ``l2``; ``ops.step`` has the rest, and
the second derivatives. The matrix S of a head has R rows in n blocks, one a memory:

    U = v A^T                                          self-generated values
    rhs = eta s (clip(U) - [l2: k A^T]) - strength gamma k S^T
    Z = (I + T)^-1 rhs                                 what is written along each key
    S' = gamma_c S + Z^T (last k)
    y = gamma q S^T + (q k^T ratio) Z                  without what is read from the learned start

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
from nestlearn.ops.rule import GATES, MEMORY, Start
from nestlearn.ops.step import step

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
        return rule.update == "dgd" and kernel.start.momentum is None and rule.objective in ("dot", "l2") and square

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
        y, q, s, eta = LinearSegment.apply(
            self,
            valid,
            anchor[0],
            state[0],
            start.bias["eta"],
            start.bias.get("alpha"),
            self.scale,
            start.erase,
            *(distinct[i] for i in range(len(distinct))),
        )
        return y, piece["q"] if q is None else q, (s,), (), eta

    def by_autograd(
        self,
        valid: Tensor | None,
        anchor: Tensor,
        state: Tensor,
        bias_eta: Tensor,
        bias_alpha: Tensor | None,
        scale: Tensor,
        erase: Tensor | None,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        """The same by :func:`nestlearn.ops.step.step`: what a second derivative goes through."""
        start, rule = self.kernel.start, self.kernel.rule
        bias = {"eta": bias_eta} | ({} if bias_alpha is None else {"alpha": bias_alpha})
        scales = dict(zip(self.kernel.names, scale.unbind(-1), strict=True))
        again = Start(start.weights, bias, scales, None, erase, start.accumulates)
        piece = {name: inputs[i] for name, i in self.source.items()}
        y, q, (s,), _, eta = step(type(self.kernel)(again, rule), (anchor,), (state,), (), piece, valid)
        return y, q, s, eta


class LinearSegment(torch.autograd.Function):
    """See the head of this file. Of each segment it keeps the two states and what is as large as its tokens."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        plan: LinearSegments,
        valid: Tensor | None,
        anchor: Tensor,
        state: Tensor,
        bias_eta: Tensor,
        bias_alpha: Tensor | None,
        scale: Tensor,
        erase: Tensor | None,
        *inputs: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
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
        if rule.delta:
            z = torch.bmm(tables.inverse, torch.baddbmm(z, k * (tables.strength * tables.gamma), s0.mT, alpha=-1))
        s = torch.baddbmm(s0 * tables.gamma[:, -1:], z.mT, k * tables.last)
        n = kernel.others
        scores = None
        if rule.read == "anchor":
            y = torch.bmm(q, a[:, n:].mT)
        else:
            scores = torch.bmm(q, k.mT).mul_(tables.ratio)
            y = torch.baddbmm(torch.bmm(scores, z[..., n:]), q * tables.gamma, s0[:, n:].mT)

        ctx.plan, ctx.valid = plan, valid
        given = (anchor, state, bias_eta, bias_alpha, scale, erase, *inputs)
        ctx.inputs = len(given)
        ctx.save_for_backward(
            *given, *gates, *tables, k, q, v, k_factor, q_factor, v_factor, u, factor, steps, answer, z, scores
        )
        heads = anchor.shape[:2]
        return (
            y.unflatten(0, heads),
            q.unflatten(0, heads) if "q" in kernel.names else None,
            s.unflatten(0, heads),
            gates.eta.unflatten(0, heads) if plan.tells_steps else None,
        )

    @staticmethod
    @outside_autocast
    def backward(  # type: ignore[override]
        ctx: Any, d_y: Tensor, d_queries: Tensor | None, d_s: Tensor, d_told: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        plan, valid = ctx.plan, ctx.valid
        kept = ctx.saved_tensors  # read once: checkpointing recomputes at the first look and refuses a second
        given, saved = kept[: ctx.inputs], kept[ctx.inputs :]
        if torch.is_grad_enabled():
            again, d_outputs = partial(plan.by_autograd, valid), (d_y, d_queries, d_s, d_told)
            return second_order(again, given, ctx.needs_input_grad[2:], d_outputs)
        kernel, rule = plan.kernel, plan.kernel.rule
        anchor, state, _, _, scale, erase, *inputs = given
        batch, heads = anchor.shape[:2]
        a, s0, d_s, d_y = (t.flatten(0, 1) for t in (anchor, state, d_s, d_y))
        gates, tables = Gates(*saved[:4]), Tables(*saved[4:10])
        k, q, v, k_factor, q_factor, v_factor, u, factor, steps, answer, z, scores = saved[10:]
        n, own = kernel.others, rule.self_values
        share = None if erase is None else each(erase, batch).unsqueeze(-1)

        # The state at the end.
        d_z = torch.bmm(k * tables.last, d_s.mT)
        d_last_key = torch.bmm(z, d_s)
        d_k = d_last_key * tables.last
        d_log_last = (d_k * k).sum(-1)
        d_s0 = d_s * tables.gamma[:, -1:]
        d_log_gamma = torch.zeros_like(d_log_last)
        d_log_gamma[:, -1] = torch.bmm(d_s0.flatten(1).unsqueeze(1), s0.flatten(1).unsqueeze(2)).flatten()

        # The read.
        if rule.read == "anchor":
            d_q = torch.bmm(d_y, a[:, n:])
            d_log_ratio = torch.zeros_like(tables.ratio)
        else:
            d_q = torch.bmm(d_y, s0[:, n:]).mul_(tables.gamma)
            d_log_gamma += (d_q * q).sum(-1)
            d_s0[:, n:] += torch.bmm(d_y.mT, q * tables.gamma)
            d_z[..., n:] += torch.bmm(scores.mT, d_y)
            d_scores = torch.bmm(d_y, z[..., n:].mT)
            d_log_ratio = d_scores * scores
            d_scores *= tables.ratio
            d_q.baddbmm_(d_scores, k)
            d_k.baddbmm_(d_scores.mT, q)

        # The writes.
        d_t = d_erasing_key = None
        if rule.delta:
            d_z = torch.bmm(tables.inverse.mT, d_z)
            d_t = torch.bmm(d_z, z.mT).neg_().tril_(-1)
            d_erasing_key = torch.bmm(d_z, s0).neg_()
            d_s0.baddbmm_(d_z.mT, k * (tables.strength * tables.gamma), alpha=-1)
        d_key, d_eta, d_log_alpha, d_share = tables.adjoint(
            k, gates, share, d_t, d_erasing_key, d_log_ratio, d_log_last, d_log_gamma
        )
        if d_key is not None:
            d_k += d_key

        # Errors and self-generated values: with t = factor U, d U = factor (d t - [clipped] t (t . d t)).
        along = torch.matmul(u * d_z, kernel.blocks.mT)
        d_steps = along if factor is None else along * factor
        d_u = d_z * torch.matmul(steps if factor is None else steps * factor, kernel.blocks)
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
            d_steps = d_steps - torch.matmul(answer * d_z, kernel.blocks.mT)
            d_answer = d_z * torch.matmul(steps, kernel.blocks)
            d_k.baddbmm_(d_answer, a, alpha=-1)
            d_a.baddbmm_(d_answer.mT, k, alpha=-1)
        if rule.read == "anchor":
            d_a[:, n:] += torch.bmm(d_y.mT, q)
        d_scale = (d_steps * gates.eta.unsqueeze(-1)).sum(1).unflatten(0, (batch, heads)).sum(0)
        d_eta = d_eta + torch.matmul(d_steps, each(scale, batch).unsqueeze(-1)).squeeze(-1)
        if d_told is not None:
            d_eta += d_told.flatten(0, 1)

        # Generation.
        counts = None if valid is None else per_sequence(valid, batch, heads)
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
            per_head(d_raw_eta),
            per_head(d_raw_alpha) if rule.decay else None,
            d_scale,
            None if d_share is None else per_head(d_share),
            *(None if t is None else t.unflatten(0, shape) for t in d_inputs.found),
        )

"""A segment of MLP memories (Eq. 89-91) as one node of the graph, its backward pass by hand.

Covers delta gradient descent with self-generated values and without momentum, for the objectives ``dot`` and ``l2``;
``ops.step`` has the rest, and the second derivatives. With W2 the rows of all memories and W1 one matrix a memory:

    z = [k; v] W2^T,  h = silu(z),  [a; U] = [k; v] + h W1^T      answers and self-generated values
    r = eta s (clip(U) - [l2: a])                                 written to W1 along h
    Z = (I + T)^-1 (r W1 silu'(z) - strength gamma k S2^T)        written to W2 along k
    S2' = gamma_c S2 + Z^T (last k),   S1' = gamma_c S1 + r^T (last h)

Shapes: N = B H (sequences times heads), c tokens, d channels, h hidden, g gates among the n memories. ``d_x`` is the
derivative of the loss by x.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

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
from nestlearn.ops.rule import MEMORY, Start, WriteRule
from nestlearn.ops.step import step

if TYPE_CHECKING:
    from nestlearn.ops.mlp import MLPKernel, Packed

silu_adjoint = torch.ops.aten.silu_backward


@dataclass
class MLPSegments:
    """:func:`nestlearn.ops.step.step` for MLP memories, with the backward pass of this module.

    Args:
        kernel: the packed form of the memories.
        source: for every name of ``PROJECTIONS`` in use, which of the distinct inputs it reads.
        tells_steps: whether the step sizes are given out too.
    """

    kernel: MLPKernel
    source: dict[str, int]
    tells_steps: bool = False

    @classmethod
    def covers(cls, kernel: MLPKernel) -> bool:
        """Whether the rule of ``kernel`` is that of this module."""
        rule = kernel.rule
        return rule.self_values and kernel.start.momentum is None and rule.objective in ("dot", "l2")

    def __post_init__(self) -> None:
        start, names = self.kernel.start, self.kernel.names
        grouped = groupby(range(len(names) - 1), key=lambda m: self.source[names[m]])
        self.groups = [(i, tuple(group)) for i, group in grouped]  # memories that share an input share a product
        self.scale = write_scales(start, names)
        on_top = self.kernel.rule.retention == "start" and self.kernel.rule.read == "inclusive"
        self.base = start.weights[MEMORY] if on_top else (None, None)

    def __call__(
        self, anchor: Packed, state: Packed, momentum: Packed, piece: Mapping[str, Tensor], valid: Tensor | None
    ) -> tuple[Tensor, Tensor, Packed, Packed, Tensor | None]:
        start = self.kernel.start
        distinct = {i: piece[name] for name, i in self.source.items()}
        fixed = (start.bias["eta"], start.bias.get("alpha"), self.scale, start.erase, *self.base)
        inputs = (distinct[i] for i in range(len(distinct)))
        y, *after, eta = MLPSegment.apply(self, valid, *anchor, *state, *fixed, *inputs)
        return y, piece["q"], tuple(after), (), eta

    def by_autograd(self, valid: Tensor | None, *given: Any) -> tuple[Tensor, ...]:
        """The same by :func:`nestlearn.ops.step.step`: what a second derivative goes through."""
        anchor, state, (bias_eta, bias_alpha, scale, erase, base1, base2), inputs = (
            given[:3],
            given[3:6],
            given[6:12],
            given[12:],
        )
        start, rule = self.kernel.start, self.kernel.rule
        weights = start.weights if base1 is None else {**start.weights, MEMORY: (base1, base2)}
        bias = {"eta": bias_eta} | ({} if bias_alpha is None else {"alpha": bias_alpha})
        scales = dict(zip(self.kernel.names, scale.unbind(-1), strict=True))
        again = type(self.kernel)(Start(weights, bias, scales, None, erase), rule)
        piece = {name: inputs[i] for name, i in self.source.items()}
        y, _, after, _, eta = step(again, anchor, state, (), piece, valid)
        return y, *after, eta


class MLPSegment(torch.autograd.Function):
    """See the head of this file. Of each segment it keeps the two states and what is as large as its tokens."""

    @staticmethod
    def forward(ctx: Any, plan: MLPSegments, valid: Tensor | None, *given: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kernel, rule = plan.kernel, plan.kernel.rule
        batch, heads = given[0].shape[:2]
        a2, a1, ag, s2, s1, sg = (t.flatten(0, 1) for t in given[:6])
        bias_eta, bias_alpha, scale, erase, base1, base2 = given[6:12]
        x = [t.flatten(0, 1) for t in given[12:]]
        names, g, n, width = kernel.names, kernel.g, kernel.n, kernel.hidden
        w1 = [*ag.unbind(1), *a1.unbind(1)]
        part = lambda t, m: t[..., m * width : (m + 1) * width]  # noqa: E731

        made = {name: x[i] for name, i in plan.source.items()}
        generated = []
        for i, group in plan.groups:
            z = torch.bmm(x[i], a2[:, group[0] * width : (group[-1] + 1) * width].mT)
            h = F.silu(z)
            generated += [z, h]
            for j, m in enumerate(group):
                y = torch.bmm(part(h, j), w1[m].mT)
                made[names[m]] = y.squeeze(-1) if m < g else y.add_(x[i])
        counts = None if valid is None else per_sequence(valid, batch, heads)
        gates = Gates.of(made["eta"], made.get("alpha"), bias_eta, bias_alpha, counts, rule)
        (k, k_factor), (q, q_factor), (v, v_factor) = units(made, names, rule)
        c = k.shape[1]

        # Keys and values go through the same weights: one product for both.
        both = torch.cat([k, v], 1)
        z = torch.bmm(both, a2.mT)
        h = F.silu(z)
        out = [torch.bmm(part(h, m), w1[m].mT) for m in range(n)]
        gate_out = torch.cat(out[:g], -1) if g else z.new_zeros(*z.shape[:2], 0)
        wide_out = torch.stack(out[g:], 1).add_(both.unsqueeze(1))
        steps = gates.eta.unsqueeze(-1) * each(scale, batch).unsqueeze(1)  # (N, c, n)
        gate_written, gate_factor = _written(gate_out.mT.unsqueeze(-1), steps[..., :g].mT.unsqueeze(-1), rule)
        wide_written, wide_factor = _written(wide_out, steps[..., g:].mT.unsqueeze(-1), rule)
        r = [*gate_written.unbind(1), *wide_written.unbind(1)]
        back = torch.cat([torch.bmm(r[m], w1[m]) for m in range(n)], -1)
        share = None if erase is None else each(erase, batch).unsqueeze(-1)
        tables = Tables.of(k, gates, share, rule.delta)
        written = silu_adjoint(back, z[:, :c])
        if rule.delta:
            rhs = torch.baddbmm(written, k * (tables.strength * tables.gamma), s2.mT, alpha=-1)
            written = torch.bmm(tables.inverse, rhs)
        at_end = tables.gamma[:, -1:]
        next2 = torch.baddbmm(s2 * at_end, written.mT, k * tables.last)
        h_last = h[:, :c] * tables.last
        outer = [torch.bmm(r[m].mT, part(h_last, m)) for m in range(n)]
        next1 = torch.stack(outer[g:], 1).addcmul_(s1, at_end.unsqueeze(-1))
        next_gates = torch.stack(outer[:g], 1).addcmul_(sg, at_end.unsqueeze(-1)) if g else sg

        memory = slice((n - 1) * width, None)
        scores = scores1 = None
        if rule.read == "anchor":
            zq = torch.bmm(q, a2[:, memory].mT)
            hq = F.silu(zq)
            y = torch.baddbmm(q, hq, w1[-1].mT)
        else:
            scores = torch.bmm(q, k.mT).mul_(tables.ratio)
            zq = torch.baddbmm(torch.bmm(scores, written[..., memory]), q * tables.gamma, s2[:, memory].mT)
            if base2 is not None:
                zq.baddbmm_(q, each(base2, batch).mT)
            hq = F.silu(zq)
            scores1 = torch.bmm(hq, h[:, :c, memory].mT).mul_(tables.ratio)
            y = torch.baddbmm(torch.baddbmm(q, scores1, r[-1]), hq * tables.gamma, s1[:, -1].mT)
            if base1 is not None:
                y.baddbmm_(hq, each(base1, batch).mT)

        ctx.plan, ctx.valid, ctx.given = plan, valid, len(given)
        ctx.save_for_backward(
            *given,
            *gates,
            *tables,
            *(k, q, v, k_factor, q_factor, v_factor, both, z, h, gate_out, wide_out, steps),
            *(gate_written, wide_written, gate_factor, wide_factor, back, written, zq, hq, scores, scores1),
            *generated,
        )
        told = gates.eta if plan.tells_steps else None
        return tuple(None if t is None else t.unflatten(0, (batch, heads)) for t in (y, next2, next1, next_gates, told))

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        plan, valid = ctx.plan, ctx.valid
        kept = ctx.saved_tensors  # read once: checkpointing recomputes at the first look and refuses a second
        given, saved = kept[: ctx.given], kept[ctx.given :]
        if torch.is_grad_enabled():
            return second_order(partial(plan.by_autograd, valid), given, ctx.needs_input_grad[2:], d_outputs)
        kernel, rule = plan.kernel, plan.kernel.rule
        batch, heads = given[0].shape[:2]
        a2, a1, ag, s2, s1, sg = (t.flatten(0, 1) for t in given[:6])
        _, _, scale, erase, base1, base2 = given[6:12]
        x = [t.flatten(0, 1) for t in given[12:]]
        *d_main, d_told = d_outputs
        d_y, d_next2, d_next1, d_next_gates = (t.flatten(0, 1) for t in d_main if t is not None)
        gates, tables = Gates(*saved[:4]), Tables(*saved[4:10])
        k, q, v, k_factor, q_factor, v_factor, both, z, h, gate_out, wide_out, steps = saved[10:22]
        gate_written, wide_written, gate_factor, wide_factor, back, written, zq, hq, scores, scores1 = saved[22:32]
        generated = saved[32:]
        names, g, n, width, c = kernel.names, kernel.g, kernel.n, kernel.hidden, k.shape[1]
        w1 = [*ag.unbind(1), *a1.unbind(1)]
        r = [*gate_written.unbind(1), *wide_written.unbind(1)]
        part = lambda t, m: t[..., m * width : (m + 1) * width]  # noqa: E731
        memory = slice((n - 1) * width, None)
        share = None if erase is None else each(erase, batch).unsqueeze(-1)
        zk, hk = z[:, :c], h[:, :c]

        # The states at the end.
        at_end = tables.gamma[:, -1:]
        d_s2, d_s1, d_sg = d_next2 * at_end, d_next1 * at_end.unsqueeze(-1), d_next_gates * at_end.unsqueeze(-1)
        dot = lambda a, b: torch.bmm(a.flatten(1).unsqueeze(1), b.flatten(1).unsqueeze(2)).flatten()  # noqa: E731
        d_log_gamma = torch.zeros_like(gates.eta)
        d_log_gamma[:, -1] = dot(d_s2, s2) + dot(d_s1, s1) + dot(d_sg, sg)
        d_written = torch.bmm(k * tables.last, d_next2.mT)
        d_k = torch.bmm(written, d_next2).mul_(tables.last)
        d_next = [*d_next_gates.unbind(1), *d_next1.unbind(1)]
        d_hk = torch.cat([torch.bmm(r[m], d_next[m]) for m in range(n)], -1).mul_(tables.last)
        d_log_last = (d_k * k).sum(-1) + (d_hk * hk).sum(-1)
        h_last = hk * tables.last
        d_r = [torch.bmm(part(h_last, m), d_next[m].mT) for m in range(n)]

        # The read: through the last layer, then the first.
        d_base1 = d_base2 = None
        d_log_ratio = torch.zeros_like(tables.ratio)
        if rule.read == "anchor":
            d_zq = silu_adjoint(torch.bmm(d_y, w1[-1]), zq)
            d_q = torch.baddbmm(d_y, d_zq, a2[:, memory])
        else:
            d_hq = torch.bmm(d_y, s1[:, -1]).mul_(tables.gamma)
            d_log_gamma += (d_hq * hq).sum(-1)
            d_s1[:, -1] += torch.bmm(d_y.mT, hq * tables.gamma)
            d_r[-1].baddbmm_(scores1.mT, d_y)
            d_scores = torch.bmm(d_y, r[-1].mT)
            d_log_ratio.addcmul_(d_scores, scores1)
            d_scores *= tables.ratio
            d_hq.baddbmm_(d_scores, hk[..., memory])
            d_hk[..., memory] += torch.bmm(d_scores.mT, hq)
            if base1 is not None:
                d_hq.baddbmm_(d_y, each(base1, batch))
                d_base1 = torch.bmm(d_y.mT, hq)
            d_zq = silu_adjoint(d_hq, zq)
            d_q = torch.bmm(d_zq, s2[:, memory]).mul_(tables.gamma)
            d_log_gamma += (d_q * q).sum(-1)
            d_s2[:, memory] += torch.bmm(d_zq.mT, q * tables.gamma)
            d_written[..., memory] += torch.bmm(scores.mT, d_zq)
            d_scores = torch.bmm(d_zq, written[..., memory].mT)
            d_log_ratio.addcmul_(d_scores, scores)
            d_scores *= tables.ratio
            d_q.add_(d_y).baddbmm_(d_scores, k)
            d_k.baddbmm_(d_scores.mT, q)
            if base2 is not None:
                d_q.baddbmm_(d_zq, each(base2, batch))
                d_base2 = torch.bmm(d_zq.mT, q)

        # The writes to W2.
        d_t = d_erasing_key = None
        if rule.delta:
            d_written = torch.bmm(tables.inverse.mT, d_written)
            d_t = torch.bmm(d_written, written.mT).neg_().tril_(-1)
            d_erasing_key = torch.bmm(d_written, s2).neg_()
            d_s2.baddbmm_(d_written.mT, k * (tables.strength * tables.gamma), alpha=-1)
        d_key, d_eta, d_log_alpha, d_share = tables.adjoint(
            k, gates, share, d_t, d_erasing_key, d_log_ratio, d_log_last, d_log_gamma
        )
        if d_key is not None:
            d_k += d_key
        d_back = silu_adjoint(d_written, zk)
        d_w1 = []
        for m in range(n):
            d_r[m].baddbmm_(part(d_back, m), w1[m].mT)
            d_w1.append(torch.bmm(r[m].mT, part(d_back, m)))

        # Errors, answers and self-generated values.
        step_of = lambda t: t.mT.unsqueeze(-1)  # noqa: E731
        d_gate_out, d_gate_steps = (
            _written_adjoint(
                gate_out.mT.unsqueeze(-1), step_of(steps[..., :g]), gate_factor, torch.stack(d_r[:g], 1), rule
            )
            if g
            else (None, None)
        )
        d_wide_out, d_wide_steps = _written_adjoint(
            wide_out, step_of(steps[..., g:]), wide_factor, torch.stack(d_r[g:], 1), rule
        )
        d_steps = d_wide_steps if d_gate_steps is None else torch.cat([d_gate_steps, d_wide_steps], 1)  # (N, n, c)
        d_out = [*(() if d_gate_out is None else d_gate_out.unbind(1)), *d_wide_out.unbind(1)]
        d_h = torch.cat([torch.bmm(d_out[m], w1[m]) for m in range(n)], -1)
        d_h[:, :c] += d_hk
        for m in range(n):
            d_w1[m].baddbmm_(d_out[m].mT, part(h, m))
        d_z = silu_adjoint(d_h, z)
        s = torch.sigmoid(zk)
        curved = torch.lerp(hk, 2 - hk, s).mul_(1 - s)  # silu''
        d_z[:, :c].addcmul_(curved.mul_(back), d_written)
        d_both = torch.baddbmm(d_wide_out.sum(1), d_z, a2)
        d_a2 = torch.bmm(d_z.mT, both)
        d_k += d_both[:, :c]
        d_v = d_both[:, c:]
        if rule.read == "anchor":
            d_a2[:, memory] += torch.bmm(d_zq.mT, q)
            d_w1[-1].baddbmm_(d_y.mT, hq)
        d_eta = d_eta + (d_steps * each(scale, batch).unsqueeze(-1)).sum(1)
        if d_told is not None:
            d_eta += d_told.flatten(0, 1)
        d_scale = (d_steps * gates.eta.unsqueeze(1)).sum(-1)

        # Generation.
        counts = None if valid is None else per_sequence(valid, batch, heads)
        d_raw_eta, d_raw_alpha = gates.adjoint(d_eta, d_log_alpha, counts, rule)
        used = (k, k_factor), (q, q_factor), (v, v_factor)
        d_made = {"eta": d_raw_eta, "alpha": d_raw_alpha} | units_adjoint(used, (d_k, d_q, d_v))
        d_inputs = Sums(len(x))
        for number, (i, group) in enumerate(plan.groups):
            z, h = generated[2 * number : 2 * number + 2]
            d_hidden = []
            for j, m in enumerate(group):
                d_name = d_made[names[m]].unsqueeze(-1) if m < g else d_made[names[m]]
                d_hidden.append(torch.bmm(d_name, w1[m]))
                d_w1[m].baddbmm_(d_name.mT, part(h, j))
                if m >= g:
                    d_inputs.add(i, d_name)
            d_z = silu_adjoint(torch.cat(d_hidden, -1), z)
            block = slice(group[0] * width, (group[-1] + 1) * width)
            d_inputs.add(i, torch.bmm(d_z, a2[:, block]))
            d_a2[:, block] += torch.bmm(d_z.mT, x[i])
        for name, i in plan.source.items():
            if name not in names:
                d_inputs.add(i, d_made[name])
        over_batch = lambda t: t.unflatten(0, (batch, heads)).sum(0)  # noqa: E731
        split = lambda t: t.unflatten(0, (batch, heads))  # noqa: E731
        return (
            None,
            None,
            split(d_a2),
            split(torch.stack(d_w1[g:], 1)),
            split(torch.stack(d_w1[:g], 1) if g else torch.zeros_like(ag)),
            *map(split, (d_s2, d_s1, d_sg)),
            over_batch(d_raw_eta.sum(-1)),
            over_batch(d_raw_alpha.sum(-1)) if rule.decay else None,
            over_batch(d_scale),
            None if d_share is None else over_batch(d_share.sum(-1)),
            None if d_base1 is None else over_batch(d_base1),
            None if d_base2 is None else over_batch(d_base2),
            *(None if t is None else split(t) for t in d_inputs.found),
        )


def _written(out: Tensor, steps: Tensor, rule: WriteRule) -> tuple[Tensor, Tensor | None]:
    """``steps (clip(U) - [l2: a])`` (N, m, c, d) of answers and values ``[a; U]`` (N, m, 2 c, d), and the factor of the
    clip (N, m, c, 1)."""
    c = out.shape[2] // 2
    answers, values = out[:, :, :c], out[:, :, c:]
    factor = (values * values).sum(-1, keepdim=True).clamp_min_(1.0).rsqrt_() if rule.clip_values else None
    written = values * (steps if factor is None else steps * factor)
    if rule.objective == "l2":
        written.addcmul_(answers, steps, value=-1)
    return written, factor


def _written_adjoint(
    out: Tensor, steps: Tensor, factor: Tensor | None, d_written: Tensor, rule: WriteRule
) -> tuple[Tensor, Tensor]:
    """Derivatives by ``[a; U]`` (N, m, 2 c, d) and by the steps (N, m, c)."""
    c = out.shape[2] // 2
    answers, values = out[:, :, :c], out[:, :, c:]
    along = (values * d_written).sum(-1, keepdim=True)
    d_steps = along if factor is None else along * factor
    d_out = torch.zeros_like(out) if rule.objective == "dot" else torch.empty_like(out)
    if factor is None:
        torch.mul(d_written, steps, out=d_out[:, :, c:])
    else:  # with t = factor U, d U = factor (d t - [clipped] t (t . d t))
        torch.mul(d_written, steps * factor, out=d_out[:, :, c:])
        d_out[:, :, c:].addcmul_(values, (steps * along).mul_(factor**3).mul_(factor < 1), value=-1)
    if rule.objective == "l2":
        torch.mul(d_written, -steps, out=d_out[:, :, :c])
        d_steps = d_steps - (answers * d_written).sum(-1, keepdim=True)
    return d_out, d_steps.squeeze(-1)

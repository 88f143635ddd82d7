"""A segment of MLP memories (Eq. 89-91) as one node of the graph, its backward pass by hand.

Covers delta gradient descent with self-generated values, for the objectives ``dot`` and ``l2``; ``ops.step`` has the
rest, and the second derivatives. With W2 the rows of all memories and W1 one matrix a memory:

    z = [k; v] W2^T,  h = silu(z),  [a; U] = [k; v] + h W1^T      answers and self-generated values
    r = eta s (clip(U) - [l2: a])                                 written to W1 along h
    Z = (I + T)^-1 (r W1 silu'(z) - strength gamma k S2^T)        written to W2 along k
    S2' = gamma_c S2 + Z^T (last k),   S1' = gamma_c S1 + r^T (last h)

W2 is written and read by `ops.writes_adjoint`, with a momentum by `ops.momentum_adjoint`, W1 by `ops.layers_adjoint`.

Shapes: N = B H (sequences times heads), c tokens, d channels, h hidden, g gates among the n memories. ``d_x`` is the
derivative of the loss by x.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.ops import layers_adjoint, momentum_adjoint, writes_adjoint
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
from nestlearn.ops.layers_adjoint import Layers
from nestlearn.ops.momentum_adjoint import Momentum, erasing_steps
from nestlearn.ops.rule import MEMORY, Start, WriteRule
from nestlearn.ops.step import step
from nestlearn.ops.writes_adjoint import Given

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
        return rule.self_values and rule.objective in ("dot", "l2")

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
        fixed = (start.momentum, start.bias["eta"], start.bias.get("alpha"), self.scale, start.erase, *self.base)
        inputs = (distinct[i] for i in range(len(distinct)))
        carried = momentum or (None, None, None)
        y, *after, eta = MLPSegment.apply(self, valid, *anchor, *state, *carried, *fixed, *inputs)
        return y, piece["q"], tuple(after[:3]), tuple(after[3:]) if momentum else (), eta

    def by_autograd(self, valid: Tensor | None, *given: Any) -> tuple[Tensor | None, ...]:
        """The same by :func:`nestlearn.ops.step.step`: what a second derivative goes through."""
        anchor, state, momentum, inputs = given[:3], given[3:6], given[6:9], given[16:]
        b, bias_eta, bias_alpha, scale, erase, base1, base2 = given[9:16]
        start, rule = self.kernel.start, self.kernel.rule
        weights = start.weights if base1 is None else {**start.weights, MEMORY: (base1, base2)}
        bias = {"eta": bias_eta} | ({} if bias_alpha is None else {"alpha": bias_alpha})
        scales = dict(zip(self.kernel.names, scale.unbind(-1), strict=True))
        again = type(self.kernel)(Start(weights, bias, scales, b, erase), rule)
        piece = {name: inputs[i] for name, i in self.source.items()}
        y, _, after, carried, eta = step(again, anchor, state, () if b is None else momentum, piece, valid)
        return y, *after, *(carried or (None, None, None)), eta


class MLPSegment(torch.autograd.Function):
    """See the head of this file. Of each segment it keeps the two states and what is as large as its tokens."""

    @staticmethod
    def forward(ctx: Any, plan: MLPSegments, valid: Tensor | None, *given: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kernel, rule = plan.kernel, plan.kernel.rule
        batch, heads = given[0].shape[:2]
        b, bias_eta, bias_alpha, scale, erase, base1, base2 = given[9:16]
        a2, a1, ag, s2, s1, p2, p1 = _flat(given)
        x = [t.flatten(0, 1) for t in given[16:]]
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
        rows = silu_adjoint(back, z[:, :c])
        memory, at = (n - 1) * width, a2 if rule.read == "anchor" else None
        scores = next_p2 = momentum = None
        if b is None:
            zq, next2, written, scores = writes_adjoint.advance(Given(k, q, s2), rows, tables, rule.delta, at, memory)
        else:
            momentum = Momentum.of(b, tables.ratio, counts)
            zq, next2, next_p2, written = momentum_adjoint.advance(
                Given(k, q, s2, p2), rows, tables, momentum, erasing_steps(gates, share, rule), at, memory
            )
        if base2 is not None:
            zq.baddbmm_(q, each(base2, batch).mT)
        hq = F.silu(zq)
        read = None if rule.read == "anchor" else hq
        y, next1, next_p1, scores1 = layers_adjoint.advance(h[:, :c], read, r, s1, p1, tables, momentum)
        y = torch.baddbmm(q, hq, w1[-1].mT) if y is None else y.add_(q)
        if base1 is not None:
            y.baddbmm_(hq, each(base1, batch).mT)

        ctx.plan, ctx.valid, ctx.given = plan, valid, len(given)
        ctx.save_for_backward(
            *given,
            *gates,
            *tables,
            *(k, q, v, k_factor, q_factor, v_factor, both, z, h, gate_out, wide_out, steps),
            *(gate_written, wide_written, gate_factor, wide_factor, back, written, zq, hq, scores, scores1),
            *(() if momentum is None else (rows, *momentum)),
            *generated,
        )
        told = gates.eta if plan.tells_steps else None
        made_here = (y, next2, *next1, next_p2, *(next_p1 or (None, None)), told)
        return tuple(None if t is None else t.unflatten(0, (batch, heads)) for t in made_here)

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
        b, _, _, scale, erase, base1, base2 = given[9:16]
        a2, a1, ag, s2, s1, p2, p1 = _flat(given)
        x = [t.flatten(0, 1) for t in given[16:]]
        *d_main, d_told = d_outputs
        d_y, d_next2, *d_states = (t.flatten(0, 1) for t in d_main if t is not None)
        d_next1, d_next_p2, d_carried = Layers(*d_states[:2]), None, None
        if b is not None:
            d_next_p2, d_carried = d_states[2], Layers(*d_states[3:])
        gates, tables = Gates(*saved[:4]), Tables(*saved[4:10])
        k, q, v, k_factor, q_factor, v_factor, both, z, h, gate_out, wide_out, steps = saved[10:22]
        gate_written, wide_written, gate_factor, wide_factor, back, written, zq, hq, scores, scores1 = saved[22:32]
        rows, momentum, generated = None, None, saved[32:]
        if b is not None:
            rows, momentum, generated = saved[32], Momentum(*saved[33:38]), saved[38:]
        names, g, n, width, c = kernel.names, kernel.g, kernel.n, kernel.hidden, k.shape[1]
        w1 = [*ag.unbind(1), *a1.unbind(1)]
        r = [*gate_written.unbind(1), *wide_written.unbind(1)]
        part = lambda t, m: t[..., m * width : (m + 1) * width]  # noqa: E731
        memory = (n - 1) * width
        share = None if erase is None else each(erase, batch).unsqueeze(-1)
        counts = None if valid is None else per_sequence(valid, batch, heads)
        zk, hk = z[:, :c], h[:, :c]

        # The last layers, and what is read through them.
        read = None if rule.read == "anchor" else hq
        layers = layers_adjoint.advance_adjoint(
            hk, read, r, s1, p1, scores1, tables, momentum, b, counts, d_y, d_next1, d_carried
        )
        d_hk, d_r, d_hq = layers.h, layers.r, layers.hq
        d_base1 = d_base2 = None
        if d_hq is None:
            d_hq = torch.bmm(d_y, w1[-1])
        elif base1 is not None:
            d_hq.baddbmm_(d_y, each(base1, batch))
            d_base1 = torch.bmm(d_y.mT, hq)
        d_zq = silu_adjoint(d_hq, zq)

        # The writes to W2.
        at = a2 if rule.read == "anchor" else None
        if momentum is None:
            through = writes_adjoint.advance_adjoint(
                Given(k, q, s2), written, scores, tables, rule.delta, at, memory, d_zq, d_next2
            )
        else:
            assert rows is not None
            assert d_next_p2 is not None
            given2, erasing = Given(k, q, s2, p2), erasing_steps(gates, share, rule)
            through = momentum_adjoint.advance_adjoint(
                given2, rows, written, tables, momentum, erasing, b, counts, at, memory, d_zq, d_next2, d_next_p2
            )
        (_, d_q, d_s2, d_p2), d_rows = through.given, through.h
        d_q = d_q + d_y
        if base2 is not None:
            d_q.baddbmm_(d_zq, each(base2, batch))
            d_base2 = torch.bmm(d_zq.mT, q)
        through = through.plus(layers.log_gamma, layers.log_last, layers.log_ratio, layers.b)
        d_k, d_eta, d_log_alpha, d_share = through.through_tables(k, gates, share, tables)
        d_back = silu_adjoint(d_rows, zk)
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
        d_z[:, :c].addcmul_(curved.mul_(back), d_rows)
        d_both = torch.baddbmm(d_wide_out.sum(1), d_z, a2)
        d_a2 = torch.bmm(d_z.mT, both)
        d_k += d_both[:, :c]
        d_v = d_both[:, c:]
        if rule.read == "anchor":
            d_a2[:, memory:] += torch.bmm(d_zq.mT, q)
            d_w1[-1].baddbmm_(d_y.mT, hq)
        d_eta = d_eta + (d_steps * each(scale, batch).unsqueeze(-1)).sum(1)
        if d_told is not None:
            d_eta += d_told.flatten(0, 1)
        d_scale = (d_steps * gates.eta.unsqueeze(1)).sum(-1)

        # Generation.
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
            *(None if t is None else split(t) for t in (d_s2, *layers.s, d_p2, *(layers.p or (None, None)))),
            through.b,
            over_batch(d_raw_eta.sum(-1)),
            over_batch(d_raw_alpha.sum(-1)) if rule.decay else None,
            over_batch(d_scale),
            None if d_share is None else over_batch(d_share.sum(-1)),
            None if d_base1 is None else over_batch(d_base1),
            None if d_base2 is None else over_batch(d_base2),
            *(None if t is None else split(t) for t in d_inputs.found),
        )


def _flat(given: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor, Tensor, Layers, Tensor | None, Layers | None]:
    """What a segment starts from, by head: W2 and W1 of the anchor, the states S2 and S1, and their momenta, if any."""
    a2, a1, ag, s2, wide, gates = (t.flatten(0, 1) for t in given[:6])
    if given[6] is None:
        return a2, a1, ag, s2, Layers(wide, gates), None, None
    p2, p_wide, p_gates = (t.flatten(0, 1) for t in given[6:9])
    return a2, a1, ag, s2, Layers(wide, gates), p2, Layers(p_wide, p_gates)


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

"""MLP memories ``M(x) = x + W1 silu(W2 x)`` in chunk-parallel form (Eq. 89-91, SPEC 12.1 reading A).

All W2 see the key, so they are row blocks of one matrix with one triangular solve; each W1 sees its own
hidden layer, decays, and needs no solve. Packed weights are

    W2    (B, H, n d_h, d)     blocks [eta, alpha, k, v, q, memory]
    wide  (B, H, m, d, d_h)    W1 of [k, v, q, memory]
    gates (B, H, g, 1, d_h)    W1 of [eta, alpha]
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from nestlearn.memory import objectives
from nestlearn.memory.structures import silu_derivative
from nestlearn.ops.rule import GATES, MEMORY, Start, WriteRule, clip, limit
from nestlearn.ops.segment import Segment

Packed = tuple[Tensor, ...]


@dataclass
class MLPKernel:
    """Five (or fewer) MLP memories of one head that share keys, step sizes and decays."""

    start: Start
    rule: WriteRule

    def __post_init__(self) -> None:
        self.names = self.start.names
        self.n = len(self.names)
        self.g = sum(name in GATES for name in self.names)
        self.hidden = self.start.weights[MEMORY][1].shape[-2]
        self.others = (self.n - 1) * self.hidden
        self.objective = objectives.get(self.rule.objective)
        template = self.start.weights[MEMORY][0]
        ones = template.new_ones(template.shape[0])
        scales = [self.start.write_scale.get(name, ones) for name in self.names]
        scale = torch.stack(scales, 1)[..., None, None]  # (H, n, 1, 1)
        self.gate_scale, self.wide_scale = scale.split([self.g, self.n - self.g], dim=1)

    def pack(self) -> Packed:
        """The learned initial weights, packed, without the batch dimension."""
        w1, w2 = zip(*(self.start.weights[name] for name in self.names), strict=True)
        wide = torch.stack(w1[self.g :], dim=1)
        gates = torch.stack(w1[: self.g], dim=1) if self.g else wide.new_zeros(wide.shape[0], 0, 1, self.hidden)
        return torch.cat(w2, dim=-2), wide, gates

    def carried(self, weights: Packed) -> Packed:
        """What the inner update itself carries before the first token: its momentum, shaped like ``weights``."""
        return () if self.start.momentum is None else tuple(torch.zeros_like(w) for w in weights)

    def named(self, packed: Packed) -> dict[str, Packed]:
        """Packed weights by the name of their memory, each ``(W1, W2)``."""
        w2 = packed[0].split(self.hidden, dim=-2)
        w1 = (*packed[2].unbind(-3), *packed[1].unbind(-3))
        return {name: (w1[i], w2[i]) for i, name in enumerate(self.names)}

    def merge(self, others: Packed, memory: Packed) -> Packed:
        """The projection memories of ``others`` with the main memory of ``memory``."""
        n = self.others
        return (
            torch.cat([others[0][..., :n, :], memory[0][..., n:, :]], dim=-2),
            torch.cat([others[1][..., :-1, :, :], memory[1][..., -1:, :, :]], dim=-3),
            others[2],
        )

    def limit(self, packed: Packed) -> Packed:
        """Each weight matrix within the norm limit."""
        if self.rule.norm_limit is None:
            return packed
        w2 = packed[0].unflatten(-2, (self.n, self.hidden))
        return (
            limit(w2, self.rule.norm_limit).flatten(-3, -2),
            limit(packed[1], self.rule.norm_limit),
            limit(packed[2], self.rule.norm_limit),
        )

    def hidden_of(self, w2: Tensor, x: Tensor) -> Tensor:
        """Pre-activations of every memory in ``w2`` (B, H, n d_h, d) for ``x`` (B, H, c, d): (B, H, n, c, d_h)."""
        return (x @ w2.mT).unflatten(-1, (-1, self.hidden)).transpose(-3, -2)

    def answers(self, anchor: Packed, hidden: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, Tensor]:
        """What every memory makes of ``x`` (B, H, c, d): gates (B, H, g, c, 1) and vectors (B, H, m, c, d)."""
        return hidden[0] @ anchor[2].mT, x.unsqueeze(2) + hidden[1] @ anchor[1].mT

    def generate(self, anchor: Packed, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What each projection memory makes of its input ``x[name]`` (B, H, c, d): raw gates (B, H, c), vectors
        (B, H, c, d). Memories that read the same input share one product."""
        made: dict[str, Tensor] = {}
        groups = [list(group) for _, group in groupby(self.names[:-1], key=lambda name: id(x[name]))]
        blocks = anchor[0].split([len(group) * self.hidden for group in groups] + [self.hidden], dim=-2)
        w1 = iter((*anchor[2].unbind(2), *anchor[1].unbind(2)))
        for group, block in zip(groups, blocks, strict=False):
            shared = x[group[0]]
            for name, hidden in zip(group, F.silu(self.hidden_of(block, shared)).unbind(2), strict=True):
                y = hidden @ next(w1).mT
                made[name] = y.squeeze(-1) if name in GATES else shared + y
        return made

    def advance(
        self,
        anchor: Packed,
        state: Packed,
        momentum: Packed,
        q: Float[Tensor, "B H c d"],
        v: Float[Tensor, "B H c d"],
        seg: Segment,
    ) -> tuple[Float[Tensor, "B H c d"], Packed, Packed]:
        """Write one segment: the outputs, the next state and momentum."""
        c, kinds = seg.k.shape[-2], [self.g, self.n - self.g]
        # Keys and values go through the same weights: one product for both.
        both = torch.cat([seg.k, v], dim=-2)
        z = self.hidden_of(anchor[0], both)
        hidden = F.silu(z).split(kinds, dim=2)
        (gate_answers, gate_targets), (wide_answers, wide_targets) = (
            y.split(c, dim=-2) for y in self.answers(anchor, hidden, both)
        )
        gate_targets = clip(gate_targets, self.rule)
        shared = v.unsqueeze(2).expand_as(wide_targets)
        wide_targets = clip(wide_targets, self.rule) if self.rule.self_values else shared
        eta = seg.eta[:, :, None, :, None]
        r_gates = -eta * self.gate_scale * self.objective.error(gate_answers, gate_targets)
        r_wide = -eta * self.wide_scale * self.objective.error(wide_answers, wide_targets)
        z_keys, _ = z.split(c, dim=-2)
        back = torch.cat([r_gates @ anchor[2], r_wide @ anchor[1]], dim=2) * silu_derivative(z_keys)
        r2 = back.transpose(-3, -2).flatten(-2)  # (B, H, c, n d_h)
        (h_gates, _), (h_wide, _) = (h.split(c, dim=-2) for h in hidden)

        p2, p_wide, p_gates = momentum if momentum else (None, None, None)
        up = seg.stacked()
        terms2 = seg.terms(r2, state[0], p2)
        s2, p2_next = seg.last(seg.k, r2, terms2, state[0], p2)
        wide_terms, gate_terms = up.terms(r_wide, state[1], p_wide), up.terms(r_gates, state[2], p_gates)
        s_wide, p_wide_next = up.last(h_wide, r_wide, wide_terms, state[1], p_wide)
        s_gates, p_gates_next = up.last(h_gates, r_gates, gate_terms, state[2], p_gates)

        n = self.others
        if self.rule.read == "anchor":
            y = q + F.silu(q @ anchor[0][..., n:, :].mT) @ anchor[1][:, :, -1].mT
        else:
            p_read = None if p2 is None else p2[..., n:, :]
            mine = [(table, rows[..., n:]) for table, rows in terms2]
            zq = seg.read(q, seg.k, mine, state[0][..., n:, :], p_read)
            base1, base2 = self.start.weights[MEMORY]
            from_start = self.rule.retention == "start"  # what is carried is on top of the learned start
            hq = F.silu(zq + q @ base2.mT if from_start else zq)
            p_read = None if p_wide is None else p_wide[:, :, -1]
            mine = [(seg.write, rows[:, :, -1]) for _, rows in wide_terms]
            y = q + seg.read(hq, h_wide[:, :, -1], mine, state[1][:, :, -1], p_read)
            y = y + hq @ base1.mT if from_start else y
        next_momentum = (p2_next, p_wide_next, p_gates_next) if momentum else ()
        return y, (s2, s_wide, s_gates), next_momentum  # type: ignore[return-value]

    def rest(self, y: Float[Tensor, "B H T d"], q: Float[Tensor, "B H T d"]) -> Float[Tensor, "B H T d"]:
        """Outputs as they are: the learned start is within the hidden layer."""
        return y

"""Linear memories, all of them as rows of one matrix.

Memories that share keys, step sizes and decays differ only in what they write, so five linear memories of
one head are the row blocks of a single matrix (R, d), R = 3 d + 2: one product makes every self-generated value
and one triangular solve writes them all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from nestlearn.memory import objectives
from nestlearn.ops.rule import GATES, MEMORY, REACH, Start, WriteRule, clip, may_look
from nestlearn.ops.segment import Segment

Packed = tuple[Tensor, ...]


@dataclass
class LinearKernel:
    """Row blocks [eta, alpha, k, v, q, memory] (those that exist) of one matrix per head."""

    start: Start
    rule: WriteRule

    def __post_init__(self) -> None:
        self.names = self.start.names
        self.rows = [self.start.weights[name][0].shape[-2] for name in self.names]
        self.width = self.rows[-1]
        self.others = sum(self.rows[:-1])
        self.objective = objectives.get(self.rule.objective)
        scales = self.start.write_scale
        template = self.start.weights[MEMORY][0]
        ones = template.new_ones(template.shape[0])
        blocks = [scales.get(n, ones)[:, None].expand(-1, r) for n, r in zip(self.names, self.rows, strict=True)]
        self.scale = torch.cat(blocks, -1).unsqueeze(1)  # (H, 1, R)

    def pack(self) -> Packed:
        """The learned initial weights as packed rows, (H, R, d)."""
        return (torch.cat([self.start.weights[name][0] for name in self.names], dim=-2),)

    def carried(self, weights: Packed) -> Packed:
        """What the inner update itself carries before the first token of ``weights`` (B, H, R, d): its momentum."""
        return () if self.start.momentum is None else tuple(torch.zeros_like(w) for w in weights)

    def named(self, packed: Packed) -> dict[str, Packed]:
        """Packed weights by the name of their memory."""
        blocks = packed[0].split(self.rows, dim=-2)
        return {name: (block,) for name, block in zip(self.names, blocks, strict=True)}

    def merge(self, others: Packed, memory: Packed) -> Packed:
        """The projection memories of ``others`` with the main memory of ``memory``."""
        n = self.others
        return (torch.cat([others[0][..., :n, :], memory[0][..., n:, :]], dim=-2),)

    def limit(self, packed: Packed) -> Packed:
        """Each memory's matrix within the norm limit."""
        bound: float | Tensor | None = self.rule.norm_limit
        if bound is None:
            return packed
        if self.start.accumulates is not None:
            bound = bound * (1 + (REACH - 1) * self.start.accumulates.to(packed[0].dtype))
        if isinstance(bound, Tensor):
            bound = bound[:, None]
        sizes = self.blocks.sum(-1).clamp(max=packed[0].shape[-1])
        most = bound**2 * sizes  # of the summed squares of a block
        squares = torch.linalg.vector_norm(packed[0].detach(), dim=-1).square() @ self.blocks.mT
        if may_look(packed[0]) and not bool((squares > most).any()):
            return packed
        squares = packed[0].square().sum(-1) @ self.blocks.mT
        factors = (most / squares.maximum(most)).sqrt()  # (B, H, n)
        return (packed[0] * (factors @ self.blocks).unsqueeze(-1),)

    @cached_property
    def blocks(self) -> Float[Tensor, "n R"]:
        """Which row is whose: a product with it spreads a number over a block, one with its transpose sums."""
        rows = torch.tensor(self.rows, device=self.scale.device)
        return torch.eye(len(rows), dtype=self.scale.dtype, device=self.scale.device).repeat_interleave(rows, -1)

    def generate(self, anchor: Packed, x: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What each projection memory makes of its input ``x[name]`` (B, H, c, d): raw gates (B, H, c), vectors
        (B, H, c, d)."""
        made: dict[str, Tensor] = {}
        blocks = anchor[0].split(self.rows, dim=-2)
        for name, block in zip(self.names[:-1], blocks, strict=False):
            y = x[name] @ block.mT
            made[name] = y.squeeze(-1) if name in GATES else y
        return made

    def targets(self, anchor: Packed, v: Float[Tensor, "B H c d"]) -> Float[Tensor, "B H c R"]:
        """The value that each row is asked to give for the current key."""
        own = self.rule.self_values and self.rule.update == "dgd"
        generated = len(self.names) if own else sum(n in GATES for n in self.names)
        rows = self.rows[:generated]
        made = (v @ anchor[0][..., : sum(rows), :].mT).split(rows, dim=-1) if rows else ()
        shared = [v] * (len(self.names) - generated)
        parts = [*(clip(part, self.rule) for part in made), *shared]
        if self.start.accumulates is not None:
            parts[-1] = torch.where(self.start.accumulates[:, None, None], v, parts[-1])
        return torch.cat(parts, dim=-1)

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
        target = self.targets(anchor, v)
        # A dot product's error does not look at what the memory answers.
        answer = target if self.rule.objective == "dot" else seg.k @ anchor[0].mT
        h = -seg.eta.unsqueeze(-1) * (self.scale * self.objective.error(answer, target))
        s0, p0 = state[0], momentum[0] if momentum else None
        terms = seg.terms(h, s0, p0)
        s, p = seg.last(seg.k, h, terms, s0, p0)
        n = self.others
        if self.rule.read == "anchor":
            y = q @ anchor[0][..., n:, :].mT
        else:
            p_read = None if p0 is None else p0[..., n:, :]
            mine = [(table, rows[..., n:]) for table, rows in terms]
            y = seg.read(q, seg.k, mine, s0[..., n:, :], p_read)
        return y, (s,), () if p is None else (p,)

    def rest(self, y: Float[Tensor, "B H T d"], q: Float[Tensor, "B H T d"]) -> Float[Tensor, "B H T d"]:
        """Outputs with what the learned start answers, where the state is carried on top of it."""
        if self.rule.read == "anchor" or self.rule.retention == "zero":
            return y
        return y + q @ self.start.weights[MEMORY][0].mT

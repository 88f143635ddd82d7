"""The Omega rule (Eq. 68) in chunk-parallel form: every step descends on a window of the last c pairs.

    S_t = alpha_t S_{t-1} - eta_t sum_{t-c<i<=t} 1/c grad_i

All gradients of a segment, those of pairs from before it included, are taken at its anchor, so pair i is written with
the coefficient ``sum_{s>=i, s<i+c} Gamma_ts eta_s / c``: the decay table times a band. Across segments and pieces the
last c - 1 pairs are carried, keys and values, as zeros before the first token (a zero key writes nothing).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from nestlearn.ops.linear import LinearKernel, Packed
from nestlearn.ops.segment import Segment


@dataclass
class OmegaKernel(LinearKernel):
    """One linear memory by the Omega rule, with the objective of the rule."""

    def carried(self, weights: Packed) -> Packed:
        """The pairs before the first token: keys (B, H, window - 1, d_in) and values (B, H, window - 1, d_out)."""
        *batch, d_out, d_in = weights[0].shape
        past = self.rule.window - 1
        return weights[0].new_zeros(*batch, past, d_in), weights[0].new_zeros(*batch, past, d_out)

    def advance(
        self,
        anchor: Packed,
        state: Packed,
        momentum: Packed,
        q: Float[Tensor, "B H c d"],
        v: Float[Tensor, "B H c d"],
        seg: Segment,
    ) -> tuple[Float[Tensor, "B H c d"], Packed, Packed]:
        """Write one segment: the outputs, the next state and the pairs that the next segment still needs."""
        window, c = self.rule.window, seg.k.shape[-2]
        keys, values = (torch.cat(pair, dim=-2) for pair in zip(momentum, (seg.k, v), strict=True))
        error = self.objective.error(keys @ anchor[0].mT, values)
        # Token s of the segment steps on columns s .. s + window - 1 of [carried pairs, its own pairs].
        band = keys.new_full((c, window - 1 + c), 1 / window).triu().tril(window - 1)
        table = (seg.ratio * seg.eta.unsqueeze(-2)) @ band
        written = error.mT @ (table[..., -1, :, None] * keys)
        s = seg.gamma[..., -1, None, None] * state[0] - written
        if self.rule.read == "anchor":
            y = q @ anchor[0].mT
        else:
            y = seg.gamma.unsqueeze(-1) * (q @ state[0].mT) - ((q @ keys.mT) * table) @ error
        return y, (s,), (self._last(keys, seg.valid), self._last(values, seg.valid))

    def _last(self, pairs: Tensor, valid: Tensor | None) -> Tensor:
        """The last window - 1 of ``pairs`` (B, H, window - 1 + c, d) that count; the others stand at the end."""
        past = self.rule.window - 1
        if valid is None:
            return pairs[..., pairs.shape[-2] - past :, :]
        first = valid.sum(-1).long()  # (B, 1)
        rows = (first + torch.arange(past, device=pairs.device))[:, None, :, None]
        return pairs.gather(-2, rows.expand(*pairs.shape[:2], past, pairs.shape[-1]))

"""Oja's rule (Eq. 66, 67) in chunk-parallel form.

``M_t = alpha_t M_{t-1} + eta_t v_t (k_t - M_{t-1}^T v_t)^T`` transposed is the delta form

    N_t = N_{t-1} (alpha_t I - eta_t v_t v_t^T) + eta_t k_t v_t^T,    N = M^T,

with the value as the key and the key as the value: the same triangular solve, and a transposed read. Packed weights
are N, (B, H, d_k, d_v).
"""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from nestlearn.ops.linear import LinearKernel, Packed
from nestlearn.ops.rule import MEMORY
from nestlearn.ops.segment import Segment


@dataclass
class OjaKernel(LinearKernel):
    """One linear memory by Oja's rule. ``seg.k`` holds the values (B, H, c, d_v), what is written are the keys."""

    def pack(self) -> Packed:
        """The learned initial weights, transposed, (H, d_k, d_v)."""
        return (self.start.weights[MEMORY][0].mT,)

    def named(self, packed: Packed) -> dict[str, Packed]:
        """The memory's own matrix M."""
        return {MEMORY: (packed[0].mT,)}

    def advance(
        self,
        anchor: Packed,
        state: Packed,
        momentum: Packed,
        q: Float[Tensor, "B H c d"],
        v: Float[Tensor, "B H c d"],
        seg: Segment,
    ) -> tuple[Float[Tensor, "B H c d"], Packed, Packed]:
        """Write one segment of keys ``v``: the outputs and the next state."""
        n0 = state[0]
        ((table, rows),) = seg.terms(seg.eta.unsqueeze(-1) * v, n0, None)
        n, _ = seg.last(seg.k, rows, [(table, rows)], n0, None)
        if self.rule.read == "anchor":
            return q @ anchor[0], (n,), momentum
        # M_t q = N_t^T q: what were keys and rows of the rank-one terms change places.
        return seg.read(q, rows, [(table, seg.k)], n0.mT, None), (n,), momentum

"""One segment by autograd: every kernel, every switch. What the hand-written backward passes fall back on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from nestlearn.ops.rule import gates, unit
from nestlearn.ops.segment import Segment

if TYPE_CHECKING:
    from nestlearn.ops.linear import LinearKernel, Packed
    from nestlearn.ops.mlp import MLPKernel


def step(
    kernel: LinearKernel | MLPKernel,
    anchor: Packed,
    state: Packed,
    momentum: Packed,
    piece: Mapping[str, Tensor],
    valid: Float[Tensor, "B 1 c"] | None,
) -> tuple[Tensor, Tensor, Packed, Packed, Tensor]:
    """Generate, write and read one segment.

    Args:
        kernel: the packed form of the memories.
        anchor, state, momentum: packed weights that generate, what is written to, and what the update carries.
        piece: the segment's inputs by name; q and k that no memory makes are of unit length.
        valid: which tokens count, or None if all do.

    Returns:
        What is read (B, H, c, d), the queries it was read with, the next state and momentum, and the step sizes
        (B, H, c), zero where a token does not count.
    """
    start, rule = kernel.start, kernel.rule
    made = {**piece, **kernel.generate(anchor, piece)}
    eta, log_alpha = gates(made["eta"], made.get("alpha"), start, rule)
    v = unit(made["v"]) if rule.normalize_v else made["v"]
    q, k = (unit(made[name]) if name in start.weights else made[name] for name in ("q", "k"))
    queries = q
    if rule.update == "delta":  # alpha W - eta (alpha W k - v) k^T erases in units of alpha and writes in full
        eta, v = eta * log_alpha.exp(), v * (-log_alpha).exp().unsqueeze(-1)
    if rule.update == "oja":  # the delta rule of W^T, with keys v and values k
        k, v = v, k
    segment = Segment.of(k, eta, log_alpha, start.momentum, valid, rule.erases, start.erase)
    y, state, momentum = kernel.advance(anchor, state, momentum, q, v, segment)
    return y, queries, state, momentum, segment.eta

"""Useful operations of a self-modifying block, counted by hand: what the mathematics asks for, whatever is run.

A product of (m, n) by (n, p) is 2 m n p operations; of a table that is lower triangular, half. Elementwise work, the
convolution and what a backward pass computes once more are not counted. Training is three times the forward pass.

Letters: d channels of the block, H heads, w = d / H channels of a head, h hidden channels of an MLP memory, C tokens of
a chunk, R = 3 w + 2 rows of the five linear memories (Eq. 92, 93).
"""

from __future__ import annotations

TRAINING = 3


def per_token(memory: str, dim: int, heads: int, chunk: int, projections: int = 5) -> int:
    """Operations of one token, forward: the static projections and the core.

    Args:
        memory: "linear", or "mlp" with a hidden width of w.
        dim, heads, chunk: of the block.
        projections: static (dim, dim) matrices: k, q, v, the gate and the output.

    >>> per_token("mlp", 256, 1, 64, projections=1) == 72 * 256**2 + 7 * 64 * 256
    True
    """
    width = dim // heads
    core = {"linear": linear_core, "mlp": mlp_core}[memory](width, chunk)
    return projections * 2 * dim**2 + heads * core


def linear_core(w: int, chunk: int) -> int:
    """One head of five linear memories with the dot-product objective, DGD and an inclusive read, per token."""
    r = 3 * w + 2
    generate = 2 * w * (2 * w + 2)  # eta, alpha, k and v
    targets = 2 * w * r  # every memory on v
    erase = 2 * w * r  # every state on k
    write = 2 * w * r
    read = 2 * (2 * w * w)  # the state and the learned start on q
    tables = chunk * w + chunk * w + chunk * r + chunk * w  # k k^T, q k^T, the triangular solve, the scores on its rows
    return generate + targets + erase + write + read + tables


def mlp_core(w: int, chunk: int) -> int:
    """One head of five MLP memories, hidden width w, per token: 70 w h + 2 C w + 5 C h, SPEC's count."""
    return 70 * w * w + 7 * chunk * w

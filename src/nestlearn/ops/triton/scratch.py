"""Tiles that a program keeps in global memory, and products of them by blocks.

All the tiles of a segment do not fit the chip at once. Each program has a stretch of global memory of its own, where it
leaves a tile, and a product loads its operands from there in blocks of BLOCK along the channels or tokens that it sums
over. A tile is dense float32, its sides powers of two; what is out of use is zero.

Barriers: another thread of the program may load what one has stored, so it must have been stored by then, and what was
there before must have been loaded. :func:`put` waits for both; stages that leave several tiles wait once for all.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fetch(at, M: tl.constexpr, N: tl.constexpr):
    """The tile (M, N) at a pointer."""
    return tl.load(at + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])


@triton.jit
def leave(at, tile, M: tl.constexpr, N: tl.constexpr):
    """Store a tile (M, N) at a pointer, where whoever calls sees to the barriers."""
    tl.store(at + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], tile)


@triton.jit
def put(at, tile, M: tl.constexpr, N: tl.constexpr):
    """The same, for all threads of the program."""
    tl.debug_barrier()  # what it takes the place of has been loaded
    leave(at, tile, M, N)
    tl.debug_barrier()  # it can be loaded


@triton.jit
def by_blocks(
    a,
    b,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    TURN_A: tl.constexpr,
    TURN_B: tl.constexpr,
    BLOCK: tl.constexpr,
    P: tl.constexpr,
):
    """``a b`` (M, N) of the tiles at two pointers: a (M, K), or (K, M) if TURN_A; b (K, N), or (N, K) if TURN_B."""
    size: tl.constexpr = min(BLOCK, K)
    i = tl.arange(0, M)[:, None]
    j = tl.arange(0, N)[None, :]
    k = tl.arange(0, size)
    total = tl.zeros([M, N], tl.float32)
    for first in range(0, K, size):
        if TURN_A:
            left = tl.load(a + first * M + k[None, :] * M + i)
        else:
            left = tl.load(a + first + i * K + k[None, :])
        if TURN_B:
            right = tl.load(b + first + k[:, None] + j * K)
        else:
            right = tl.load(b + first * N + k[:, None] * N + j)
        total = tl.dot(left, right, total, input_precision=P)
    return total

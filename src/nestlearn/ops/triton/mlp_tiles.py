"""What the forward and the backward kernel of the MLP memories share: where a memory is, what it makes and writes.

A state is one row of numbers: W2 (h, d) of eta, alpha, k, v and the main memory, then W1, (1, h) of eta and alpha and
(d, h) of the others. So a gate's memory is like the others, but that W1 has one row in use and the answer no skip.
Tiles as in ``ops.triton.tiles``, E the hidden width; names and formulas are those of ``ops.mlp_adjoint``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from nestlearn.ops.triton.tiles import load_block, load_tokens, product, shrink, store_block


class Head(NamedTuple):
    """The memories of a head in one segment: pointers to weights, and what holds for all of them."""

    base: Any
    anchor: Any
    state: Any
    moved: Any
    """Whether anchor and state, at a chunk boundary, are yet to be brought within the limit."""
    limit: Any
    """Of the squares of a row."""
    d: Any
    hidden: Any


@triton.jit
def place_of(m, d, hidden):
    """Of memory m: where its W2 and its W1 begin in a state, and the rows of W1."""
    gate = m < 2
    first = 5 * hidden * d
    return m * hidden * d, first + tl.where(gate, m * hidden, (2 + (m - 2) * d) * hidden), tl.where(gate, 1, d)


@triton.jit
def load_w2(at, of, m, D: tl.constexpr, E: tl.constexpr):
    """W2 (E, D) of memory m, of a state at a pointer."""
    at2, _, _ = place_of(m, of.d, of.hidden)
    return load_block(at + at2, of.hidden, of.d, E, D)


@triton.jit
def load_w1(at, of, m, D: tl.constexpr, E: tl.constexpr):
    """W1 (D, E)."""
    _, at1, rows = place_of(m, of.d, of.hidden)
    return load_block(at + at1, rows, of.hidden, D, E)


@triton.jit
def store_w2(at, of, m, w2, D: tl.constexpr, E: tl.constexpr):
    at2, _, _ = place_of(m, of.d, of.hidden)
    store_block(at + at2, w2, of.hidden, of.d, E, D)


@triton.jit
def store_w1(at, of, m, w1, D: tl.constexpr, E: tl.constexpr):
    _, at1, rows = place_of(m, of.d, of.hidden)
    store_block(at + at1, w1, rows, of.hidden, D, E)


@triton.jit
def most2(of):
    """The most that the squares of a W2 may sum to."""
    return of.limit * tl.minimum(of.hidden, of.d)


@triton.jit
def most1(of, m):
    """The same for the W1 of memory m."""
    return of.limit * tl.where(m < 2, 1, tl.minimum(of.hidden, of.d))


@triton.jit
def limited2(at, of, m, D: tl.constexpr, E: tl.constexpr):
    """W2 of memory m at a pointer, within the limit where the anchors have moved to it."""
    w2 = load_w2(at, of, m, D, E)
    return w2 * tl.where(of.moved, shrink(tl.sum(w2 * w2), most2(of)), 1.0)


@triton.jit
def limited1(at, of, m, D: tl.constexpr, E: tl.constexpr):
    """W1 of memory m at a pointer, within the limit where the anchors have moved to it."""
    w1 = load_w1(at, of, m, D, E)
    return w1 * tl.where(of.moved, shrink(tl.sum(w1 * w1), most1(of, m)), 1.0)


@triton.jit
def weights2(of, m, D: tl.constexpr, E: tl.constexpr):
    """The W2 with which memory m answers, of its learned start and its anchor."""
    return load_w2(of.base, of, m, D, E) + limited2(of.anchor, of, m, D, E)


@triton.jit
def weights1(of, m, D: tl.constexpr, E: tl.constexpr):
    """The W1 with which memory m answers."""
    return load_w1(of.base, of, m, D, E) + limited1(of.anchor, of, m, D, E)


@triton.jit
def silu(z):
    return z * tl.sigmoid(z)


@triton.jit
def silu_slope(z):
    """``silu'``."""
    opened = tl.sigmoid(z)
    return opened * (1 + z * (1 - opened))


@triton.jit
def silu_curve(z):
    """``silu''``."""
    opened = tl.sigmoid(z)
    return opened * (1 - opened) * (2 + z * (1 - 2 * opened))


@triton.jit
def answer(x, z, w1, gate, P: tl.constexpr):
    """``x + silu(z) W1^T`` (C, D) of pre-activations ``z = x W2^T`` (C, E); a gate's memory adds no x."""
    return product(silu(z), tl.trans(w1), P) + tl.where(gate, 0.0, x)


@triton.jit
def generate(of, x_ptr, m, t, valid, D: tl.constexpr, E: tl.constexpr, P: tl.constexpr):
    """What memory m makes of the tokens at a pointer, (C, D)."""
    x = load_tokens(x_ptr, t, valid, of.d, D)
    return answer(x, product(x, tl.trans(weights2(of, m, D, E)), P), weights1(of, m, D, E), m < 2, P)


@triton.jit
def shortened(values):
    """The factor (C,) that brings values (C, D) longer than 1 to length 1."""
    return tl.rsqrt(tl.maximum(tl.sum(values * values, 1), 1.0))


class Scratch(NamedTuple):
    """Pointers to tiles of a segment, all of C tokens, in global memory. Between the stage that stores one and those
    that load it a program waits for all of its threads."""

    k: Any
    v: Any
    inverted: Any
    zk: Any
    zv: Any
    a: Any
    u: Any
    r: Any
    back: Any
    written: Any
    d_written: Any
    d_r: Any
    d_hk: Any
    d_zq: Any


SLOTS = tl.constexpr(len(Scratch._fields))
"""Tiles in a scratch."""


@triton.jit
def scratch_at(at, SLOT: tl.constexpr):
    """The scratch at a pointer, with so many numbers for a tile."""
    return Scratch(
        at,
        at + SLOT,
        at + 2 * SLOT,
        at + 3 * SLOT,
        at + 4 * SLOT,
        at + 5 * SLOT,
        at + 6 * SLOT,
        at + 7 * SLOT,
        at + 8 * SLOT,
        at + 9 * SLOT,
        at + 10 * SLOT,
        at + 11 * SLOT,
        at + 12 * SLOT,
        at + 13 * SLOT,
    )


@triton.jit
def take(at, C: tl.constexpr, K: tl.constexpr):
    """A tile (C, K) of the scratch."""
    return load_block(at, C, K, C, K)


@triton.jit
def put(at, tile, C: tl.constexpr, K: tl.constexpr):
    store_block(at, tile, C, K, C, K)


@triton.jit
def write(of, at, m, step, fading, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, P: tl.constexpr):
    """What memory m answers, which values it makes of its own, what it writes; ``fading`` (C,) is that of the erasing
    keys."""
    k, v = take(at.k, C, D), take(at.v, C, D)
    w2 = weights2(of, m, D, E)
    zk, zv = product(k, tl.trans(w2), P), product(v, tl.trans(w2), P)
    put(at.zk, zk, C, E)
    put(at.zv, zv, C, E)
    w1 = weights1(of, m, D, E)
    answers, values = answer(k, zk, w1, m < 2, P), answer(v, zv, w1, m < 2, P)
    r = (values * shortened(values)[:, None] - answers) * step[:, None]
    put(at.a, answers, C, D)
    put(at.u, values, C, D)
    put(at.r, r, C, D)
    back = product(r, w1, P)
    put(at.back, back, C, E)
    erased = product(k * fading[:, None], tl.trans(limited2(of.state, of, m, D, E)), P)
    written = back * silu_slope(zk) - erased
    put(at.written, product(take(at.inverted, C, C), written, P), C, E)

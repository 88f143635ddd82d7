"""What the forward and the backward kernel of the MLP memories share: where a memory is, what it makes and writes.

A state is one row of numbers: W2 (h, d) of eta, alpha, k, v and the main memory, then W1, (1, h) of eta and alpha and
(d, h) of the others. So a gate's memory is like the others, but that W1 has one row in use and the answer no skip.
Tiles as in ``ops.triton.tiles``, E the hidden width; names and formulas are those of ``ops.mlp_adjoint``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from nestlearn.ops.triton.scratch import fetch, leave
from nestlearn.ops.triton.tiles import gates, load_block, load_tokens, product, shrink, store_block, tables, unit


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
def write(of, at, m, step, fading, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, P: tl.constexpr):
    """What memory m answers, which values it makes of its own, what it writes; ``fading`` (C,) is that of the erasing
    keys."""
    k, v = fetch(at.k, C, D), fetch(at.v, C, D)
    w2 = weights2(of, m, D, E)
    zk, zv = product(k, tl.trans(w2), P), product(v, tl.trans(w2), P)
    leave(at.zk, zk, C, E)
    leave(at.zv, zv, C, E)
    w1 = weights1(of, m, D, E)
    answers, values = answer(k, zk, w1, m < 2, P), answer(v, zv, w1, m < 2, P)
    r = (values * shortened(values)[:, None] - answers) * step[:, None]
    leave(at.a, answers, C, D)
    leave(at.u, values, C, D)
    leave(at.r, r, C, D)
    back = product(r, w1, P)
    leave(at.back, back, C, E)
    erased = product(k * fading[:, None], tl.trans(limited2(of.state, of, m, D, E)), P)
    written = back * silu_slope(zk) - erased
    leave(at.written, product(fetch(at.inverted, C, C), written, P), C, E)


@triton.jit
def begin(
    of,
    at,
    xs,
    bias_ptr,
    erase,
    t,
    valid,
    eta_max,
    stretch,
    C: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    P: tl.constexpr,
):
    """What the memories make of the tokens of a segment, and its tables.

    Keys, values and the inverse go to the scratch. Returns what ``gates`` gives; the factors that brought keys and
    values to length 1; of the tables gamma, last, strength, ratio and overlap; the retained fraction of the whole
    segment; and what the erasing keys are of the keys.
    """
    raw_eta = tl.sum(generate(of, xs[0], 0, t, valid, D, E, P), 1) + tl.load(bias_ptr)
    raw_alpha = tl.sum(generate(of, xs[1], 1, t, valid, D, E, P), 1) + tl.load(bias_ptr + 1)
    eta, log_alpha, slope, opening = gates(raw_eta, raw_alpha, valid, eta_max, stretch)
    k, k_factor = unit(generate(of, xs[2], 2, t, valid, D, E, P))
    v, v_factor = unit(generate(of, xs[3], 3, t, valid, D, E, P))
    gamma, last, strength, ratio, overlap, inverted = tables(k, eta, log_alpha, erase, C, P)
    leave(at.k, k, C, D)
    leave(at.v, v, C, D)
    leave(at.inverted, inverted, C, C)
    end = tl.exp(tl.sum(log_alpha, 0))
    return (
        (eta, log_alpha, slope, opening),
        (k_factor, v_factor),
        (gamma, last, strength, ratio, overlap),
        end,
        strength * gamma,
    )


@triton.jit
def first_layer_of_read(of, at, q, gamma, ratio, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, P: tl.constexpr):
    """What the first layer of the main memory makes of q (C, D) after each token's write, (C, E)."""
    scores = product(q, tl.trans(fetch(at.k, C, D)), P) * ratio
    zq = product(q, tl.trans(limited2(of.state, of, 4, D, E)), P) * gamma[:, None]
    return zq + product(scores, fetch(at.written, C, E), P) + product(q, tl.trans(load_w2(of.base, of, 4, D, E)), P)

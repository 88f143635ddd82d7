"""The backward pass of one MLP memory along one segment, in stages that hand their tiles on in a scratch.

What a stage multiplies is alive in no other: together it is more than the shared memory of a GPU holds. The derivative
by the state stays in ``d_of.current``, that by the anchor goes to ``d_of.anchor``. Names and formulas are those of
``ops.mlp_adjoint``; ``d_x`` is the derivative of the loss by x.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from nestlearn.ops.triton.mlp_tiles import (
    first_layer_of_read,
    limited1,
    limited2,
    load_w1,
    load_w2,
    place_of,
    shortened,
    silu,
    silu_curve,
    silu_slope,
    store_w1,
    store_w2,
    weights1,
    weights2,
)
from nestlearn.ops.triton.scratch import fetch, leave
from nestlearn.ops.triton.tiles import load_block, load_tokens, product, store_block, store_tokens


class Derivatives(NamedTuple):
    """Pointers to the derivatives by the memories of a head: their start, their state, their anchor."""

    base: Any
    current: Any
    anchor: Any


@triton.jit
def add_block(at, more, rows, columns, R: tl.constexpr, K: tl.constexpr):
    """Add to a matrix at a pointer. What a program adds up in memory, another of its threads may have written."""
    tl.debug_barrier()
    block = load_block(at, rows, columns, R, K)
    tl.debug_barrier()
    store_block(at, block + more, rows, columns, R, K)


@triton.jit
def add_w2(at, of, m, more, D: tl.constexpr, E: tl.constexpr):
    """Add to W2 of memory m."""
    at2, _, _ = place_of(m, of.d, of.hidden)
    add_block(at + at2, more, of.hidden, of.d, E, D)


@triton.jit
def add_w1(at, of, m, more, D: tl.constexpr, E: tl.constexpr):
    """Add to W1 of memory m."""
    _, at1, rows = place_of(m, of.d, of.hidden)
    add_block(at + at1, more, rows, of.hidden, D, E)


@triton.jit
def end_adjoint(of, d_of, at, m, last, end, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, P: tl.constexpr):
    """From the next state of memory m to this one, what was written, the hidden layer of k and r.

    Returns derivatives by k (C, D), by the logarithms of ``last`` (C,) and of ``end``.
    """
    d_next2, d_next1 = load_w2(d_of.current, of, m, D, E), load_w1(d_of.current, of, m, D, E)
    k, hk = fetch(at.k, C, D), silu(fetch(at.zk, C, E))
    leave(at.d_written, product(k * last[:, None], tl.trans(d_next2), P), C, E)
    leave(at.d_r, product(hk * last[:, None], tl.trans(d_next1), P), C, D)
    tl.debug_barrier()
    d_k = product(fetch(at.written, C, E), d_next2, P) * last[:, None]
    d_hk = product(fetch(at.r, C, D), d_next1, P) * last[:, None]
    leave(at.d_hk, d_hk, C, E)
    d_log_end = tl.sum(d_next2 * limited2(of.state, of, m, D, E)) + tl.sum(d_next1 * limited1(of.state, of, m, D, E))
    store_w2(d_of.current, of, m, d_next2 * end, D, E)
    store_w1(d_of.current, of, m, d_next1 * end, D, E)
    return d_k, tl.sum(d_k * k, 1) + tl.sum(d_hk * hk, 1), d_log_end * end


@triton.jit
def last_layer_adjoint(
    of, d_of, at, q, d_y, gamma, ratio, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, P: tl.constexpr
):
    """Read the main memory again, and from its outputs' d_y (C, D) to the hidden layer of q.

    Returns derivatives by the logarithms of ``gamma`` (C,) and of ``ratio`` (C, C).
    """
    zq = first_layer_of_read(of, at, q, gamma, ratio, C, D, E, P)
    tl.debug_barrier()
    hq, hk = silu(zq), silu(fetch(at.zk, C, E))
    scores = product(hq, tl.trans(hk), P) * ratio
    d_hq = product(d_y, limited1(of.state, of, 4, D, E), P) * gamma[:, None]
    d_log_gamma = tl.sum(d_hq * hq, 1)
    d_scores = product(d_y, tl.trans(fetch(at.r, C, D)), P)
    d_log_ratio = d_scores * scores
    d_scores *= ratio
    d_hq += product(d_scores, hk, P) + product(d_y, load_w1(of.base, of, 4, D, E), P)
    leave(at.d_zq, d_hq * silu_slope(zq), C, E)
    add_block(at.d_hk, product(tl.trans(d_scores), hq, P), C, E, C, E)
    add_block(at.d_r, product(tl.trans(scores), d_y, P), C, D, C, D)
    add_w1(d_of.base, of, 4, product(tl.trans(d_y), hq, P), D, E)
    add_w1(d_of.current, of, 4, product(tl.trans(d_y), hq * gamma[:, None], P), D, E)
    return d_log_gamma, d_log_ratio


@triton.jit
def first_layer_adjoint(
    of, d_of, at, q, d_y, gamma, ratio, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, P: tl.constexpr
):
    """From the hidden layer of q to q.

    Returns derivatives by q and k (C, D), by the logarithms of ``gamma`` (C,) and of ``ratio`` (C, C).
    """
    d_zq, k = fetch(at.d_zq, C, E), fetch(at.k, C, D)
    d_q = product(d_zq, limited2(of.state, of, 4, D, E), P) * gamma[:, None]
    d_log_gamma = tl.sum(d_q * q, 1)
    scores = product(q, tl.trans(k), P) * ratio
    d_scores = product(d_zq, tl.trans(fetch(at.written, C, E)), P)
    d_log_ratio = d_scores * scores
    d_scores *= ratio
    d_q += d_y + product(d_scores, k, P) + product(d_zq, load_w2(of.base, of, 4, D, E), P)
    d_k = product(tl.trans(d_scores), q, P)
    add_block(at.d_written, product(tl.trans(scores), d_zq, P), C, E, C, E)
    add_w2(d_of.base, of, 4, product(tl.trans(d_zq), q, P), D, E)
    add_w2(d_of.current, of, 4, product(tl.trans(d_zq), q * gamma[:, None], P), D, E)
    return d_q, d_k, d_log_gamma, d_log_ratio


@triton.jit
def write_adjoint(of, d_of, at, m, fading, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, P: tl.constexpr):
    """From what was written to W2 of memory m to its state and r.

    Returns derivatives by T (C, C) as far as below the diagonal, and by the erasing keys (C, D).
    """
    d_written = product(tl.trans(fetch(at.inverted, C, C)), fetch(at.d_written, C, E), P)
    tl.debug_barrier()
    leave(at.d_written, d_written, C, E)
    d_t = -product(d_written, tl.trans(fetch(at.written, C, E)), P)
    d_erasing = -product(d_written, limited2(of.state, of, m, D, E), P)
    erasing = fetch(at.k, C, D) * fading[:, None]
    add_w2(d_of.current, of, m, -product(tl.trans(d_written), erasing, P), D, E)
    d_back = d_written * silu_slope(fetch(at.zk, C, E))
    add_block(at.d_r, product(d_back, tl.trans(weights1(of, m, D, E)), P), C, D, C, D)
    return d_t, d_erasing


@triton.jit
def answer_adjoint(of, d_of, at, m, step, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, P: tl.constexpr):
    """From r and the hidden layer of memory m to its weights.

    Returns derivatives by k and v (C, D), and by step sizes (C,) in units of the scale.
    """
    w2, w1 = weights2(of, m, D, E), weights1(of, m, D, E)
    answers, values, d_r = fetch(at.a, C, D), fetch(at.u, C, D), fetch(at.d_r, C, D)
    factor = shortened(values)
    along = tl.sum(values * d_r, 1)
    d_step = along * factor - tl.sum(answers * d_r, 1)
    # With t = factor U, d_U = factor (d_t - [clipped] t (t . d_t)).
    turned = tl.where(factor < 1, step * along * factor * factor * factor, 0.0)
    d_values = d_r * (step * factor)[:, None] - values * turned[:, None]
    d_answers = -d_r * step[:, None]
    zk, zv, d_written = fetch(at.zk, C, E), fetch(at.zv, C, E), fetch(at.d_written, C, E)
    d_w1 = product(tl.trans(fetch(at.r, C, D)), d_written * silu_slope(zk), P)
    d_w1 += product(tl.trans(d_answers), silu(zk), P) + product(tl.trans(d_values), silu(zv), P)
    store_w1(d_of.anchor, of, m, d_w1, D, E)
    d_hk = fetch(at.d_hk, C, E) + product(d_answers, w1, P)
    d_zk = d_hk * silu_slope(zk) + silu_curve(zk) * fetch(at.back, C, E) * d_written
    d_zv = product(d_values, w1, P) * silu_slope(zv)
    d_k = tl.where(m < 2, 0.0, d_answers) + product(d_zk, w2, P)
    d_v = tl.where(m < 2, 0.0, d_values) + product(d_zv, w2, P)
    d_w2 = product(tl.trans(d_zk), fetch(at.k, C, D), P) + product(tl.trans(d_zv), fetch(at.v, C, D), P)
    store_w2(d_of.anchor, of, m, d_w2, D, E)
    return d_k, d_v, d_step


@triton.jit
def generate_adjoint(of, d_of, x_ptr, d_x_ptr, d_y, m, t, valid, D: tl.constexpr, E: tl.constexpr, P: tl.constexpr):
    """From the derivative d_y (C, D) of what memory m makes of the tokens at a pointer to theirs and its weights'."""
    w2, w1 = weights2(of, m, D, E), weights1(of, m, D, E)
    x = load_tokens(x_ptr, t, valid, of.d, D)
    z = product(x, tl.trans(w2), P)
    d_z = product(d_y, w1, P) * silu_slope(z)
    store_tokens(d_x_ptr, product(d_z, w2, P) + tl.where(m < 2, 0.0, d_y), t, valid, of.d, D)
    add_w2(d_of.anchor, of, m, product(tl.trans(d_z), x, P), D, E)
    add_w1(d_of.anchor, of, m, product(tl.trans(d_y), silu(z), P), D, E)

"""Kernel: five linear memories along a sequence (Eq. 88, 92), forward. One program is one head of one sequence.

The states of the five memories stay on the chip from the first token to the last. A segment's tokens end at a chunk
boundary of the program's own clock, so sequences of a batch may stand anywhere in their chunks and have any length.
Names and formulas are those of ``ops.linear_adjoint``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nestlearn.ops.triton.tiles import (
    along,
    gates,
    limited,
    load_memories,
    load_row,
    load_rows,
    load_tokens,
    product,
    store_memories,
    store_tokens,
    tables,
    unit,
)


@triton.jit
def written(v, w, s, step, given, erasing, inverted, P: tl.constexpr):
    """``Z`` (C, D) of a memory with anchor w and state s, (D, D) each; ``given``: v in place of its own value."""
    u = product(v, tl.trans(w), P)
    factor = tl.rsqrt(tl.maximum(tl.sum(u * u, 1), 1.0))
    z = tl.where(given, v, u * factor[:, None]) * step[:, None] - product(erasing, tl.trans(s), P)
    return product(inverted, z, P)


@triton.jit
def written_gate(v, w, s, step, erasing, inverted):
    """The same for a gate's memory, w and s (D,): Z (C,)."""
    u = along(v, w)
    return along(inverted, u * tl.rsqrt(tl.maximum(u * u, 1.0)) * step - along(erasing, s))


@triton.jit(do_not_specialize=["tokens", "most_segments"])
def linear_forward(
    x_eta_ptr,
    x_alpha_ptr,
    x_k_ptr,
    x_v_ptr,
    q_ptr,
    base_ptr,
    bias_ptr,
    scale_ptr,
    erase_ptr,
    accumulates_ptr,
    clock_ptr,
    lengths_ptr,
    current_ptr,
    anchor_ptr,
    y_ptr,
    kept_ptr,
    new_current_ptr,
    new_anchor_ptr,
    heads,
    tokens,
    most_segments,
    d,
    chunk,
    eta_max,
    stretch,
    norm_limit,
    reach,
    C: tl.constexpr,
    D: tl.constexpr,
    LEVELS: tl.constexpr,
    KEEP: tl.constexpr,
    P: tl.constexpr,
):
    """Shapes: inputs, q and y (B, H, T, d); base (H, R, d); states (B, H, R, d), R = 2 + 3 d, rows eta, alpha, k, v,
    memory; bias (H, 2); scale (H, 5); erase, accumulates (H,); clock, lengths (B,); kept (B, H, segments, R, d), the
    state at the start of every segment, written if KEEP."""
    n = tl.program_id(0).to(tl.int64)
    b, h = n // heads, n % heads
    size = (2 + 3 * d) * d
    at_k, at_v, at_m = 2 * d, (2 + d) * d, (2 + 2 * d) * d
    sequence = n * tokens * d
    base_ptr += h * size
    current_ptr += n * size
    anchor_ptr += n * size
    new_anchor_ptr += n * size
    new_current_ptr += n * size
    kept_ptr += n * most_segments * size

    scale_ptr += h * 5
    given = tl.load(accumulates_ptr + h) != 0
    limit = norm_limit * tl.where(given, reach, 1.0)
    limit = limit * limit  # of the squares of a row; a square block has d times as much
    erase = tl.load(erase_ptr + h)
    early = (tl.load(clock_ptr + b) % chunk).to(tl.int32)  # tokens of the first chunk that an earlier piece has seen
    count = tl.load(lengths_ptr + b).to(tl.int32)
    segments = tl.where(count > 0, (early + count + chunk - 1) // chunk, 0)

    s_eta, s_alpha, s_k, s_v, s_m = load_memories(current_ptr, d, D)
    place = tl.arange(0, C)
    no = n < 0  # no memory but the main one is written with v itself
    if segments == 0:
        c_eta, c_alpha, c_k, c_v, c_m = load_memories(anchor_ptr, d, D)
        store_memories(new_anchor_ptr, c_eta, c_alpha, c_k, c_v, c_m, d, D)

    for g in range(segments):
        if KEEP:
            kept = kept_ptr + tl.cast(g, tl.int64) * size
            store_memories(kept, s_eta, s_alpha, s_k, s_v, s_m, d, D)
        if (g > 0) | (early == 0):  # a chunk boundary: the anchors move
            s_eta, s_alpha, s_k, s_v, s_m = limited(s_eta, s_alpha, s_k, s_v, s_m, limit, d)
            a_eta, a_alpha, a_k, a_v, a_m = s_eta, s_alpha, s_k, s_v, s_m
        else:
            a_eta, a_alpha, a_k, a_v, a_m = load_memories(anchor_ptr, d, D)
        if g == segments - 1:
            store_memories(new_anchor_ptr, a_eta, a_alpha, a_k, a_v, a_m, d, D)
        w_eta = load_row(base_ptr, d, D) + a_eta
        w_alpha = load_row(base_ptr + d, d, D) + a_alpha
        w_k = load_rows(base_ptr + at_k, d, D) + a_k
        w_v = load_rows(base_ptr + at_v, d, D) + a_v
        w_m = load_rows(base_ptr + at_m, d, D) + a_m

        t = g * chunk - early + place
        valid = (place < chunk) & (t >= 0) & (t < count)
        raw_eta = along(load_tokens(x_eta_ptr + sequence, t, valid, d, D), w_eta) + tl.load(bias_ptr + 2 * h)
        raw_alpha = along(load_tokens(x_alpha_ptr + sequence, t, valid, d, D), w_alpha) + tl.load(bias_ptr + 2 * h + 1)
        eta, log_alpha, _, _ = gates(raw_eta, raw_alpha, valid, eta_max, stretch)
        k, _ = unit(product(load_tokens(x_k_ptr + sequence, t, valid, d, D), tl.trans(w_k), P))
        v, _ = unit(product(load_tokens(x_v_ptr + sequence, t, valid, d, D), tl.trans(w_v), P))
        gamma, last, strength, ratio, _, inverted = tables(k, eta, log_alpha, erase, C, LEVELS, P)
        erasing = k * (strength * gamma)[:, None]
        final = k * last[:, None]
        end = tl.exp(tl.sum(log_alpha, 0))

        z_eta = written_gate(v, w_eta, s_eta, eta * tl.load(scale_ptr), erasing, inverted)
        s_eta = s_eta * end + tl.sum(final * z_eta[:, None], 0)
        z_alpha = written_gate(v, w_alpha, s_alpha, eta * tl.load(scale_ptr + 1), erasing, inverted)
        s_alpha = s_alpha * end + tl.sum(final * z_alpha[:, None], 0)
        z = written(v, w_k, s_k, eta * tl.load(scale_ptr + 2), no, erasing, inverted, P)
        s_k = s_k * end + product(tl.trans(z), final, P)
        z = written(v, w_v, s_v, eta * tl.load(scale_ptr + 3), no, erasing, inverted, P)
        s_v = s_v * end + product(tl.trans(z), final, P)
        z = written(v, w_m, s_m, eta * tl.load(scale_ptr + 4), given, erasing, inverted, P)
        q, _ = unit(load_tokens(q_ptr + sequence, t, valid, d, D))
        scores = product(q, tl.trans(k), P) * ratio
        y = product(q, tl.trans(s_m), P) * gamma[:, None] + product(scores, z, P)
        y += product(q, tl.trans(load_rows(base_ptr + at_m, d, D)), P)
        store_tokens(y_ptr + sequence, y, t, valid, d, D)
        s_m = s_m * end + product(tl.trans(z), final, P)

    store_memories(new_current_ptr, s_eta, s_alpha, s_k, s_v, s_m, d, D)

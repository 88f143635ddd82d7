"""Kernel: the backward pass of ``linear_forward``, by recomputation from the states it kept at segment boundaries.

The square memories are taken one after another. A segment's states are loaded again, and its keys, values, tables and
writes computed again; they and the derivatives by the states are tiles of the program in global memory (``scratch``).
Names and formulas are those of ``ops.linear_adjoint``; ``d_x`` is the derivative of the loss by x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nestlearn.ops.triton.gate_memories import gate_rows, row_adjoint, written_gate_adjoint
from nestlearn.ops.triton.scratch import by_blocks, fetch, put
from nestlearn.ops.triton.tiles import (
    along,
    gates,
    inverse,
    limit_adjoint,
    load_row,
    load_rows,
    load_tokens,
    shares,
    shrink,
    store_row,
    store_rows,
    store_tokens,
    unit,
    unit_adjoint,
)


@triton.constexpr_function
def backward_room(c: int, d: int) -> int:
    """Numbers that a program's tiles take: thirteen of D x D, two of D, twelve of C x D, three of C x C."""
    return (13 * d + 2 + 12 * c) * d + 3 * c * c


@triton.jit
def added(totals, place, value):
    """``totals`` (8,) with a number more at one place."""
    return tl.where(tl.arange(0, 8) == place, totals + value, totals)


@triton.jit(do_not_specialize=["tokens", "most_segments"])
def linear_backward(
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
    kept_ptr,
    anchor_ptr,
    d_y_ptr,
    d_new_current_ptr,
    d_new_anchor_ptr,
    d_x_eta_ptr,
    d_x_alpha_ptr,
    d_x_k_ptr,
    d_x_v_ptr,
    d_q_ptr,
    d_base_ptr,
    d_bias_ptr,
    d_scale_ptr,
    d_erase_ptr,
    d_current_ptr,
    d_anchor_ptr,
    scratch_ptr,
    heads,
    tokens,
    most_segments,
    d: tl.constexpr,
    chunk: tl.constexpr,
    eta_max,
    stretch,
    norm_limit,
    reach,
    C: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    P: tl.constexpr,
):
    """Shapes as in ``linear_forward``. Of what the heads of all sequences share, each program leaves its own part:
    d_base (B, H, R, d), zero before; d_bias (B, H, 2); d_scale (B, H, 5); d_erase (B, H); scratch (B, H,
    ``backward_room``)."""
    n = tl.program_id(0).to(tl.int64)
    b, h = n // heads, n % heads
    size = (2 + 3 * d) * d
    sequence = n * tokens * d
    base_ptr += h * size
    anchor_ptr += n * size
    kept_ptr += n * most_segments * size
    d_new_current_ptr += n * size
    d_new_anchor_ptr += n * size
    d_base_ptr += n * size
    d_current_ptr += n * size
    d_anchor_ptr += n * size

    w_at = scratch_ptr + n * backward_room(C, D)
    s_at = w_at + 3 * D * D
    d_s_at = s_at + 3 * D * D
    d_w_at = d_s_at + 3 * D * D
    read_at = d_w_at + 3 * D * D + 2 * D
    x_at = read_at + D * D  # of keys, of values
    k_at = x_at + 2 * C * D
    v_at = k_at + C * D
    q_at = v_at + C * D
    d_y_at = q_at + C * D
    erasing_at = d_y_at + C * D
    u_at = erasing_at + C * D
    z_at = u_at + C * D
    d_z_at = z_at + C * D
    d_k_at = d_z_at + C * D
    d_v_at = d_k_at + C * D
    inverted_at = d_v_at + C * D
    scores_at = inverted_at + C * C
    ratio_at = scores_at + C * C

    given = tl.load(accumulates_ptr + h) != 0
    limit = norm_limit * tl.where(given, reach, 1.0)
    limit = limit * limit
    erase = tl.load(erase_ptr + h)
    bias_eta, bias_alpha = tl.load(bias_ptr + 2 * h), tl.load(bias_ptr + 2 * h + 1)
    scale_ptr += h * 5
    early = (tl.load(clock_ptr + b) % chunk).to(tl.int32)
    count = tl.load(lengths_ptr + b).to(tl.int32)
    segments = tl.where(count > 0, (early + count + chunk - 1) // chunk, 0)

    place = tl.arange(0, C)
    below = place[:, None] > place[None, :]
    totals = tl.zeros([8], tl.float32)  # by the five scales, the two biases, the share of the erasure
    store_row(d_current_ptr, load_row(d_new_current_ptr, d, D), d, D)
    store_row(d_current_ptr + d, load_row(d_new_current_ptr + d, d, D), d, D)
    for i in range(3):
        put(d_s_at + i * D * D, load_rows(d_new_current_ptr + (2 + i * d) * d, d, D), D, D)
    put(read_at, load_rows(base_ptr + (2 + 2 * d) * d, d, D), D, D)
    if segments == 0:
        store_row(d_anchor_ptr, load_row(d_new_anchor_ptr, d, D), d, D)
        store_row(d_anchor_ptr + d, load_row(d_new_anchor_ptr + d, d, D), d, D)
        for i in range(3):
            at = (2 + i * d) * d
            store_rows(d_anchor_ptr + at, load_rows(d_new_anchor_ptr + at, d, D), d, D)

    for back in range(segments):
        g = segments - 1 - back
        # Recomputed: states, anchors, and what they make of the tokens.
        moved = (g > 0) | (early == 0)
        kept = kept_ptr + tl.cast(g, tl.int64) * size
        for i in range(3):
            at = (2 + i * d) * d
            s = load_rows(kept + at, d, D)
            if moved:
                s *= shrink(tl.sum(s * s), limit * d)
            put(s_at + i * D * D, s, D, D)
            if not moved:
                s = load_rows(anchor_ptr + at, d, D)
            put(w_at + i * D * D, load_rows(base_ptr + at, d, D) + s, D, D)

        start = g * chunk - early  # the token at the first place; where it is before the sequence, it does not count
        valid = (place < chunk) & (place >= -start) & (place < count - start)
        piece = sequence + tl.cast(start, tl.int64) * d
        _, w_eta = gate_rows(kept, base_ptr, anchor_ptr, 0, moved, limit, d, D)
        _, w_alpha = gate_rows(kept, base_ptr, anchor_ptr, d, moved, limit, d, D)
        raw_eta = along(load_tokens(x_eta_ptr + piece, place, valid, d, D), w_eta) + bias_eta
        raw_alpha = along(load_tokens(x_alpha_ptr + piece, place, valid, d, D), w_alpha) + bias_alpha
        eta, log_alpha, slope, opening = gates(raw_eta, raw_alpha, valid, eta_max, stretch)
        put(d_y_at, load_tokens(d_y_ptr + piece, place, valid, d, D), C, D)
        q, q_factor = unit(load_tokens(q_ptr + piece, place, valid, d, D))
        put(q_at, q, C, D)
        put(x_at, load_tokens(x_k_ptr + piece, place, valid, d, D), C, D)
        put(x_at + C * D, load_tokens(x_v_ptr + piece, place, valid, d, D), C, D)
        k, k_factor = unit(by_blocks(x_at, w_at, C, D, D, False, True, BLOCK, P))
        put(k_at, k, C, D)
        v, v_factor = unit(by_blocks(x_at + C * D, w_at + D * D, C, D, D, False, True, BLOCK, P))
        put(v_at, v, C, D)
        gamma, last, strength, ratio = shares(eta, log_alpha, erase, C)
        end = tl.exp(tl.sum(log_alpha, 0))
        erasing = strength * gamma  # of each token's key
        put(erasing_at, k * erasing[:, None], C, D)
        overlap = tl.where(below, by_blocks(k_at, k_at, C, C, D, False, True, BLOCK, P) * ratio, 0.0)
        inverted = inverse(overlap * strength[:, None], C)
        put(inverted_at, inverted, C, C)
        put(scores_at, by_blocks(q_at, k_at, C, C, D, False, True, BLOCK, P) * ratio, C, C)
        put(ratio_at, ratio, C, C)

        # The square memories: what is written, and the state at the end. ``met`` is what a key meets of the derivative
        # by the key that erases.
        put(d_v_at, tl.zeros([C, D], tl.float32), C, D)
        put(d_k_at, tl.zeros([C, D], tl.float32), C, D)
        d_t = tl.zeros([C, C], tl.float32)
        d_eta = tl.zeros([C], tl.float32)
        d_log_last = tl.zeros([C], tl.float32)
        met = tl.zeros([C], tl.float32)
        d_log_end = 0.0
        for i in range(3):
            w_i, s_i, d_s_i = w_at + i * D * D, s_at + i * D * D, d_s_at + i * D * D
            free = given & (i == 2)  # written with v itself
            u = by_blocks(v_at, w_i, C, D, D, False, True, BLOCK, P)
            factor = tl.rsqrt(tl.maximum(tl.sum(u * u, 1), 1.0))
            if free:
                u = fetch(v_at, C, D)
                factor = tl.full([C], 1.0, tl.float32)
            put(u_at, u, C, D)
            scale = tl.load(scale_ptr + 2 + i)
            step = eta * scale
            written = u * (step * factor)[:, None] - by_blocks(erasing_at, s_i, C, D, D, False, True, BLOCK, P)
            put(z_at, written, C, D)
            put(z_at, by_blocks(inverted_at, z_at, C, D, C, False, False, BLOCK, P), C, D)

            d_written = by_blocks(k_at, d_s_i, C, D, D, False, True, BLOCK, P) * last[:, None]
            if i == 2:
                d_written += by_blocks(scores_at, d_y_at, C, D, C, True, False, BLOCK, P)
            put(d_z_at, d_written, C, D)
            d_written = by_blocks(inverted_at, d_z_at, C, D, C, True, False, BLOCK, P)
            put(d_z_at, d_written, C, D)

            # With r = factor u, d_u = factor (d_r - [clipped] r (r . d_r)).
            u = fetch(u_at, C, D)
            met_u = tl.sum(u * d_written, 1)
            d_eta += met_u * factor * scale
            totals = added(totals, 2 + i, tl.sum(met_u * factor * eta))
            turn = tl.where(factor < 1, step * met_u * factor * factor * factor, 0.0)
            put(u_at, d_written * (step * factor)[:, None] - u * turn[:, None], C, D)
            if free:
                put(d_v_at, fetch(d_v_at, C, D) + fetch(u_at, C, D), C, D)
                put(d_w_at + i * D * D, tl.zeros([D, D], tl.float32), D, D)
            else:
                more = by_blocks(u_at, w_i, C, D, D, False, False, BLOCK, P)
                put(d_v_at, fetch(d_v_at, C, D) + more, C, D)
                d_w = by_blocks(u_at, v_at, D, D, C, True, False, BLOCK, P)
                put(d_w_at + i * D * D, d_w, D, D)

            d_t -= by_blocks(d_z_at, z_at, C, C, D, False, True, BLOCK, P)
            keys = fetch(k_at, C, D)
            more = by_blocks(z_at, d_s_i, C, D, D, False, False, BLOCK, P) * last[:, None]
            put(d_k_at, fetch(d_k_at, C, D) + more, C, D)
            d_log_last += tl.sum(more * keys, 1)
            more = by_blocks(d_z_at, s_i, C, D, D, False, False, BLOCK, P)
            put(d_k_at, fetch(d_k_at, C, D) - more * erasing[:, None], C, D)
            met -= tl.sum(more * keys, 1)
            d_log_end += tl.sum(fetch(d_s_i, D, D) * fetch(s_i, D, D)) * end
            d_state = by_blocks(d_z_at, erasing_at, D, D, C, True, False, BLOCK, P)
            put(d_s_i, fetch(d_s_i, D, D) * end - d_state, D, D)

        # The read. What the main memory wrote is still at z.
        q = fetch(q_at, C, D)
        d_scores = by_blocks(d_y_at, z_at, C, C, D, False, True, BLOCK, P)
        d_log_ratio = d_scores * fetch(scores_at, C, C)
        put(scores_at, d_scores * fetch(ratio_at, C, C), C, C)
        d_q = by_blocks(d_y_at, s_at + 2 * D * D, C, D, D, False, False, BLOCK, P) * gamma[:, None]
        d_log_gamma = tl.sum(d_q * q, 1)
        d_q += by_blocks(scores_at, k_at, C, D, C, False, False, BLOCK, P)
        d_q += by_blocks(d_y_at, read_at, C, D, D, False, False, BLOCK, P)
        store_tokens(d_q_ptr + piece, unit_adjoint(q, q_factor, d_q), place, valid, d, D)
        more = by_blocks(scores_at, q_at, C, D, C, True, False, BLOCK, P)
        put(d_k_at, fetch(d_k_at, C, D) + more, C, D)
        put(u_at, q * gamma[:, None], C, D)
        d_state = by_blocks(d_y_at, u_at, D, D, C, True, False, BLOCK, P)
        put(d_s_at + 2 * D * D, fetch(d_s_at + 2 * D * D, D, D) + d_state, D, D)

        # The memories of the gates.
        for i in range(2):
            s_row, w_row = gate_rows(kept, base_ptr, anchor_ptr, i * d, moved, limit, d, D)
            d_s_row = load_row(d_current_ptr + i * d, d, D)
            keys = fetch(k_at, C, D)
            scale = tl.load(scale_ptr + i)
            wrote, d_wrote, d_made, d_step, d_before_row, d_w_row, more_end, met_last, erased = written_gate_adjoint(
                fetch(v_at, C, D), keys, w_row, s_row, d_s_row, eta, scale, erasing, last, end, fetch(inverted_at, C, C)
            )
            more = (wrote * last)[:, None] * d_s_row[None, :] - (d_wrote * erasing)[:, None] * s_row[None, :]
            put(d_k_at, fetch(d_k_at, C, D) + more, C, D)
            put(d_v_at, fetch(d_v_at, C, D) + d_made[:, None] * w_row[None, :], C, D)
            d_t -= d_wrote[:, None] * wrote[None, :]
            d_log_last += wrote * met_last * last
            met -= d_wrote * erased
            d_eta += d_step * scale
            d_log_end += more_end
            totals = added(totals, i, tl.sum(d_step * eta))
            store_row(d_current_ptr + i * d, d_before_row, d, D)
            store_row(d_w_at + 3 * D * D + i * D, d_w_row, D, D)

        # The tables: from T, the erasing keys and the keys at the end to keys and gates.
        ratio = fetch(ratio_at, C, C)
        d_t = tl.where(below, d_t, 0.0)
        d_overlap = d_t * ratio * by_blocks(k_at, k_at, C, C, D, False, True, BLOCK, P)
        d_strength = tl.sum(d_overlap, 1) + met * gamma
        d_log_ratio += d_overlap * strength[:, None]
        d_log_gamma += met * erasing
        put(scores_at, d_t * strength[:, None] * ratio, C, C)
        less = tl.exp(-log_alpha)
        totals = added(totals, 7, tl.sum(d_strength * less * eta))
        d_eta += d_strength * less * erase
        d_log = d_log_gamma + tl.sum(d_log_ratio, 1) - tl.sum(d_log_ratio, 0) - d_log_last
        # log gamma sums log alpha up to a token, the end all of it.
        d_log_alpha = tl.sum(tl.where(below, d_log[:, None], 0.0), 0) + d_log
        d_log_alpha += d_log_end + tl.sum(d_log_last, 0) - d_strength * strength

        # Gates and projections.
        d_raw_eta = d_eta * slope
        d_raw_alpha = (d_log_alpha + d_eta * eta) * opening
        totals = added(added(totals, 5, tl.sum(d_raw_eta)), 6, tl.sum(d_raw_alpha))
        x_gate = load_tokens(x_eta_ptr + piece, place, valid, d, D)
        d_w_eta = load_row(d_w_at + 3 * D * D, D, D) + tl.sum(d_raw_eta[:, None] * x_gate, 0)
        x_gate = load_tokens(x_alpha_ptr + piece, place, valid, d, D)
        d_w_alpha = load_row(d_w_at + 3 * D * D + D, D, D) + tl.sum(d_raw_alpha[:, None] * x_gate, 0)
        _, w_eta = gate_rows(kept, base_ptr, anchor_ptr, 0, moved, limit, d, D)
        _, w_alpha = gate_rows(kept, base_ptr, anchor_ptr, d, moved, limit, d, D)
        store_tokens(d_x_eta_ptr + piece, d_raw_eta[:, None] * w_eta[None, :], place, valid, d, D)
        store_tokens(d_x_alpha_ptr + piece, d_raw_alpha[:, None] * w_alpha[None, :], place, valid, d, D)
        put(d_z_at, unit_adjoint(fetch(v_at, C, D), v_factor, fetch(d_v_at, C, D)), C, D)
        d_k = fetch(d_k_at, C, D)
        d_k += by_blocks(scores_at, k_at, C, D, C, False, False, BLOCK, P)
        d_k += by_blocks(scores_at, k_at, C, D, C, True, False, BLOCK, P)
        put(z_at, unit_adjoint(fetch(k_at, C, D), k_factor, d_k), C, D)
        d_x = by_blocks(z_at, w_at, C, D, D, False, False, BLOCK, P)
        store_tokens(d_x_k_ptr + piece, d_x, place, valid, d, D)
        d_x = by_blocks(d_z_at, w_at + D * D, C, D, D, False, False, BLOCK, P)
        store_tokens(d_x_v_ptr + piece, d_x, place, valid, d, D)

        # The anchors; at the last segment they are those that go on.
        ends = g == segments - 1
        row_adjoint(
            d_w_eta, d_current_ptr, d_base_ptr, d_new_anchor_ptr, d_anchor_ptr, kept, 0, ends, moved, limit, d, D
        )
        row_adjoint(
            d_w_alpha, d_current_ptr, d_base_ptr, d_new_anchor_ptr, d_anchor_ptr, kept, d, ends, moved, limit, d, D
        )
        for i in range(3):
            at = (2 + i * d) * d
            d_w = fetch(d_w_at + i * D * D, D, D)
            total = load_rows(d_base_ptr + at, d, D) + d_w
            if i < 2:
                made = by_blocks(z_at + i * C * D, x_at + i * C * D, D, D, C, True, False, BLOCK, P)
                d_w += made
            else:
                made = by_blocks(d_y_at, q_at, D, D, C, True, False, BLOCK, P)
            tl.debug_barrier()  # as in ``put``
            store_rows(d_base_ptr + at, total + made, d, D)
            if ends:
                d_w += load_rows(d_new_anchor_ptr + at, d, D)
            if moved:
                d_w += fetch(d_s_at + i * D * D, D, D)
                put(d_s_at + i * D * D, limit_adjoint(load_rows(kept + at, d, D), d_w, limit * d), D, D)
            else:
                store_rows(d_anchor_ptr + at, d_w, d, D)

    for i in range(3):
        store_rows(d_current_ptr + (2 + i * d) * d, fetch(d_s_at + i * D * D, D, D), d, D)
    i = tl.arange(0, 8)
    tl.store(d_scale_ptr + 5 * n + i, totals, mask=i < 5)
    tl.store(d_bias_ptr + 2 * n + i - 5, totals, mask=(i == 5) | (i == 6))
    tl.store(d_erase_ptr + n + i - 7, totals, mask=i == 7)

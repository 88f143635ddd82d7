"""Kernel: the backward pass of ``linear_forward``, by recomputation from the states it kept at segment boundaries.

The derivative by the five states stays on the chip from the last token to the first; a segment's states are loaded
again, and its keys, values, tables and writes computed again. Names and formulas are those of ``ops.linear_adjoint``;
``d_x`` is the derivative of the loss by x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nestlearn.ops.triton.tiles import (
    along,
    gates,
    limit_adjoint,
    limited,
    load_memories,
    load_row,
    load_rows,
    load_tokens,
    product,
    store_memories,
    store_row,
    store_rows,
    store_tokens,
    tables,
    unit,
    unit_adjoint,
)


@triton.jit
def written_adjoint(
    v, w, s, d_s, eta, scale, given, erasing, final, end, inverted, scores, d_y, READ: tl.constexpr, P: tl.constexpr
):
    """A memory w, s (D, D), whose next state has the derivative d_s; the one that is READ has d_y (C, D).

    Returns derivatives by v, ``final`` and ``erasing`` (C, D); by step sizes (C,) in units of the scale; by the
    logarithm of ``end``; by T (C, C) as far as below the diagonal; by s and w (D, D); and, of the one that is read, by
    the scores (C, C).
    """
    u = product(v, tl.trans(w), P)
    factor = tl.rsqrt(tl.maximum(tl.sum(u * u, 1), 1.0))
    factor = tl.where(given, 1.0, factor)
    u = tl.where(given, v, u)
    step = eta * scale
    z = u * (step * factor)[:, None] - product(erasing, tl.trans(s), P)
    z = product(inverted, z, P)

    d_z = product(final, tl.trans(d_s), P)
    d_final = product(z, d_s, P)
    d_before = d_s * end
    d_log_end = tl.sum(d_before * s)
    d_scores = tl.zeros_like(inverted)
    if READ:
        d_z += product(tl.trans(scores), d_y, P)
        d_scores = product(d_y, tl.trans(z), P)
    d_z = product(tl.trans(inverted), d_z, P)
    d_t = -product(d_z, tl.trans(z), P)
    d_erasing = -product(d_z, s, P)
    d_before -= product(tl.trans(d_z), erasing, P)

    # With t = factor u, d_u = factor (d_t - [clipped] t (t . d_t)).
    met = tl.sum(u * d_z, 1)
    turn = tl.where(factor < 1, step * met * factor * factor * factor, 0.0)
    d_u = d_z * (step * factor)[:, None] - u * turn[:, None]
    d_v = tl.where(given, d_u, product(d_u, w, P))
    d_w = tl.where(given, 0.0, product(tl.trans(d_u), v, P))
    return d_v, d_final, d_erasing, met * factor, d_log_end, d_t, d_before, d_w, d_scores


@triton.jit
def written_gate_adjoint(v, w, s, d_s, eta, scale, erasing, final, end, inverted):
    """The same for a gate's memory, w, s and d_s (D,)."""
    u = along(v, w)
    factor = tl.rsqrt(tl.maximum(u * u, 1.0))
    step = eta * scale
    z = along(inverted, u * factor * step - along(erasing, s))

    d_z = along(final, d_s)
    d_final = z[:, None] * d_s[None, :]
    d_before = d_s * end
    d_log_end = tl.sum(d_before * s)
    d_z = tl.sum(inverted * d_z[:, None], 0)
    d_t = -d_z[:, None] * z[None, :]
    d_erasing = -d_z[:, None] * s[None, :]
    d_before -= tl.sum(d_z[:, None] * erasing, 0)

    met = u * d_z
    d_u = d_z * step * factor - u * tl.where(factor < 1, step * met * factor * factor * factor, 0.0)
    d_v = d_u[:, None] * w[None, :]
    d_w = tl.sum(d_u[:, None] * v, 0)
    return d_v, d_final, d_erasing, met * factor, d_log_end, d_t, d_before, d_w


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
    P: tl.constexpr,
):
    """Shapes as in ``linear_forward``. Of what the heads of all sequences share, each program leaves its own part:
    d_base (B, H, R, d), zero before; d_bias (B, H, 2); d_scale (B, H, 5); d_erase (B, H)."""
    n = tl.program_id(0).to(tl.int64)
    b, h = n // heads, n % heads
    size = (2 + 3 * d) * d
    at_k, at_v, at_m = 2 * d, (2 + d) * d, (2 + 2 * d) * d
    sequence = n * tokens * d
    base_ptr += h * size
    anchor_ptr += n * size
    kept_ptr += n * most_segments * size
    d_new_current_ptr += n * size
    d_new_anchor_ptr += n * size
    d_base_ptr += n * size
    d_current_ptr += n * size
    d_anchor_ptr += n * size

    given = tl.load(accumulates_ptr + h) != 0
    limit = norm_limit * tl.where(given, reach, 1.0)
    limit = limit * limit
    erase = tl.load(erase_ptr + h)
    bias_eta, bias_alpha = tl.load(bias_ptr + 2 * h), tl.load(bias_ptr + 2 * h + 1)
    scale_ptr += h * 5
    scale_eta, scale_alpha = tl.load(scale_ptr), tl.load(scale_ptr + 1)
    scale_k, scale_v, scale_m = tl.load(scale_ptr + 2), tl.load(scale_ptr + 3), tl.load(scale_ptr + 4)
    early = (tl.load(clock_ptr + b) % chunk).to(tl.int32)
    count = tl.load(lengths_ptr + b).to(tl.int32)
    segments = tl.where(count > 0, (early + count + chunk - 1) // chunk, 0)
    no = n < 0  # no memory but the main one is written with v itself

    d_s_eta, d_s_alpha, d_s_k, d_s_v, d_s_m = load_memories(d_new_current_ptr, d, D)
    place = tl.arange(0, C)
    below = place[:, None] > place[None, :]
    # Sums over tokens, one place of a segment each.
    sum_eta = tl.zeros([C], tl.float32)
    sum_alpha = tl.zeros([C], tl.float32)
    sum_erase = tl.zeros([C], tl.float32)
    sum_scale_eta = tl.zeros([C], tl.float32)
    sum_scale_alpha = tl.zeros([C], tl.float32)
    sum_scale_k = tl.zeros([C], tl.float32)
    sum_scale_v = tl.zeros([C], tl.float32)
    sum_scale_m = tl.zeros([C], tl.float32)

    if segments == 0:
        c_eta, c_alpha, c_k, c_v, c_m = load_memories(d_new_anchor_ptr, d, D)
        store_memories(d_anchor_ptr, c_eta, c_alpha, c_k, c_v, c_m, d, D)

    for back in range(segments):
        g = segments - 1 - back
        # Recomputed: states, anchors, and what they make of the tokens.
        moved = (g > 0) | (early == 0)
        kept = kept_ptr + tl.cast(g, tl.int64) * size
        s_eta, s_alpha, s_k, s_v, s_m = load_memories(kept, d, D)
        if moved:
            s_eta, s_alpha, s_k, s_v, s_m = limited(s_eta, s_alpha, s_k, s_v, s_m, limit, d)
            w_eta, w_alpha, w_k, w_v, w_m = s_eta, s_alpha, s_k, s_v, s_m
        else:
            w_eta, w_alpha, w_k, w_v, w_m = load_memories(anchor_ptr, d, D)
        w_eta += load_row(base_ptr, d, D)
        w_alpha += load_row(base_ptr + d, d, D)
        w_k += load_rows(base_ptr + at_k, d, D)
        w_v += load_rows(base_ptr + at_v, d, D)
        w_m += load_rows(base_ptr + at_m, d, D)

        t = g * chunk - early + place
        valid = (place < chunk) & (t >= 0) & (t < count)
        x_eta = load_tokens(x_eta_ptr + sequence, t, valid, d, D)
        x_alpha = load_tokens(x_alpha_ptr + sequence, t, valid, d, D)
        eta, log_alpha, slope, opening = gates(
            along(x_eta, w_eta) + bias_eta, along(x_alpha, w_alpha) + bias_alpha, valid, eta_max, stretch
        )
        x_k = load_tokens(x_k_ptr + sequence, t, valid, d, D)
        x_v = load_tokens(x_v_ptr + sequence, t, valid, d, D)
        q, q_factor = unit(load_tokens(q_ptr + sequence, t, valid, d, D))
        d_y = load_tokens(d_y_ptr + sequence, t, valid, d, D)
        k, k_factor = unit(product(x_k, tl.trans(w_k), P))
        v, v_factor = unit(product(x_v, tl.trans(w_v), P))
        gamma, last, strength, ratio, overlap, inverted = tables(k, eta, log_alpha, erase, C, LEVELS, P)
        erasing = k * (strength * gamma)[:, None]
        final = k * last[:, None]
        end = tl.exp(tl.sum(log_alpha, 0))
        scores = product(q, tl.trans(k), P) * ratio

        # The memories: what is written, what is read, the state at the end.
        d_v, d_final, d_erasing, d_step, d_log_end, d_t, d_before, d_w_m, d_scores = written_adjoint(
            v, w_m, s_m, d_s_m, eta, scale_m, given, erasing, final, end, inverted, scores, d_y, True, P
        )
        d_q = product(d_y, s_m, P) * gamma[:, None]
        d_log_gamma = tl.sum(d_q * q, 1)
        d_s_m = d_before + product(tl.trans(d_y), q * gamma[:, None], P)
        d_log_ratio = d_scores * scores
        d_scores *= ratio
        d_q += product(d_scores, k, P)
        d_q += product(d_y, load_rows(base_ptr + at_m, d, D), P)
        store_tokens(d_q_ptr + sequence, unit_adjoint(q, q_factor, d_q), t, valid, d, D)
        d_k = product(tl.trans(d_scores), q, P)
        d_eta = d_step * scale_m
        sum_scale_m += d_step * eta

        more_v, more_final, more_erasing, d_step, more_end, more_t, d_before, d_w_v, _ = written_adjoint(
            v, w_v, s_v, d_s_v, eta, scale_v, no, erasing, final, end, inverted, scores, d_y, False, P
        )
        d_v += more_v
        d_final += more_final
        d_erasing += more_erasing
        d_log_end += more_end
        d_t += more_t
        d_s_v = d_before
        d_eta += d_step * scale_v
        sum_scale_v += d_step * eta

        more_v, more_final, more_erasing, d_step, more_end, more_t, d_before, d_w_k, _ = written_adjoint(
            v, w_k, s_k, d_s_k, eta, scale_k, no, erasing, final, end, inverted, scores, d_y, False, P
        )
        d_v += more_v
        d_final += more_final
        d_erasing += more_erasing
        d_log_end += more_end
        d_t += more_t
        d_s_k = d_before
        d_eta += d_step * scale_k
        sum_scale_k += d_step * eta

        more_v, more_final, more_erasing, d_step, more_end, more_t, d_before, d_w_eta = written_gate_adjoint(
            v, w_eta, s_eta, d_s_eta, eta, scale_eta, erasing, final, end, inverted
        )
        d_v += more_v
        d_final += more_final
        d_erasing += more_erasing
        d_log_end += more_end
        d_t += more_t
        d_s_eta = d_before
        d_eta += d_step * scale_eta
        sum_scale_eta += d_step * eta

        more_v, more_final, more_erasing, d_step, more_end, more_t, d_before, d_w_alpha = written_gate_adjoint(
            v, w_alpha, s_alpha, d_s_alpha, eta, scale_alpha, erasing, final, end, inverted
        )
        d_v += more_v
        d_final += more_final
        d_erasing += more_erasing
        d_log_end += more_end
        d_t += more_t
        d_s_alpha = d_before
        d_eta += d_step * scale_alpha
        sum_scale_alpha += d_step * eta

        # The tables: from T, the erasing keys and the keys at the end to keys and gates.
        d_t = tl.where(below, d_t, 0.0)
        d_k += d_final * last[:, None] + d_erasing * (strength * gamma)[:, None]
        d_log_last = tl.sum(d_final * final, 1)
        met = tl.sum(d_erasing * k, 1)
        d_overlap = d_t * overlap
        d_strength = tl.sum(d_overlap, 1) + met * gamma
        d_log_ratio += d_overlap * strength[:, None]
        d_log_gamma += met * strength * gamma
        d_product = d_t * strength[:, None] * ratio
        d_k += product(d_product + tl.trans(d_product), k, P)
        less = tl.exp(-log_alpha)
        sum_erase += d_strength * less * eta
        d_eta += d_strength * less * erase
        d_log = d_log_gamma + tl.sum(d_log_ratio, 1) - tl.sum(d_log_ratio, 0) - d_log_last
        # log gamma sums log alpha up to a token, the end all of it.
        d_log_alpha = tl.sum(tl.where(below, d_log[:, None], 0.0), 0) + d_log
        d_log_alpha += d_log_end + tl.sum(d_log_last, 0) - d_strength * strength

        # Gates and projections.
        d_raw_eta = d_eta * slope
        d_raw_alpha = (d_log_alpha + d_eta * eta) * opening
        sum_eta += d_raw_eta
        sum_alpha += d_raw_alpha
        d_w_eta += tl.sum(d_raw_eta[:, None] * x_eta, 0)
        d_w_alpha += tl.sum(d_raw_alpha[:, None] * x_alpha, 0)
        store_tokens(d_x_eta_ptr + sequence, d_raw_eta[:, None] * w_eta[None, :], t, valid, d, D)
        store_tokens(d_x_alpha_ptr + sequence, d_raw_alpha[:, None] * w_alpha[None, :], t, valid, d, D)
        d_k = unit_adjoint(k, k_factor, d_k)
        d_v = unit_adjoint(v, v_factor, d_v)
        d_w_k += product(tl.trans(d_k), x_k, P)
        d_w_v += product(tl.trans(d_v), x_v, P)
        store_tokens(d_x_k_ptr + sequence, product(d_k, w_k, P), t, valid, d, D)
        store_tokens(d_x_v_ptr + sequence, product(d_v, w_v, P), t, valid, d, D)

        # The anchors. What a program adds up in memory, another of its threads may have written.
        tl.debug_barrier()
        store_row(d_base_ptr, load_row(d_base_ptr, d, D) + d_w_eta, d, D)
        store_row(d_base_ptr + d, load_row(d_base_ptr + d, d, D) + d_w_alpha, d, D)
        store_rows(d_base_ptr + at_k, load_rows(d_base_ptr + at_k, d, D) + d_w_k, d, D)
        store_rows(d_base_ptr + at_v, load_rows(d_base_ptr + at_v, d, D) + d_w_v, d, D)
        d_base_m = load_rows(d_base_ptr + at_m, d, D) + d_w_m + product(tl.trans(d_y), q, P)
        store_rows(d_base_ptr + at_m, d_base_m, d, D)
        if g == segments - 1:  # its anchors are those that go on
            d_w_eta += load_row(d_new_anchor_ptr, d, D)
            d_w_alpha += load_row(d_new_anchor_ptr + d, d, D)
            d_w_k += load_rows(d_new_anchor_ptr + at_k, d, D)
            d_w_v += load_rows(d_new_anchor_ptr + at_v, d, D)
            d_w_m += load_rows(d_new_anchor_ptr + at_m, d, D)
        if moved:
            d_w_eta += d_s_eta
            s_eta = load_row(kept, d, D)
            d_s_eta = limit_adjoint(s_eta, d_w_eta, limit)
            d_w_alpha += d_s_alpha
            s_alpha = load_row(kept + d, d, D)
            d_s_alpha = limit_adjoint(s_alpha, d_w_alpha, limit)
            d_w_k += d_s_k
            s_k = load_rows(kept + at_k, d, D)
            d_s_k = limit_adjoint(s_k, d_w_k, limit * d)
            d_w_v += d_s_v
            s_v = load_rows(kept + at_v, d, D)
            d_s_v = limit_adjoint(s_v, d_w_v, limit * d)
            d_w_m += d_s_m
            s_m = load_rows(kept + at_m, d, D)
            d_s_m = limit_adjoint(s_m, d_w_m, limit * d)
        else:
            store_memories(d_anchor_ptr, d_w_eta, d_w_alpha, d_w_k, d_w_v, d_w_m, d, D)

    store_memories(d_current_ptr, d_s_eta, d_s_alpha, d_s_k, d_s_v, d_s_m, d, D)
    tl.store(d_bias_ptr + 2 * n, tl.sum(sum_eta, 0))
    tl.store(d_bias_ptr + 2 * n + 1, tl.sum(sum_alpha, 0))
    tl.store(d_erase_ptr + n, tl.sum(sum_erase, 0))
    tl.store(d_scale_ptr + 5 * n, tl.sum(sum_scale_eta, 0))
    tl.store(d_scale_ptr + 5 * n + 1, tl.sum(sum_scale_alpha, 0))
    tl.store(d_scale_ptr + 5 * n + 2, tl.sum(sum_scale_k, 0))
    tl.store(d_scale_ptr + 5 * n + 3, tl.sum(sum_scale_v, 0))
    tl.store(d_scale_ptr + 5 * n + 4, tl.sum(sum_scale_m, 0))

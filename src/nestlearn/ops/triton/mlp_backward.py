"""Kernel: the backward pass of ``mlp_forward``, by recomputation from the states it kept at segment boundaries.

The derivative by the states stays in ``d_current`` from the last token to the first, that by the anchors of a segment
in ``d_anchor``. One memory after another is worked through, in the stages of ``ops.triton.mlp_stages``. Names and
formulas are those of ``ops.mlp_adjoint``; ``d_x`` is the derivative of the loss by x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nestlearn.ops.triton.mlp_stages import (
    Derivatives,
    add_w1,
    add_w2,
    answer_adjoint,
    end_adjoint,
    first_layer_adjoint,
    generate_adjoint,
    last_layer_adjoint,
    write_adjoint,
)
from nestlearn.ops.triton.mlp_tiles import (
    SLOTS,
    Head,
    begin,
    load_w1,
    load_w2,
    most1,
    most2,
    scratch_at,
    store_w1,
    store_w2,
    write,
)
from nestlearn.ops.triton.scratch import fetch
from nestlearn.ops.triton.tiles import (
    copy,
    limit_adjoint,
    load_tokens,
    product,
    store_tokens,
    unit,
    unit_adjoint,
)


@triton.jit
def anchor_adjoint(of, d_of, d_new_anchor_ptr, ends, m, D: tl.constexpr, E: tl.constexpr):
    """From the anchor of memory m to its start and to the state that it was taken from, or else the one that came in.

    ``ends``: whether the anchors of this segment are those that go on.
    """
    d_a2, d_a1 = load_w2(d_of.anchor, of, m, D, E), load_w1(d_of.anchor, of, m, D, E)
    add_w2(d_of.base, of, m, d_a2, D, E)
    add_w1(d_of.base, of, m, d_a1, D, E)
    if ends:
        d_a2 += load_w2(d_new_anchor_ptr, of, m, D, E)
        d_a1 += load_w1(d_new_anchor_ptr, of, m, D, E)
    if of.moved:
        d_a2 += load_w2(d_of.current, of, m, D, E)
        d_a1 += load_w1(d_of.current, of, m, D, E)
        d_s2 = limit_adjoint(load_w2(of.state, of, m, D, E), d_a2, most2(of))
        d_s1 = limit_adjoint(load_w1(of.state, of, m, D, E), d_a1, most1(of, m))
        tl.debug_barrier()
        store_w2(d_of.current, of, m, d_s2, D, E)
        store_w1(d_of.current, of, m, d_s1, D, E)
        store_w2(d_of.anchor, of, m, tl.zeros_like(d_a2), D, E)
        store_w1(d_of.anchor, of, m, tl.zeros_like(d_a1), D, E)
    else:
        tl.debug_barrier()
        store_w2(d_of.anchor, of, m, d_a2, D, E)
        store_w1(d_of.anchor, of, m, d_a1, D, E)


@triton.jit(do_not_specialize=["tokens", "most_segments"])
def mlp_backward(
    x_eta_ptr,
    x_alpha_ptr,
    x_k_ptr,
    x_v_ptr,
    q_ptr,
    base_ptr,
    bias_ptr,
    scale_ptr,
    erase_ptr,
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
    d,
    hidden,
    chunk,
    eta_max,
    stretch,
    norm_limit,
    C: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    P: tl.constexpr,
):
    """Shapes as in ``mlp_forward``. Of what the heads of all sequences share, each program leaves its own part:
    d_base (B, H, S), zero before; d_bias (B, H, 2); d_scale (B, H, 5); d_erase (B, H)."""
    n = tl.program_id(0).to(tl.int64)
    b, head = n // heads, n % heads
    size = (8 * d + 2) * hidden
    sequence = n * tokens * d
    base_ptr += head * size
    anchor_ptr += n * size
    kept_ptr += n * most_segments * size
    d_current_ptr += n * size
    d_new_anchor_ptr += n * size
    d_of = Derivatives(d_base_ptr + n * size, d_current_ptr, d_anchor_ptr + n * size)
    SLOT: tl.constexpr = C * max(C, D, E)
    at = scratch_at(scratch_ptr + n * SLOTS * SLOT, SLOT)
    limit = norm_limit * norm_limit
    erase = tl.load(erase_ptr + head)
    early = (tl.load(clock_ptr + b) % chunk).to(tl.int32)
    count = tl.load(lengths_ptr + b).to(tl.int32)
    segments = tl.where(count > 0, (early + count + chunk - 1) // chunk, 0)
    place = tl.arange(0, C)
    below = place[:, None] > place[None, :]
    first = (tl.arange(0, D) == 0)[None, :]
    of_memory = tl.arange(0, 8)
    # Sums over tokens, one place of a segment each; and of the write scales, one memory each.
    sum_eta = tl.zeros([C], tl.float32)
    sum_alpha = tl.zeros([C], tl.float32)
    sum_erase = tl.zeros([C], tl.float32)
    sum_scale = tl.zeros([8], tl.float32)
    copy(d_new_current_ptr + n * size, d_current_ptr, size)
    if segments == 0:
        copy(d_new_anchor_ptr, d_anchor_ptr + n * size, size)

    for turn in range(segments):
        g = segments - 1 - turn
        tl.debug_barrier()
        # Recomputed: anchors, and what they make of the tokens.
        moved = (g > 0) | (early == 0)
        state_ptr = kept_ptr + tl.cast(g, tl.int64) * size
        answering_ptr = anchor_ptr
        if moved:
            answering_ptr = state_ptr
        of = Head(base_ptr, answering_ptr, state_ptr, moved, limit, d, hidden)
        t = g * chunk - early + place
        valid = (place < chunk) & (t >= 0) & (t < count)
        xs = x_eta_ptr + sequence, x_alpha_ptr + sequence, x_k_ptr + sequence, x_v_ptr + sequence
        gate, factors, table, end, fading = begin(
            of, at, xs, bias_ptr + 2 * head, erase, t, valid, eta_max, stretch, C, D, E, P
        )
        eta, log_alpha, slope, opening = gate
        k_factor, v_factor = factors
        gamma, last, strength, ratio, overlap = table

        d_k = tl.zeros([C, D], tl.float32)
        d_v = tl.zeros([C, D], tl.float32)
        d_t = tl.zeros([C, C], tl.float32)
        d_log_ratio = tl.zeros([C, C], tl.float32)
        d_log_gamma = tl.zeros([C], tl.float32)
        d_log_last = tl.zeros([C], tl.float32)
        d_eta = tl.zeros([C], tl.float32)
        met = tl.zeros([C], tl.float32)
        d_log_end = 0.0

        for m in range(5):
            scale = tl.load(scale_ptr + 5 * head + m)
            tl.debug_barrier()
            write(of, at, m, eta * scale, fading, C, D, E, P)
            tl.debug_barrier()
            end_k, end_last, end_end = end_adjoint(of, d_of, at, m, last, end, C, D, E, P)
            d_k += end_k
            d_log_last += end_last
            d_log_end += end_end
            if m == 4:  # the read
                q, q_factor = unit(load_tokens(q_ptr + sequence, t, valid, d, D))
                d_y = load_tokens(d_y_ptr + sequence, t, valid, d, D)
                tl.debug_barrier()
                last_gamma, last_ratio = last_layer_adjoint(of, d_of, at, q, d_y, gamma, ratio, C, D, E, P)
                tl.debug_barrier()
                d_q, read_k, first_gamma, first_ratio = first_layer_adjoint(
                    of, d_of, at, q, d_y, gamma, ratio, C, D, E, P
                )
                store_tokens(d_q_ptr + sequence, unit_adjoint(q, q_factor, d_q), t, valid, d, D)
                d_k += read_k
                d_log_gamma += last_gamma + first_gamma
                d_log_ratio += last_ratio + first_ratio
            tl.debug_barrier()
            more_t, d_erasing = write_adjoint(of, d_of, at, m, fading, C, D, E, P)
            d_t += more_t
            d_k += d_erasing * fading[:, None]
            met += tl.sum(d_erasing * fetch(at.k, C, D), 1)
            tl.debug_barrier()
            answer_k, answer_v, d_step = answer_adjoint(of, d_of, at, m, eta * scale, C, D, E, P)
            d_k += answer_k
            d_v += answer_v
            d_eta += d_step * scale
            sum_scale += tl.where(of_memory == m, tl.sum(d_step * eta), 0.0)

        # The tables: from T, the erasing keys and the keys at the end to keys and gates.
        d_t = tl.where(below, d_t, 0.0)
        d_overlap = d_t * overlap
        d_strength = tl.sum(d_overlap, 1) + met * gamma
        d_log_ratio += d_overlap * strength[:, None]
        d_log_gamma += met * fading
        d_product = d_t * strength[:, None] * ratio
        k, v = fetch(at.k, C, D), fetch(at.v, C, D)
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
        d_made = tl.where(first, d_raw_eta[:, None], 0.0)
        generate_adjoint(of, d_of, x_eta_ptr + sequence, d_x_eta_ptr + sequence, d_made, 0, t, valid, D, E, P)
        d_made = tl.where(first, d_raw_alpha[:, None], 0.0)
        generate_adjoint(of, d_of, x_alpha_ptr + sequence, d_x_alpha_ptr + sequence, d_made, 1, t, valid, D, E, P)
        d_made = unit_adjoint(k, k_factor, d_k)
        generate_adjoint(of, d_of, x_k_ptr + sequence, d_x_k_ptr + sequence, d_made, 2, t, valid, D, E, P)
        d_made = unit_adjoint(v, v_factor, d_v)
        generate_adjoint(of, d_of, x_v_ptr + sequence, d_x_v_ptr + sequence, d_made, 3, t, valid, D, E, P)

        tl.debug_barrier()
        for m in range(5):
            anchor_adjoint(of, d_of, d_new_anchor_ptr, g == segments - 1, m, D, E)

    tl.store(d_bias_ptr + 2 * n, tl.sum(sum_eta, 0))
    tl.store(d_bias_ptr + 2 * n + 1, tl.sum(sum_alpha, 0))
    tl.store(d_erase_ptr + n, tl.sum(sum_erase, 0))
    tl.store(d_scale_ptr + 5 * n + of_memory, sum_scale, mask=of_memory < 5)

"""Kernel: five linear memories along a sequence (Eq. 88, 92), forward. One program is one head of one sequence.

The square memories are taken one after another; their states, what they were set to at the last chunk boundary, keys,
values and writes are tiles of the program in global memory (``scratch``). A segment's tokens end at a chunk boundary of
the program's own clock, so sequences of a batch may stand anywhere in their chunks and have any length. Names and
formulas are those of ``ops.linear_adjoint``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nestlearn.ops.triton.gate_memories import written_gate
from nestlearn.ops.triton.scratch import by_blocks, fetch, put
from nestlearn.ops.triton.tiles import (
    along,
    gates,
    inverse,
    load_row,
    load_rows,
    load_tokens,
    shares,
    shrink,
    store_row,
    store_rows,
    store_tokens,
    unit,
)


@triton.constexpr_function
def forward_room(c: int, d: int) -> int:
    """Numbers that a program's tiles take: seven of D x D, five of C x D, two of C x C."""
    return 7 * d * d + 5 * c * d + 2 * c * c


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
    KEEP: tl.constexpr,
    P: tl.constexpr,
):
    """Shapes: inputs, q and y (B, H, T, d); base (H, R, d); states (B, H, R, d), R = 2 + 3 d, rows eta, alpha, k, v,
    memory; bias (H, 2); scale (H, 5); erase, accumulates (H,); clock, lengths (B,); kept (B, H, segments, R, d), the
    state at the start of every segment, written if KEEP; scratch (B, H, ``forward_room``)."""
    n = tl.program_id(0).to(tl.int64)
    b, h = n // heads, n % heads
    size = (2 + 3 * d) * d
    sequence = n * tokens * d
    base_ptr += h * size
    current_ptr += n * size
    anchor_ptr += n * size
    new_anchor_ptr += n * size
    new_current_ptr += n * size
    kept_ptr += n * most_segments * size
    w_at = scratch_ptr + n * forward_room(C, D)
    s_at = w_at + 3 * D * D
    read_at = s_at + 3 * D * D
    k_at = read_at + D * D
    v_at = k_at + C * D
    q_at = v_at + C * D
    final_at = q_at + C * D
    z_at = final_at + C * D
    inverted_at = z_at + C * D
    scores_at = inverted_at + C * C

    scale_ptr += h * 5
    given = tl.load(accumulates_ptr + h) != 0
    limit = norm_limit * tl.where(given, reach, 1.0)
    limit = limit * limit  # of the squares of a row; a square block has d times as much
    erase = tl.load(erase_ptr + h)
    early = (tl.load(clock_ptr + b) % chunk).to(tl.int32)  # tokens of the first chunk that an earlier piece has seen
    count = tl.load(lengths_ptr + b).to(tl.int32)
    segments = tl.where(count > 0, (early + count + chunk - 1) // chunk, 0)

    place = tl.arange(0, C)
    below = place[:, None] > place[None, :]
    s_eta, s_alpha = load_row(current_ptr, d, D), load_row(current_ptr + d, d, D)
    a_eta, a_alpha = load_row(anchor_ptr, d, D), load_row(anchor_ptr + d, d, D)
    for i in range(3):
        at = (2 + i * d) * d
        put(s_at + i * D * D, load_rows(current_ptr + at, d, D), D, D)
        store_rows(new_anchor_ptr + at, load_rows(anchor_ptr + at, d, D), d, D)
    put(read_at, load_rows(base_ptr + (2 + 2 * d) * d, d, D), D, D)

    for g in range(segments):
        moved = (g > 0) | (early == 0)  # a chunk boundary: the anchors move
        kept = kept_ptr + tl.cast(g, tl.int64) * size
        if KEEP:
            store_row(kept, s_eta, d, D)
            store_row(kept + d, s_alpha, d, D)
        if moved:
            s_eta *= shrink(tl.sum(s_eta * s_eta), limit)
            s_alpha *= shrink(tl.sum(s_alpha * s_alpha), limit)
            a_eta, a_alpha = s_eta, s_alpha
        for i in range(3):
            at = (2 + i * d) * d
            s = fetch(s_at + i * D * D, D, D)
            if KEEP:
                store_rows(kept + at, s, d, D)
            if moved:
                s *= shrink(tl.sum(s * s), limit * d)
                put(s_at + i * D * D, s, D, D)
                if g == segments - 1:
                    store_rows(new_anchor_ptr + at, s, d, D)
            else:
                s = load_rows(anchor_ptr + at, d, D)
            put(w_at + i * D * D, load_rows(base_ptr + at, d, D) + s, D, D)
        w_eta = load_row(base_ptr, d, D) + a_eta
        w_alpha = load_row(base_ptr + d, d, D) + a_alpha

        # Keys, values, queries, and the tables of the segment.
        start = g * chunk - early  # the token at the first place; where it is before the sequence, it does not count
        valid = (place < chunk) & (place >= -start) & (place < count - start)
        piece = sequence + tl.cast(start, tl.int64) * d
        raw_eta = along(load_tokens(x_eta_ptr + piece, place, valid, d, D), w_eta) + tl.load(bias_ptr + 2 * h)
        raw_alpha = along(load_tokens(x_alpha_ptr + piece, place, valid, d, D), w_alpha) + tl.load(bias_ptr + 2 * h + 1)
        eta, log_alpha, _, _ = gates(raw_eta, raw_alpha, valid, eta_max, stretch)
        put(z_at, load_tokens(x_v_ptr + piece, place, valid, d, D), C, D)
        v, _ = unit(by_blocks(z_at, w_at + D * D, C, D, D, False, True, BLOCK, P))
        put(v_at, v, C, D)
        put(z_at, load_tokens(x_k_ptr + piece, place, valid, d, D), C, D)
        k, _ = unit(by_blocks(z_at, w_at, C, D, D, False, True, BLOCK, P))
        put(k_at, k, C, D)
        gamma, last, strength, ratio = shares(eta, log_alpha, erase, C)
        end = tl.exp(tl.sum(log_alpha, 0))
        overlap = tl.where(below, by_blocks(k_at, k_at, C, C, D, False, True, BLOCK, P) * ratio, 0.0)
        inverted = inverse(overlap * strength[:, None], C)
        put(inverted_at, inverted, C, C)
        put(final_at, k * last[:, None], C, D)
        q, _ = unit(load_tokens(q_ptr + piece, place, valid, d, D))
        put(q_at, q, C, D)
        put(scores_at, by_blocks(q_at, k_at, C, C, D, False, True, BLOCK, P) * ratio, C, C)
        erasing = strength * gamma  # of each token's key

        # The memories.
        z = written_gate(v, w_eta, eta * tl.load(scale_ptr), along(k, s_eta) * erasing, inverted)
        s_eta = s_eta * end + tl.sum(k * (last * z)[:, None], 0)
        z = written_gate(v, w_alpha, eta * tl.load(scale_ptr + 1), along(k, s_alpha) * erasing, inverted)
        s_alpha = s_alpha * end + tl.sum(k * (last * z)[:, None], 0)
        for i in range(3):
            own = s_at + i * D * D
            u = by_blocks(v_at, w_at + i * D * D, C, D, D, False, True, BLOCK, P)
            u *= tl.rsqrt(tl.maximum(tl.sum(u * u, 1), 1.0))[:, None]
            if given & (i == 2):
                u = fetch(v_at, C, D)
            u *= (eta * tl.load(scale_ptr + 2 + i))[:, None]
            u -= by_blocks(k_at, own, C, D, D, False, True, BLOCK, P) * erasing[:, None]
            put(z_at, u, C, D)
            put(z_at, by_blocks(inverted_at, z_at, C, D, C, False, False, BLOCK, P), C, D)
            if i == 2:
                y = by_blocks(q_at, own, C, D, D, False, True, BLOCK, P) * gamma[:, None]
                y += by_blocks(scores_at, z_at, C, D, C, False, False, BLOCK, P)
                y += by_blocks(q_at, read_at, C, D, D, False, True, BLOCK, P)
                store_tokens(y_ptr + piece, y, place, valid, d, D)
            more = by_blocks(z_at, final_at, D, D, C, True, False, BLOCK, P)
            put(own, fetch(own, D, D) * end + more, D, D)

    store_row(new_current_ptr, s_eta, d, D)
    store_row(new_current_ptr + d, s_alpha, d, D)
    store_row(new_anchor_ptr, a_eta, d, D)
    store_row(new_anchor_ptr + d, a_alpha, d, D)
    for i in range(3):
        store_rows(new_current_ptr + (2 + i * d) * d, fetch(s_at + i * D * D, D, D), d, D)

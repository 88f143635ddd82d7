"""Kernel: five MLP memories along a sequence (Eq. 88-91, SPEC 12.1 reading A), forward. One program is one head of one
sequence.

Their ten matrices do not fit on the chip together: they stay in the tensors that are returned, and one memory at a time
is worked through, in stages that hand their tiles on in a scratch: what a stage multiplies is alive in no other.
Segments are those of ``linear_forward``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nestlearn.ops.triton.mlp_tiles import (
    SLOTS,
    Head,
    begin,
    first_layer_of_read,
    limited1,
    limited2,
    load_w1,
    load_w2,
    scratch_at,
    silu,
    store_w1,
    store_w2,
    write,
)
from nestlearn.ops.triton.scratch import fetch
from nestlearn.ops.triton.tiles import copy, load_tokens, product, store_tokens, unit


@triton.jit
def read(of, at, q, gamma, ratio, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, P: tl.constexpr):
    """The main memory's answers to q (C, D) after each token's write: through the first layer, then the last."""
    zq = first_layer_of_read(of, at, q, gamma, ratio, C, D, E, P)
    tl.debug_barrier()
    hq = silu(zq)
    scores = product(hq, tl.trans(silu(fetch(at.zk, C, E))), P) * ratio
    y = q + product(hq, tl.trans(load_w1(of.state, of, 4, D, E)), P) * gamma[:, None]
    return y + product(scores, fetch(at.r, C, D), P) + product(hq, tl.trans(load_w1(of.base, of, 4, D, E)), P)


@triton.jit
def advance(of, at, m, last, end, C: tl.constexpr, D: tl.constexpr, E: tl.constexpr, P: tl.constexpr):
    """The next state of memory m, in place of this one."""
    more2 = product(tl.trans(fetch(at.written, C, E)), fetch(at.k, C, D) * last[:, None], P)
    more1 = product(tl.trans(fetch(at.r, C, D)), silu(fetch(at.zk, C, E)) * last[:, None], P)
    s2, s1 = load_w2(of.state, of, m, D, E), load_w1(of.state, of, m, D, E)
    tl.debug_barrier()
    store_w2(of.state, of, m, s2 * end + more2, D, E)
    store_w1(of.state, of, m, s1 * end + more1, D, E)


@triton.jit(do_not_specialize=["tokens", "most_segments"])
def mlp_forward(
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
    d,
    hidden,
    chunk,
    eta_max,
    stretch,
    norm_limit,
    C: tl.constexpr,
    D: tl.constexpr,
    E: tl.constexpr,
    KEEP: tl.constexpr,
    P: tl.constexpr,
):
    """Shapes: inputs, q and y (B, H, T, d); base (H, S); states (B, H, S), S = (8 d + 2) h; bias (H, 2); scale (H, 5);
    erase (H,); clock, lengths (B,); kept (B, H, segments, S), the state at the start of every segment, written if KEEP.
    The scratch (B, H, slots, n) has room for a tile of n = C max(C, D, E) numbers in every slot."""
    n = tl.program_id(0).to(tl.int64)
    b, head = n // heads, n % heads
    size = (8 * d + 2) * hidden
    sequence = n * tokens * d
    base_ptr += head * size
    kept_ptr += n * most_segments * size
    new_current_ptr += n * size
    new_anchor_ptr += n * size
    SLOT: tl.constexpr = C * max(C, D, E)
    at = scratch_at(scratch_ptr + n * SLOTS * SLOT, SLOT)
    limit = norm_limit * norm_limit
    erase = tl.load(erase_ptr + head)
    early = (tl.load(clock_ptr + b) % chunk).to(tl.int32)  # tokens of the first chunk that an earlier piece has seen
    count = tl.load(lengths_ptr + b).to(tl.int32)
    segments = tl.where(count > 0, (early + count + chunk - 1) // chunk, 0)
    place = tl.arange(0, C)
    copy(current_ptr + n * size, new_current_ptr, size)
    copy(anchor_ptr + n * size, new_anchor_ptr, size)

    for g in range(segments):
        # What a program stores, another of its threads may load.
        tl.debug_barrier()
        moved = (g > 0) | (early == 0)
        if KEEP:
            copy(new_current_ptr, kept_ptr + tl.cast(g, tl.int64) * size, size)
        before = Head(base_ptr, new_anchor_ptr, new_current_ptr, moved, limit, d, hidden)
        if moved:  # a chunk boundary: the anchors move
            for m in range(5):
                a2, a1 = limited2(new_current_ptr, before, m, D, E), limited1(new_current_ptr, before, m, D, E)
                tl.debug_barrier()
                store_w2(new_current_ptr, before, m, a2, D, E)
                store_w2(new_anchor_ptr, before, m, a2, D, E)
                store_w1(new_current_ptr, before, m, a1, D, E)
                store_w1(new_anchor_ptr, before, m, a1, D, E)
            tl.debug_barrier()
        of = Head(base_ptr, new_anchor_ptr, new_current_ptr, False, limit, d, hidden)

        t = g * chunk - early + place
        valid = (place < chunk) & (t >= 0) & (t < count)
        xs = x_eta_ptr + sequence, x_alpha_ptr + sequence, x_k_ptr + sequence, x_v_ptr + sequence
        gate, _, table, end, fading = begin(
            of, at, xs, bias_ptr + 2 * head, erase, t, valid, eta_max, stretch, C, D, E, P
        )
        eta, _, _, _ = gate
        gamma, last, _, ratio, _ = table

        for m in range(5):
            tl.debug_barrier()
            write(of, at, m, eta * tl.load(scale_ptr + 5 * head + m), fading, C, D, E, P)
            tl.debug_barrier()
            if m == 4:
                q = unit(load_tokens(q_ptr + sequence, t, valid, d, D))[0]
                store_tokens(y_ptr + sequence, read(of, at, q, gamma, ratio, C, D, E, P), t, valid, d, D)
                tl.debug_barrier()
            advance(of, at, m, last, end, C, D, E, P)

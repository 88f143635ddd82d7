"""What the kernels of the linear memories do with those of the two gates, a row of D channels each, kept on the chip.

Names and formulas are those of ``ops.linear_adjoint``; ``d_x`` is the derivative of the loss by x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nestlearn.ops.triton.tiles import along, limit_adjoint, load_row, shrink, store_row


@triton.jit
def gate_rows(state, base, anchor, at, moved, limit, d, D: tl.constexpr):
    """A gate's state and anchor with the start (D,) in a segment, from what they were before it."""
    s = load_row(state + at, d, D)
    if moved:
        s *= shrink(tl.sum(s * s), limit)
        a = s
    else:
        a = load_row(anchor + at, d, D)
    return s, load_row(base + at, d, D) + a


@triton.jit
def written_gate(v, w, step, erased, inverted):
    """``Z`` (C,) of a gate's memory with anchor w (D,), from what is ``erased`` of it (C,)."""
    u = along(v, w)
    return along(inverted, u * tl.rsqrt(tl.maximum(u * u, 1.0)) * step - erased)


@triton.jit
def written_gate_adjoint(v, k, w, s, d_s, eta, scale, erasing, last, end, inverted):
    """A gate's memory w, s (D,), whose next state has the derivative d_s; its tokens erase and keep by factors (C,).

    Returns what is written z, derivatives by it and by u, by the step size in units of the scale (C,), by the state
    and the anchor (D,) and by the logarithm of ``end``; and what each key meets of d_s and of s (C,).
    """
    u = along(v, w)
    factor = tl.rsqrt(tl.maximum(u * u, 1.0))
    step = eta * scale
    erased, met_last = along(k, s), along(k, d_s)
    z = along(inverted, u * factor * step - erased * erasing)
    d_z = tl.sum(inverted * (met_last * last)[:, None], 0)
    d_before = d_s * end
    d_log_end = tl.sum(d_before * s)
    d_before -= tl.sum((d_z * erasing)[:, None] * k, 0)
    met = u * d_z
    d_u = d_z * step * factor - u * tl.where(factor < 1, step * met * factor * factor * factor, 0.0)
    return z, d_z, d_u, met * factor, d_before, tl.sum(d_u[:, None] * v, 0), d_log_end, met_last, erased


@triton.jit
def row_adjoint(d_w, d_state, d_base, d_new_anchor, d_anchor, kept, at, ends, moved, limit, d, D: tl.constexpr):
    """From the derivatives by a gate's anchor (D,) and by its state after the norm limit to that before the limit.

    The row is that at the same place in all of the packed states; what goes to the start and to the anchor is stored.
    """
    total = load_row(d_base + at, d, D) + d_w
    d_s = load_row(d_state + at, d, D) + d_w
    if ends:
        more = load_row(d_new_anchor + at, d, D)
        d_s += more
        d_w += more
    tl.debug_barrier()  # loaded by all threads before one stores it
    store_row(d_base + at, total, d, D)
    if moved:
        store_row(d_state + at, limit_adjoint(load_row(kept + at, d, D), d_s, limit), d, D)
    else:
        store_row(d_anchor + at, d_w, d, D)

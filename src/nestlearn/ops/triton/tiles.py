"""What all kernels share: tiles, gates, tables of a segment.

A tile holds C tokens or D channels, powers of two of at least 16, which is the least that a product takes; ``d``
channels and ``chunk`` tokens of it are in use, the rest is zero. Everything is computed in float32. P is the
precision of the products, as ``tl.dot`` names it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_block(at, rows, columns, R: tl.constexpr, K: tl.constexpr):
    """A matrix of so many rows and columns at a pointer, (R, K)."""
    i, j = tl.arange(0, R)[:, None], tl.arange(0, K)[None, :]
    return tl.load(at + i * columns + j, mask=(i < rows) & (j < columns), other=0.0).to(tl.float32)


@triton.jit
def store_block(at, block, rows, columns, R: tl.constexpr, K: tl.constexpr):
    i, j = tl.arange(0, R)[:, None], tl.arange(0, K)[None, :]
    tl.store(at + i * columns + j, block, mask=(i < rows) & (j < columns))


@triton.jit
def copy(at, to, size):
    """So many numbers from one pointer to another."""
    i = tl.arange(0, 1024)
    for begin in range(0, size, 1024):
        inside = begin + i < size
        tl.store(to + begin + i, tl.load(at + begin + i, mask=inside), mask=inside)


@triton.jit
def load_rows(at, d, D: tl.constexpr):
    """d rows of d channels at a pointer, (D, D)."""
    return load_block(at, d, d, D, D)


@triton.jit
def store_rows(at, rows, d, D: tl.constexpr):
    store_block(at, rows, d, d, D, D)


@triton.jit
def load_row(at, d, D: tl.constexpr):
    """d channels at a pointer, (D,)."""
    i = tl.arange(0, D)
    return tl.load(at + i, mask=i < d, other=0.0).to(tl.float32)


@triton.jit
def store_row(at, row, d, D: tl.constexpr):
    i = tl.arange(0, D)
    tl.store(at + i, row, mask=i < d)


@triton.jit
def load_tokens(at, t, valid, d, D: tl.constexpr):
    """Tokens ``t`` (C,) of a sequence at a pointer, (C, D); zero where ``valid`` says that one does not count."""
    i = tl.arange(0, D)
    return tl.load(at + t[:, None].to(tl.int64) * d + i[None, :], mask=valid[:, None] & (i < d)[None, :], other=0.0).to(
        tl.float32
    )


@triton.jit
def store_tokens(at, tokens, t, valid, d, D: tl.constexpr):
    i = tl.arange(0, D)
    tl.store(at + t[:, None].to(tl.int64) * d + i[None, :], tokens, mask=valid[:, None] & (i < d)[None, :])


@triton.jit
def product(a, b, P: tl.constexpr):
    """``a b``."""
    return tl.dot(a, b, input_precision=P)


@triton.jit
def along(rows, vector):
    """``rows vector``: (n, m), (m,) -> (n,)."""
    return tl.sum(rows * vector[None, :], 1)


@triton.jit
def shrink(squares, most):
    """The factor, at most 1, that brings a sum of squares down to ``most``."""
    return tl.sqrt(most / tl.maximum(squares, most))


@triton.jit
def limit_adjoint(s, d_limited, most):
    """By a state before the norm limit, from the derivative after it."""
    squares = tl.sum(s * s)
    factor = shrink(squares, most)
    return d_limited * factor - s * tl.where(
        squares > most, factor / tl.maximum(squares, most) * tl.sum(s * d_limited), 0.0
    )


@triton.jit
def unit(x):
    """``x / ||x||`` over channels as in ``ops.rule``, and the factor (C,)."""
    factor = tl.rsqrt(tl.sum(x * x, 1) + 1e-6)
    return x * factor[:, None], factor


@triton.jit
def unit_adjoint(y, factor, d_y):
    return (d_y - y * tl.sum(y * d_y, 1)[:, None]) * factor[:, None]


@triton.jit
def gates(raw_eta, raw_alpha, valid, eta_max, stretch):
    """Step sizes, logarithms of retained fractions, and their derivatives by the raw gates, (C,) each."""
    opened = tl.sigmoid(raw_eta)
    wide = (1 + 2 * stretch) * opened - stretch
    nan: tl.constexpr = tl.PropagateNan.ALL  # a comparison alone would make a number of it
    small = tl.exp(-tl.abs(raw_alpha))
    # log(1 + x), which for small x would lose what alpha lacks of 1.
    rest = tl.where(small < 1e-2, small * (1 - small * (0.5 - small / 3)), tl.log(1 + small))
    log_alpha = tl.maximum(tl.minimum(raw_alpha, 0.0, propagate_nan=nan) - rest, -60.0, propagate_nan=nan)
    alpha = tl.exp(log_alpha)
    eta = eta_max * tl.minimum(tl.maximum(wide, 0.0, propagate_nan=nan), 1.0, propagate_nan=nan) * alpha
    slope = tl.where((wide > 0) & (wide < 1), (1 + 2 * stretch) * eta_max * opened * (1 - opened) * alpha, 0.0)
    opening = tl.where(log_alpha > -60.0, tl.sigmoid(-raw_alpha), 0.0)
    return (
        tl.where(valid, eta, 0.0),
        tl.where(valid, log_alpha, 0.0),
        tl.where(valid, slope, 0.0),
        tl.where(valid, opening, 0.0),
    )


@triton.jit
def inverse(t, C: tl.constexpr):
    """``(I + t)^-1`` for t (C, C) below its diagonal, by substitution, a token at a time.

    Its products would be those of small blocks in full precision, which no tensor core does; this needs no operand but
    a column and a row.
    """
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    x = tl.where(i == j, 1.0, 0.0)
    for s in range(C):
        column = tl.sum(tl.where(j == s, t, 0.0), 1)
        row = tl.sum(tl.where(i == s, x, 0.0), 0)
        x -= column[:, None] * row[None, :]
    return x


@triton.jit
def shares(eta, log_alpha, erase, C: tl.constexpr):
    """Of ``ops.adjoint.Tables`` what needs no keys: gamma, last, strength (C,), ratio (C, C)."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    log_gamma = tl.cumsum(log_alpha, 0)
    ratio = tl.where(i >= j, tl.exp(tl.minimum(log_gamma[:, None] - log_gamma[None, :], 0.0)), 0.0)
    last = tl.exp(tl.minimum(tl.sum(log_alpha, 0) - log_gamma, 0.0))
    return tl.exp(log_gamma), last, eta * erase * tl.exp(-log_alpha), ratio


@triton.jit
def tables(k, eta, log_alpha, erase, C: tl.constexpr, P: tl.constexpr):
    """As ``ops.adjoint.Tables``: gamma, last, strength (C,); ratio, overlap, the inverse (C, C)."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    gamma, last, strength, ratio = shares(eta, log_alpha, erase, C)
    overlap = tl.where(i > j, product(k, tl.trans(k), P) * ratio, 0.0)
    return gamma, last, strength, ratio, overlap, inverse(overlap * strength[:, None], C)

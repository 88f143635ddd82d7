"""CausalAttention: the plain formula, streaming, and ragged rows."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nestlearn.errors import UserError
from nestlearn.nn import CausalAttention
from nestlearn.nn.attention import rotate


def make(dim: int = 8, heads: int = 2) -> CausalAttention:
    torch.manual_seed(0)
    return CausalAttention(dim, heads).double()


def plain(attention: CausalAttention, x: Tensor) -> Tensor:
    """Softmax attention of one row (T, D), head by head and token by token."""
    d = x.shape[1] // attention.heads
    q, k, v = (layer(x) for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
    outputs = []
    for t in range(len(x)):
        heads = []
        for h in range(attention.heads):
            part = slice(h * d, (h + 1) * d)
            turned_q = torch.stack([turn(q[t, part], t)])
            turned_k = torch.stack([turn(k[i, part], i) for i in range(t + 1)])
            weight = (turned_q @ turned_k.T / math.sqrt(d)).softmax(-1)
            heads.append((weight @ v[: t + 1, part])[0])
        outputs.append(torch.cat(heads))
    return attention.o_proj(torch.stack(outputs))


def turn(x: Tensor, position: int) -> Tensor:
    """Multiply the complex numbers (x_i, x_(i + d/2)) by exp(j position theta^(-2i/d))."""
    half = len(x) // 2
    angle = position * 10_000.0 ** (-2 * torch.arange(half, dtype=torch.float64) / len(x))
    turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag])


def test_equals_the_plain_formula() -> None:
    attention, x = make(), torch.randn(2, 7, 8, dtype=torch.float64)
    expected = torch.stack([plain(attention, row) for row in x])
    torch.testing.assert_close(attention(x)[0], expected, rtol=1e-6, atol=1e-6)  # angles are float32


def test_rotation_depends_on_the_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    at = lambda x, p: rotate(x, torch.tensor([p]), 100.0)  # noqa: E731
    torch.testing.assert_close((at(q, 9) * at(k, 4)).sum(), (at(q, 25) * at(k, 20)).sum(), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(pieces=st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_pieces_equal_one_pass(pieces: list[int]) -> None:
    attention, x = make(), torch.randn(2, sum(pieces), 8, dtype=torch.float64)
    state, outputs = None, []
    for piece in x.split(pieces, dim=1):
        y, state = attention(piece, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), attention(x)[0])
    assert state.valid is None
    assert state.keys.shape == (2, 2, sum(pieces), 4)


@settings(deadline=None, max_examples=40)
@given(counts=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=4), dense=st.booleans())
def test_ragged_pieces_equal_each_row_alone(counts: list[tuple[int, int]], dense: bool) -> None:
    attention = make()
    if dense:  # a last piece that all rows fill, passed without lengths, as in decoding
        counts = [*counts, (2, 2)]
    rows = [torch.randn(1, sum(row), 8, dtype=torch.float64) for row in zip(*counts, strict=True)]
    state, outputs, done = None, [[], []], [0, 0]
    for piece in counts:
        x = torch.randn(2, max(*piece, 1), 8, dtype=torch.float64)  # filler is noise: it must not matter
        for i, count in enumerate(piece):
            x[i, :count] = rows[i][0, done[i] : done[i] + count]
            done[i] += count
        full = all(count == x.shape[1] for count in piece)
        y, state = attention(x, state, None if full else torch.tensor(piece))
        assert y.isfinite().all()
        for i, count in enumerate(piece):
            outputs[i].append(y[i, :count])
    for i, row in enumerate(rows):
        if row.shape[1]:
            torch.testing.assert_close(torch.cat(outputs[i]), attention(row)[0][0], rtol=1e-6, atol=1e-6)


def test_state_of_selected_rows() -> None:
    attention, x = make(), torch.randn(3, 4, 8, dtype=torch.float64)
    _, state = attention(x, None, torch.tensor([4, 2, 3]))
    rows = torch.tensor([2, 0, 2])
    new = torch.randn(3, 2, 8, dtype=torch.float64)
    _, other = attention(x[rows], None, torch.tensor([3, 4, 3]))
    torch.testing.assert_close(attention(new, state.index_select(rows))[0], attention(new, other)[0])
    assert not state.detach().keys.requires_grad


@pytest.mark.parametrize(("dim", "heads"), [(8, 3), (6, 2), (8, 0)])
def test_rejects_heads_that_do_not_fit(dim: int, heads: int) -> None:
    with pytest.raises(UserError, match="even integer"):
        CausalAttention(dim, heads)

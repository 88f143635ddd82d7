"""CausalAttention: the plain formula, streaming, and ragged rows."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nestlearn.errors import UserError
from nestlearn.memory import nadaraya_watson
from nestlearn.nn import CausalAttention
from nestlearn.nn.attention import rotate


def make(dim: int = 8, heads: int = 2, window: int | None = None) -> CausalAttention:
    torch.manual_seed(0)
    return CausalAttention(dim, heads, window=window).double()


def plain(attention: CausalAttention, x: Tensor) -> Tensor:
    """Attention of one row (T, D) as Nadaraya-Watson estimates, head by head and token by token."""
    d = x.shape[1] // attention.heads
    q, k, v = (layer(x) for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
    outputs = []
    for t in range(len(x)):
        heads = []
        for h in range(attention.heads):
            part = slice(h * d, (h + 1) * d)
            turned_q = torch.stack([turn(q[t, part], t)])
            first = 0 if attention.window is None else max(0, t + 1 - attention.window)
            turned_k = torch.stack([turn(k[i, part], i) for i in range(first, t + 1)])
            similarity = (turned_k @ turned_q[0] / math.sqrt(d)).exp()
            heads.append(nadaraya_watson(similarity, v[first : t + 1, part]))
        outputs.append(torch.cat(heads))
    return attention.o_proj(torch.stack(outputs))


def turn(x: Tensor, position: int) -> Tensor:
    """Multiply the complex numbers (x_i, x_(i + d/2)) by exp(j position theta^(-2i/d))."""
    half = len(x) // 2
    angle = position * 10_000.0 ** (-2 * torch.arange(half, dtype=torch.float64) / len(x))
    turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag])


@pytest.mark.parametrize("window", [None, 1, 3, 7])
def test_equals_the_plain_formula_with_gradients(window: int | None) -> None:
    attention, x = make(window=window), torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    expected, y = torch.stack([plain(attention, row) for row in x]), attention(x)[0]
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)  # angles are float32
    leaves = [x, *attention.parameters()]
    for a, b in zip(*(torch.autograd.grad(t.square().sum(), leaves) for t in (y, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_one_similarity_for_all_gives_the_mean_value() -> None:
    attention, x = make(), torch.randn(1, 6, 8, dtype=torch.float64)
    with torch.no_grad():
        attention.q_proj.weight.zero_()
        v = attention.v_proj(x)
        mean = v.cumsum(1) / torch.arange(1, 7)[:, None]
        torch.testing.assert_close(attention(x)[0], attention.o_proj(mean))


@pytest.mark.parametrize("window", [700, 1000])
def test_a_window_that_holds_everything_is_full_attention(window: int) -> None:
    x = torch.randn(1, 700, 8, dtype=torch.float64)
    torch.testing.assert_close(make(window=window)(x)[0], make()(x)[0], rtol=1e-4, atol=1e-4)  # float32 angles


@torch.no_grad()
def test_a_long_stream_keeps_a_window() -> None:
    """Read in parts inside one call, in pieces, and with rows that end at different places."""
    attention, x = make(window=5), torch.randn(2, 900, 8, dtype=torch.float64)
    y, state = attention(x)
    assert state.keys.shape == (2, 2, 4, 4)
    torch.testing.assert_close(y[0], plain(attention, x[0]), rtol=1e-3, atol=1e-4)  # float32 angles, at position 900
    ragged, state = attention(x, None, torch.tensor([900, 301]))
    torch.testing.assert_close(ragged[1, :301], y[1, :301])
    torch.testing.assert_close(attention(x[1:, 301:310], state.index_select(torch.tensor([1])))[0], y[1:, 301:310])


def test_rotation_depends_on_the_distance_only() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    at = lambda x, p: rotate(x, torch.tensor([p]), 100.0)  # noqa: E731
    torch.testing.assert_close((at(q, 9) * at(k, 4)).sum(), (at(q, 25) * at(k, 20)).sum(), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(pieces=st.lists(st.integers(1, 5), min_size=1, max_size=5), window=st.none() | st.integers(1, 8))
def test_pieces_equal_one_pass(pieces: list[int], window: int | None) -> None:
    attention, x = make(window=window), torch.randn(2, sum(pieces), 8, dtype=torch.float64)
    state, outputs = None, []
    for piece in x.split(pieces, dim=1):
        y, state = attention(piece, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), attention(x)[0], rtol=1e-6, atol=1e-6)
    assert state.valid is None
    assert state.keys.shape == (2, 2, sum(pieces) if window is None else min(window - 1, sum(pieces)), 4)


@settings(deadline=None, max_examples=40)
@given(
    counts=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=4),
    dense=st.booleans(),
    window=st.none() | st.integers(1, 6),
)
def test_ragged_pieces_equal_each_row_alone(counts: list[tuple[int, int]], dense: bool, window: int | None) -> None:
    attention = make(window=window)
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


def test_rejects_an_empty_window() -> None:
    with pytest.raises(UserError, match="window=0: must be at least 1 token"):
        CausalAttention(8, 2, window=0)

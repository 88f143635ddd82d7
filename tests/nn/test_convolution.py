"""CausalConv: an exact stream, ragged rows, and a start near the identity."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from nestlearn.errors import UserError
from nestlearn.nn import CausalConv


def make(kernel: int, silu: bool = False, dim: int = 3) -> CausalConv:
    torch.manual_seed(0)
    conv = CausalConv(dim, kernel, silu=silu).double()
    torch.nn.init.normal_(conv.weight)
    return conv


@pytest.mark.parametrize("kernel", [1, 2, 4, 7])
def test_equals_torch_conv1d_and_its_gradients(kernel: int) -> None:
    conv = make(kernel)
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    y, _ = conv(x)
    weight = conv.weight.T[:, None]
    expected = F.conv1d(F.pad(x.transpose(1, 2), (kernel - 1, 0)), weight, groups=3).transpose(1, 2)
    torch.testing.assert_close(y, expected)
    probe = torch.randn_like(y)
    ours = torch.autograd.grad(y, (x, conv.weight), probe)
    theirs = torch.autograd.grad(expected, (x, conv.weight), probe)
    torch.testing.assert_close(ours, theirs)


@settings(deadline=None, max_examples=40)
@given(kernel=st.integers(1, 6), pieces=st.lists(st.integers(0, 5), min_size=1, max_size=6), silu=st.booleans())
def test_pieces_equal_one_pass(kernel: int, pieces: list[int], silu: bool) -> None:
    conv = make(kernel, silu)
    x = torch.randn(2, sum(pieces), 3, dtype=torch.float64)
    whole, last = conv(x)
    state, outputs = None, []
    for piece in x.split(pieces, dim=1):
        y, state = conv(piece, state)
        assert state.shape == (2, kernel - 1, 3)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole)
    torch.testing.assert_close(state, last)


@settings(deadline=None, max_examples=40)
@given(
    kernel=st.integers(1, 5),
    counts=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=4),
)
def test_ragged_pieces_equal_each_row_alone(kernel: int, counts: list[tuple[int, int]]) -> None:
    conv = make(kernel)
    rows = [torch.randn(1, sum(row), 3, dtype=torch.float64) for row in zip(*counts, strict=True)]
    alone = [conv(row) for row in rows]
    state, outputs, done = None, [[], []], [0, 0]
    for piece in counts:
        x = torch.randn(2, max(piece), 3, dtype=torch.float64)  # filler is noise: it must not matter
        for i, count in enumerate(piece):
            x[i, :count] = rows[i][0, done[i] : done[i] + count]
            done[i] += count
        y, state = conv(x, state, torch.tensor(piece))
        assert y.isfinite().all()
        for i, count in enumerate(piece):
            outputs[i].append(y[i, :count])
    for i, (expected, last) in enumerate(alone):
        torch.testing.assert_close(torch.cat(outputs[i]), expected[0])
        torch.testing.assert_close(state[i], last[0])


def test_sees_no_future() -> None:
    conv, x = make(4), torch.randn(1, 8, 3, dtype=torch.float64)
    changed = x.clone()
    changed[:, 5] += 1
    same = (conv(x)[0] == conv(changed)[0]).all(-1)[0]
    assert same.tolist() == [True] * 5 + [False] * 3


def test_starts_near_the_identity_and_can_be_it_exactly() -> None:
    torch.manual_seed(0)
    conv, x = CausalConv(64, 4), torch.randn(2, 50, 64)
    assert (conv(x)[0] - x).std() < 0.3
    torch.nn.init.zeros_(conv.weight[:-1])
    assert torch.equal(conv(x)[0], x)


def test_state_does_not_hold_the_piece() -> None:
    _, state = make(4)(torch.randn(1, 1000, 3, dtype=torch.float64))
    assert state.untyped_storage().nbytes() == 3 * 3 * 8


@pytest.mark.parametrize(("dim", "kernel"), [(0, 4), (8, 0), (8, -1)])
def test_rejects_sizes_below_one(dim: int, kernel: int) -> None:
    with pytest.raises(UserError, match="at least 1"):
        CausalConv(dim, kernel)

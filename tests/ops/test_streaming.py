"""Pieces of any size equal one pass; padded rows change nothing; the state stays bounded."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestlearn.errors import UserError
from nestlearn.ops import WriteRule, self_modify
from tests.ops.test_parity import ALL, make_inputs, make_start

structures = st.sampled_from(["linear", "mlp"])


def cut(inputs: dict, i: int, j: int) -> dict:
    return {name: t[:, :, i:j] for name, t in inputs.items()}


@given(
    structure=structures,
    cuts=st.lists(st.integers(0, 20), max_size=5),
    chunk=st.integers(1, 9),
    other=st.none() | st.integers(1, 9),
    momentum=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_pieces_equal_one_pass(structure, cuts, chunk, other, momentum) -> None:
    start = make_start(structure, ALL, momentum=momentum)
    rule = WriteRule(chunk_size=chunk, chunk_size_other=other, norm_limit=0.5)
    x = make_inputs(2, 20, ALL)
    whole, end = self_modify(x, start, rule)
    state, outputs = None, []
    edges = sorted({0, *cuts, 20})
    for i, j in pairwise(edges):
        y, state = self_modify(cut(x, i, j), start, rule, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 2), whole, rtol=1e-9, atol=1e-12)
    for ours, theirs in zip((*state.current, *state.momentum), (*end.current, *end.momentum), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@given(
    structure=structures,
    lengths=st.tuples(st.integers(0, 11), st.integers(0, 11)),
    other=st.none() | st.integers(1, 5),
    momentum=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_a_padded_row_equals_the_row_alone_and_goes_on_equally(structure, lengths, other, momentum) -> None:
    start = make_start(structure, ALL, momentum=momentum)
    rule = WriteRule(chunk_size=4, chunk_size_other=other, norm_limit=0.5)
    x = make_inputs(2, 11, ALL)
    more = make_inputs(2, 7, ALL, seed=5)
    y, state = self_modify(x, start, rule, lengths=torch.tensor(lengths))
    y_more, _ = self_modify(more, start, rule, state)
    for row, n in enumerate(lengths):
        y1, state1 = self_modify({name: t[row : row + 1, :, :n] for name, t in x.items()}, start, rule)
        y2, _ = self_modify({name: t[row : row + 1] for name, t in more.items()}, start, rule, state1)
        torch.testing.assert_close(y[row : row + 1, :, :n], y1, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(y_more[row : row + 1], y2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("structure", ["linear", "mlp"])
def test_future_tokens_have_no_influence(structure) -> None:
    start = make_start(structure, ALL)
    x = make_inputs(1, 20, ALL)
    changed = {name: t.clone() for name, t in x.items()}
    for t in changed.values():
        t[:, :, 13:] += 1
    rule = WriteRule(chunk_size=8, chunk_size_other=3)
    y, z = (self_modify(t, start, rule)[0] for t in (x, changed))
    assert torch.equal(y[:, :, :13], z[:, :, :13])
    assert not torch.allclose(y[:, :, 13:], z[:, :, 13:])


def test_state_rows_are_selected_and_repeated() -> None:
    start = make_start("linear", ALL)
    x = make_inputs(3, 6, ALL)
    rule = WriteRule(chunk_size=4)
    _, state = self_modify(x, start, rule)
    rows = torch.tensor([2, 0, 2])
    y, _ = self_modify({n: t[rows] for n, t in x.items()}, start, rule, state.index_select(rows))
    z, _ = self_modify(x, start, rule, state)
    torch.testing.assert_close(y, z[rows])


def test_a_state_of_another_batch_is_refused() -> None:
    start = make_start("linear", ALL)
    x = make_inputs(2, 6, ALL)
    _, state = self_modify(x, start, WriteRule())
    with pytest.raises(UserError, match="2 sequences, the input 1"):
        self_modify({n: t[:1] for n, t in x.items()}, start, WriteRule(), state)

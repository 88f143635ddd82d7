"""Levels that learn along a sequence from their local objective: the layer against the token-by-token oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nestlearn.nn import ContinuumMemory, LevelUpdate
from nestlearn.nn.continuum.reference import along

DIM = 6
RULES = ["sgd", "dgd", "delta-momentum", "m3"]


def make(rule: str | list[str] = "sgd", sizes: tuple[int, ...] = (2, 4, 8), lr: float = 0.3, **options: Any) -> Any:
    torch.manual_seed(0)
    limits = {name: options.pop(name) for name in ("reduction", "clip", "norm_limit") if name in options}
    rules = rule if isinstance(rule, list) else [rule] * len(sizes)
    update = [LevelUpdate(name, lr, **limits) for name in rules]
    options = {"hidden": 4 * len(sizes), "online": "local", **options}
    memory = ContinuumMemory(DIM, sizes, update=update, **options).double()
    for level in memory.levels:  # a fresh level has values of zero
        torch.nn.init.normal_(level.value, std=0.5)
        torch.nn.init.normal_(level.log_rate, std=0.1)
    return memory


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(state: Any) -> list[Tensor]:
    return [w for level in state.levels for w in level.weights]


@pytest.mark.parametrize("variant", ["sequential", "nested", "independent"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("activation", "objective"), [("swiglu", "dot"), ("mlp", "l2")])
def test_outputs_states_and_gradients_are_the_oracles(variant: str, rule: str, activation: str, objective: str) -> None:
    memory = make(rule, variant=variant, activation=activation, objective=objective)
    x = draw(2, 19, DIM)
    y, state = memory(x)
    rows = [along(memory, row) for row in x]
    expected = torch.stack([row[0] for row in rows])
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
    for b, (_, finals) in enumerate(rows):
        for ours, theirs in zip(state.levels, finals, strict=True):
            for w, w0 in zip(ours.weights, theirs, strict=True):
                torch.testing.assert_close(w[b], w0, rtol=1e-9, atol=1e-10)
    probe = draw(*y.shape, seed=1)
    inputs = list(memory.parameters())
    ours = torch.autograd.grad((y * probe).sum(), inputs)
    theirs = torch.autograd.grad((expected * probe).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)


@given(
    cuts=st.lists(st.integers(0, 23), max_size=6),
    variant=st.sampled_from(["sequential", "nested", "independent"]),
    rule=st.sampled_from(RULES),
)
@settings(max_examples=25, deadline=None)
def test_pieces_of_any_size_equal_one_pass(cuts: list[int], variant: str, rule: str) -> None:
    memory, x = make(rule, variant=variant), draw(2, 23, DIM)
    with torch.no_grad():
        whole, last = memory(x)
        state, parts = None, []
        for i, j in zip([0, *sorted(cuts)], [*sorted(cuts), 23], strict=True):
            y, state = memory(x[:, i:j], state)
            parts.append(y)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-9, atol=1e-10)
    for a, b in zip(weights(state), weights(last), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@given(
    lengths=st.lists(st.integers(0, 11), min_size=3, max_size=3),
    again=st.lists(st.integers(0, 11), min_size=3, max_size=3),
    variant=st.sampled_from(["sequential", "nested", "independent"]),
    rule=st.sampled_from(RULES),
)
@settings(max_examples=25, deadline=None)
def test_rows_of_unequal_length_are_rows_alone(lengths: list[int], again: list[int], variant: str, rule: str) -> None:
    memory, x = make(rule, variant=variant), draw(2, 3, 11, DIM)
    with torch.no_grad():
        first, state = memory(x[0], lengths=torch.tensor(lengths))
        second, state = memory(x[1], state, torch.tensor(again))
        for b, (n, m) in enumerate(zip(lengths, again, strict=True)):
            row = torch.cat([x[0, b, :n], x[1, b, :m]])[None]
            if not n + m:
                continue
            alone, last = memory(row)
            ours = torch.cat([first[b, :n], second[b, :m]])
            torch.testing.assert_close(ours, alone[0], rtol=1e-9, atol=1e-10)
            for a, w in zip(weights(state), weights(last), strict=True):
                torch.testing.assert_close(
                    a[b] if a.ndim == 3 else a, w[0] if w.ndim == 3 else w, rtol=1e-9, atol=1e-10
                )


def test_index_select_moves_rows() -> None:
    memory, x = make("m3", variant="nested"), draw(3, 13, DIM)
    with torch.no_grad():
        _, state = memory(x[:, :9])
        rows = torch.tensor([2, 0])
        expected = memory(x[:, 9:], state)[0][rows]
        got, _ = memory(x[rows, 9:], state.index_select(rows))
    torch.testing.assert_close(got, expected)


def test_each_level_is_updated_at_its_own_chunk_ends_and_only_there() -> None:
    memory, x = make(), draw(1, 24, DIM)
    changes = [0, 0, 0]
    state = memory.begin(1)
    with torch.no_grad():
        for t in range(24):
            before = state.levels
            _, state = memory(x[:, t : t + 1], state)
            for i, (a, b) in enumerate(zip(before, state.levels, strict=True)):
                changed = not torch.equal(*torch.broadcast_tensors(a.weights[0], b.weights[0]))
                assert changed <= ((t + 1) % memory.levels[i].chunk_size == 0)
                changes[i] += changed
    assert changes == [12, 6, 3]


def test_no_future_token_has_influence() -> None:
    memory, x = make("m3", variant="nested"), draw(1, 21, DIM)
    changed = x.clone()
    changed[:, 13:] = draw(1, 8, DIM, seed=5)
    assert torch.equal(memory(x)[0][:, :13], memory(changed)[0][:, :13])
    assert not torch.equal(memory(x)[0][:, 16:], memory(changed)[0][:, 16:])


def test_a_rate_of_zero_is_the_frozen_chain() -> None:
    memory, x = make(lr=0.0), draw(2, 21, DIM)
    expected = x
    for level in memory.levels:
        expected = expected + level(expected)
    torch.testing.assert_close(memory(x)[0], expected)


def test_nested_with_equal_chunks_begins_again_at_every_update() -> None:
    """With equal sizes every update of the fast level is followed by the parent's: its weights are its start."""
    memory = make(sizes=(4, 4), variant="nested")
    _, state = memory(draw(1, 12, DIM))
    assert all(torch.equal(w, s) for w, s in zip(state.levels[0].weights, state.levels[0].start, strict=True))
    assert not torch.equal(state.levels[0].weights[0][0], memory.levels[0].weights[0])


def test_nested_start_takes_the_parents_rule_and_rate() -> None:
    memory = make(["sgd", "sgd"], sizes=(2, 4), variant="nested", clip=None, norm_limit=None)
    x = draw(1, 4, DIM)
    _, before = memory(x[:, :3])
    _, after = memory(x)
    fast, slow = memory.levels
    assert before.levels[0].start[0].ndim == 2  # not yet touched
    # The error of tokens 1-2 was taken at the start, that of 3-4 after the first update; the parent sums both.
    alone = make(["sgd", "sgd"], sizes=(2, 4), variant="sequential", clip=None, norm_limit=None)
    alone.load_state_dict(memory.state_dict())
    _, sequential = alone(x)
    moved = (fast.weights[0] - sequential.levels[0].weights[0][0]) / fast.rate
    torch.testing.assert_close(after.levels[0].start[0][0], fast.weights[0] - slow.rate * moved)


def test_the_outer_loss_can_teach_a_fresh_level_to_write() -> None:
    """Values start at zero, where a dot product writes nothing; their gradient does not."""
    torch.manual_seed(0)
    memory = ContinuumMemory(DIM, [2], hidden=4, online="local", objective="dot").double()
    y, _ = memory(draw(1, 8, DIM))
    static = ContinuumMemory(DIM, [2], hidden=4).double()
    static.load_state_dict(memory.state_dict(), strict=False)
    torch.testing.assert_close(y, static(draw(1, 8, DIM))[0])
    (gradient,) = torch.autograd.grad((y * draw(*y.shape, seed=3)).sum(), memory.levels[0].value)
    assert gradient.abs().max() > 1e-4


def test_meta_learned_starts_learn_a_sequence_faster() -> None:
    """Eq. 73: training through the updates lowers the loss after the first updates below that before them."""
    torch.manual_seed(0)
    memory = ContinuumMemory(8, [4], hidden=16, activation="mlp", online="local", update=LevelUpdate(lr=1.0, clip=None))
    optimizer = torch.optim.Adam(memory.parameters(), lr=0.02)

    def loss(seed: int) -> Tensor:
        """Cyclic sequences of random vectors: after one period the next vector can be known."""
        generator = torch.Generator().manual_seed(seed)
        cycle = torch.randn(16, 4, 8, generator=generator)
        x = cycle.repeat(1, 4, 1)
        y, _ = memory(x)
        return (y[:, :-1] - x[:, 1:]).square().mean((0, 2))

    for step in range(150):
        optimizer.zero_grad()
        loss(step).mean().backward()
        optimizer.step()
    with torch.no_grad():
        late = loss(10_000)
    assert late[8:].mean() < 0.6 * late[:4].mean()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("objective", ["dot", "l2"])
def test_bounded_on_a_long_stream_of_large_inputs(rule: str, objective: str) -> None:
    memory = make(rule, lr=3.0, objective=objective).float()
    with torch.no_grad():
        y, state = memory(100 * draw(1, 4000, DIM).float())
    assert y.isfinite().all()
    for level, at in zip(memory.levels, state.levels, strict=True):
        for w0, w in zip(level.weights, at.weights, strict=True):
            assert (w - w0).norm() <= 1.001 * w0.norm()


def test_state_stays_in_float32_under_bfloat16() -> None:
    memory = make(variant="nested").to(torch.bfloat16)
    y, state = memory(draw(1, 9, DIM).to(torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert {w.dtype for w in weights(state)} == {torch.float32}
    full = make(variant="nested").float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, state = full(draw(1, 9, DIM).float())
    assert {w.dtype for w in weights(state)} == {torch.float32}


def test_detach_cuts_every_tensor() -> None:
    memory = make("m3", variant="nested")
    _, state = memory(draw(1, 7, DIM))
    for level in state.detach().levels:
        tensors = [*level.weights, *level.error, *level.start, *level.start_error, level.last]
        tensors += [t for s in (*level.slots, *level.start_slots) for t in s]
        assert not any(t.requires_grad for t in tensors)

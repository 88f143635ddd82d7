"""The self-referential Titans layer: streaming, ablation switches, gradients, boundedness."""

from __future__ import annotations

import pytest
import torch

from nestlearn.errors import UserError
from nestlearn.nn.titans import SelfReferentialTitans

SWITCHES = [
    {},
    {"memory": "mlp"},
    {"memory": "mlp", "memory_hidden": 6, "momentum": True},
    {"momentum": True},
    {"delta": False},
    {"decay": False},
    {"inner_k": False},
    {"inner_v": False},
    {"inner_q": True},
    {"inner_gates": False},
    {"inner_k": False, "inner_v": False, "inner_gates": False},
    {"self_values": False},
    {"shared_input": True},
    {"shared_input": True, "inner_q": True},
    {"write_scale": None},
    {"retention": "zero", "bounded": False, "normalize_v": False, "clip_values": False, "norm_limit": None},
    {"read": "anchor"},
    {"objective": "l2", "eta_max": 0.5},
    {"chunk_size_other": 2},
    {"conv_size": 1, "gate": False},
]


def layer(**changes: object) -> SelfReferentialTitans:
    torch.manual_seed(0)
    return SelfReferentialTitans(**{"dim": 8, "heads": 2, "chunk_size": 4, **changes})


@pytest.mark.parametrize("changes", SWITCHES, ids=str)
def test_streams_and_sends_a_gradient_to_every_parameter(changes: dict) -> None:
    titans = layer(**changes)
    x = torch.randn(2, 13, 8)
    y, _ = titans(x)
    a, state = titans(x[:, :5])
    b, state = titans(x[:, 5:6], state)
    c, _ = titans(x[:, 6:], state)
    torch.testing.assert_close(torch.cat([a, b, c], 1), y, rtol=1e-4, atol=1e-5)
    y[:, 8:].square().sum().backward()
    for name, parameter in titans.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_switched_off_parts_have_no_parameters() -> None:
    static = layer(inner_k=False, inner_v=False, inner_gates=False)
    assert sorted(static.start) == ["memory"]
    assert sorted(static.project) == ["alpha", "eta", "k", "q", "v"]
    assert sorted(layer().project) == ["k", "q", "v"]
    assert sorted(layer(shared_input=True).project) == ["k", "q"]
    assert layer().momentum is None
    assert not list(layer(write_scale=None).write_scale)


def test_a_switch_changes_the_output() -> None:
    x = torch.randn(1, 12, 8)
    reference = layer()(x)[0]
    for changes in ({"delta": False}, {"decay": False}, {"self_values": False}, {"read": "anchor"}):
        assert not torch.allclose(layer(**changes)(x)[0], reference), changes


def test_padding_changes_nothing() -> None:
    titans = layer()
    x = torch.randn(2, 9, 8)
    y, state = titans(x, lengths=torch.tensor([9, 4]))
    alone, alone_state = titans(x[1:, :4])
    torch.testing.assert_close(y[1:, :4], alone)
    more = torch.randn(1, 3, 8)
    torch.testing.assert_close(titans(more, state.index_select(torch.tensor([1])))[0], titans(more, alone_state)[0])


def test_states_stay_float32_under_bfloat16_autocast() -> None:
    titans = layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = titans(torch.randn(1, 6, 8))
    assert y.dtype == torch.bfloat16
    assert {t.dtype for t in state.core.current} == {torch.float32}
    _, state = titans.bfloat16()(torch.randn(1, 6, 8, dtype=torch.bfloat16))
    assert {t.dtype for t in state.core.current} == {torch.float32}


def test_equal_seeds_give_equal_bits() -> None:
    x = torch.randn(1, 9, 8)
    assert torch.equal(layer()(x)[0], layer()(x)[0])


@pytest.mark.parametrize("memory", ["linear", "mlp"])
@torch.no_grad()
def test_200k_tokens_leave_the_state_finite_and_bounded(memory: str) -> None:
    """One row reads random tokens, the other copies of one token, at default settings; weights three times
    their initial size stand for a layer that training has made bold."""
    for scale in (1.0, 3.0):
        titans = SelfReferentialTitans(8, 2, 64, memory=memory)
        for parameter in titans.parameters():
            parameter.mul_(scale)
        copy = torch.randn(1, 1, 8)
        state = None
        norms = []
        for _ in range(10):
            x = torch.cat([torch.randn(1, 20_000, 8), copy.expand(1, 20_000, 8)])
            y, state = titans(x, state)
            assert y.isfinite().all()
            norms.append(torch.stack([t.flatten(1).norm(dim=1) for t in state.core.current]).amax(0))
        # Ten matrices of width 4 held to 2 sqrt(4) at their chunk boundaries have a norm of at most 13; within a
        # chunk a state overshoots by what one chunk writes (measured: 34).
        assert torch.stack(norms).max() < 100


def test_mistakes_get_one_clear_line() -> None:
    for changes, message in [
        ({"heads": 3}, "heads=3 must divide dim=8"),
        ({"memory": "linaer"}, "did you mean 'linear'"),
        ({"write_scale": 2.0}, "between 0 and 1"),
        ({"retained": (0.5, 1.0)}, "between 0 and 1"),
        ({"retained": (0.5,)}, "two fractions"),
        ({"eta_max": float("nan")}, "must be positive"),
        ({"chunk_size": 0}, "positive number of tokens"),
        ({"objective": "dott"}, "did you mean 'dot'"),
        ({"eta_max": -1.0}, "must be positive"),
        ({"eta_max": 0.0}, "must be positive"),
        ({"memory": "mlp", "memory_hidden": 0}, "at least 1"),
        ({"norm_limit": 0.0}, "must be positive"),
    ]:
        with pytest.raises(UserError, match=message):
            layer(**changes)


def test_inputs_and_states_of_another_shape_are_refused() -> None:
    titans = layer()
    x = torch.randn(2, 5, 8)
    _, state = titans(x)
    with pytest.raises(UserError, match=r"must be \(batch, tokens, 8\)"):
        titans(x[0])
    with pytest.raises(UserError, match="2 sequences, the input 1"):
        titans(x[:1], state)
    with pytest.raises(UserError, match="momentum"):
        layer(momentum=True)(x, state)
    with pytest.raises(UserError, match="use a state of this core"):
        layer(inner_q=True)(x, state)


def test_empty_pieces_change_nothing() -> None:
    titans = layer()
    y, state = titans(torch.randn(2, 5, 8))
    empty, same = titans(torch.randn(2, 0, 8), state)
    assert empty.shape == (2, 0, 8)
    assert torch.equal(same.core.current[0], state.core.current[0])
    assert titans(torch.randn(0, 5, 8))[0].shape == (0, 5, 8)
    assert y.shape == (2, 5, 8)

"""The self-referential Titans layer: streaming, ablation switches, gradients, boundedness."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from nestlearn.errors import UserError
from nestlearn.nn import CausalAttention, ContinuumMemory, MemoryLayer, step_sizes
from nestlearn.nn.titans import SelfReferentialTitans
from nestlearn.ops.rule import gates

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
    {"accumulators": 0},
    {"heads": 4, "accumulators": 2, "momentum": True},
    {"heads": 4, "accumulators": 2, "delta": False},
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


@pytest.mark.parametrize(
    ("memory", "accumulators", "most", "inside"),
    [("linear", 0, 13, 100), ("linear", 1, 13_000, 13_000), ("mlp", 0, 13, 1000)],
)
@torch.no_grad()
def test_200k_tokens_leave_the_state_finite_and_bounded(
    memory: str, accumulators: int, most: float, inside: float
) -> None:
    """One row reads random tokens, the other copies of one token, at default settings; weights three times
    their initial size stand for a layer that training has made bold."""
    torch.manual_seed(0)
    for scale in (1.0, 3.0):
        titans = SelfReferentialTitans(8, 2, 64, memory=memory, accumulators=accumulators)
        for parameter in titans.parameters():
            parameter.mul_(scale)
        copy = torch.randn(1, 1, 8)
        state = None
        norms, anchors = [], []
        for _ in range(10):
            x = torch.cat([torch.randn(1, 20_000, 8), copy.expand(1, 20_000, 8)])
            y, state = titans(x, state)
            assert y.isfinite().all()
            norms.append(torch.stack([t.flatten(1).norm(dim=1) for t in state.core.current]).amax(0))
            anchors.append(torch.stack([t.flatten(1).norm(dim=1) for t in state.core.anchor]).amax(0))
        # Ten matrices of width 4 held to 2 sqrt(4) at their chunk boundaries have a norm of at most 13. Heads that
        # accumulate have a thousand times the limit.
        assert torch.stack(anchors).max() <= most
        # Within a chunk a state overshoots by what one chunk writes, 0.1 |e| |h| a token for MLP memories: tripled
        # weights come to 200 with some seeds.
        assert torch.stack(norms).max() < inside


@torch.no_grad()
def test_the_head_beside_accumulators_keeps_a_period() -> None:
    """Of one symbol again and again it holds two things in turn, which stay apart."""
    titans = layer(heads=4, accumulators=2, conv_size=1, chunk_size=4)
    for name in ("eta", "alpha"):  # gates at their biases
        titans.start[name][0].zero_()
        titans.write_scale[name].fill_(-40.0)
    x = torch.randn(8).expand(1, 400, 8)
    memories = [titans(x[:, :tokens])[1].core.current[0][0, 1, -titans.width :] for tokens in (1, 2, 300, 301)]
    early, late = (memories[1] - memories[0]).norm(), (memories[3] - memories[2]).norm()
    assert late > 0.25 * early > 0


@torch.no_grad()
def test_the_head_beside_accumulators_can_learn_to_hold_still() -> None:
    """Its step sizes are near two and not cut, else they would have no slope."""
    titans = layer(heads=4, accumulators=2)
    eta, _ = gates(torch.zeros(1, 4, 1), torch.zeros(1, 4, 1), titans.initial(), titans.rule)
    assert 1.99 < eta[0, 1] / titans.initial().bias["alpha"][1].sigmoid() < 2


@torch.no_grad()
def test_an_accumulator_counts_where_an_erasing_head_forgets() -> None:
    """The sum of what was written, however long the text: a thousand a, then a thousand b of opposite value."""
    titans = layer(heads=1, accumulators=1, conv_size=1, chunk_size=16, gate=False)
    titans.bias["alpha"].fill_(40.0)
    titans.erase.fill_(-40.0)
    titans.start["eta"][0].zero_()
    titans.bias["eta"].zero_()  # steps of 1
    for scale in titans.write_scale.values():
        scale.fill_(-40.0)
    d = titans.width
    for name in ("q", "k"):  # one key and query for every token, from a channel that is always 1
        titans.project[name].weight.zero_()
        titans.project[name].weight[0, 0] = 1.0
    titans.project["v"].weight.zero_()
    titans.project["v"].weight[1, 1] = 1.0
    x = torch.zeros(1, 2000, d)
    x[..., 0] = 1.0
    x[:, :1000, 1], x[:, 1000:, 1] = 1.0, -1.0
    _, state = titans(x[:, :1000])
    memory = state.core.current[0][0, 0, -d:]
    torch.testing.assert_close(memory[1, 0].item(), 1000.0, rtol=1e-3, atol=0)
    _, state = titans(x[:, 1000:], state)
    assert state.core.current[0][0, 0, -d:].abs().max() < 0.1


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
        ({"accumulators": 3}, "from 0 to 2"),
        ({"memory": "mlp", "accumulators": 1}, "MLP memories have none"),
    ]:
        with pytest.raises(UserError, match=message):
            layer(**changes)


def test_momentum_writes_as_much_as_without_it_and_in_full_as_printed() -> None:
    titans = layer(momentum=True)
    torch.nn.init.constant_(titans.momentum, 2.0)
    start, plain = titans.initial(), layer().initial()
    for name in start.names:
        without = plain.write_scale.get(name, torch.ones(2))
        torch.testing.assert_close(start.write_scale[name] / (1 - start.momentum), without)
    assert layer(momentum=True, write_scale=None).initial().write_scale == {}


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


@pytest.mark.parametrize("memory", ["linear", "mlp"])
def test_torch_func_takes_gradients_of_each_sequence_and_derivatives_along_a_direction(memory: str) -> None:
    titans = layer(memory=memory, norm_limit=0.02).double()  # a limit that is reached
    x = torch.randn(3, 11, 8, dtype=torch.float64)
    at = {name: p.detach() for name, p in titans.named_parameters()}

    def loss(parameters: dict[str, torch.Tensor], sequence: torch.Tensor) -> torch.Tensor:
        return functional_call(titans, parameters, (sequence[None],))[0].square().sum()

    by_sequence = vmap(grad(loss), in_dims=(None, 0))(at, x)
    for row, sequence in enumerate(x):
        titans.zero_grad()
        titans(sequence[None])[0].square().sum().backward()
        for name, p in titans.named_parameters():
            assert torch.allclose(by_sequence[name][row], p.grad, rtol=1e-9, atol=1e-12), name
    along = {name: torch.randn_like(p) for name, p in at.items()}
    _, slope = jvp(lambda parameters: loss(parameters, x[-1]), (at,), (along,))
    expected = sum((p.grad * along[name]).sum() for name, p in titans.named_parameters())
    assert slope.item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize("memory", ["linear", "mlp"])
def test_no_rows_and_a_backward_pass_inside_autocast(memory: str) -> None:
    layer = SelfReferentialTitans(16, heads=2, chunk_size=4, memory=memory)
    empty = torch.zeros(0, 5, 16, requires_grad=True)
    layer(empty)[0].sum().backward()
    assert empty.grad.shape == empty.shape
    x = torch.randn(2, 9, 16)
    outside, inside = copy.deepcopy(layer), copy.deepcopy(layer)
    with torch.autocast("cpu", torch.bfloat16):
        loss = outside(x)[0].float().square().sum()
    loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        inside(x)[0].float().square().sum().backward()
    for name, p in inside.start.named_parameters():  # what the core alone has made
        torch.testing.assert_close(p.grad, outside.start.get_parameter(name).grad, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("lengths", [[6, 1], [-1, 0], [1], [1.0, 2.0]])
@pytest.mark.parametrize("conv_size", [1, 4])
def test_lengths_that_do_not_fit_are_refused(lengths: list, conv_size: int) -> None:
    x = torch.randn(2, 5, 16)
    given = torch.tensor(lengths)
    layers = [SelfReferentialTitans(16, 2, 4, conv_size=conv_size), CausalAttention(16, 2), ContinuumMemory(16, [4])]
    for layer in layers:
        with pytest.raises(UserError, match="give one whole number from 0 to 5 for each of 2 rows"):
            layer(x, None, given)
    for layer in layers[:2]:
        with pytest.raises(UserError, match="the state is a str: give what an earlier call returned"):
            layer(x, "state")


@pytest.mark.parametrize("layer", [SelfReferentialTitans(16, 2, 4, stretch=0.1), MemoryLayer(16, 2, design="deltanet")])
def test_step_sizes_are_told_inside_and_do_not_change_the_output(layer: nn.Module) -> None:
    x, lengths = torch.randn(2, 9, 16), torch.tensor([9, 5])
    plain, state = layer(x, None, lengths)
    with step_sizes(nn.Sequential(layer)) as steps:
        told, _ = layer(x, None, lengths)
        layer(torch.randn(2, 1, 16), state)  # a token by itself too
    assert torch.equal(told, plain)
    assert [tuple(eta.shape) for eta in steps] == [(2, 2, 9), (2, 2, 1)]
    assert (steps[0][1, :, 5:] == 0).all()
    assert (steps[0][0] > 0).any()
    gate = layer.bias["eta"]
    assert torch.autograd.grad(steps[0].mean(), gate)[0].abs().sum() > 0
    layer(x)
    assert len(steps) == 2

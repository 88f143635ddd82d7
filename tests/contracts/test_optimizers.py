"""One suite over every optimizer: what `torch.optim` users rely on, and what this package promises besides."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from nestlearn import optim
from nestlearn.errors import UserError
from tests.contracts.optimizer_cases import EVERY, FORGETTING, PARAMS, Small, batches, equal, steps

# Convergence


@pytest.mark.parametrize("name", EVERY)
def test_convex_problem(name):
    """Least squares with an answer; the learning rate falls to zero, so every rule must come close to its minimum.

    That of the rules that forget what they answer is the minimum of the loss and 1/2 ||W x||^2 (Eq. 57).
    """
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    y = x @ torch.randn(6, 4) * 0.3
    model = nn.Sequential(nn.Linear(6, 4))
    (constructor, lr), total = EVERY[name], 400
    optimizer = constructor(model, lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)

    def own_loss():
        forgetting = (x @ model[0].weight.mT).square().sum(-1).mean() / 2 if name in FORGETTING else 0.0
        return nn.functional.mse_loss(model(x), y) + forgetting

    (first,) = torch.autograd.grad(own_loss(), model[0].weight)
    for _ in range(total):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        schedule.step()
    (last,) = torch.autograd.grad(own_loss(), model[0].weight)
    assert last.norm() < 0.05 * first.norm()


@pytest.mark.parametrize("name", EVERY)
def test_real_text(name):
    """Below guessing; the rules that forget what they answer shrink the logits on purpose and learn far less."""
    model, data = Small(), batches(150)
    constructor, lr = EVERY[name]
    optimizer = constructor(model, lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 150)
    for batch in data:
        optimizer.zero_grad()
        model.loss(batch).backward()
        optimizer.step()
        schedule.step()
    held_out = batches(8, seed=1)
    with torch.no_grad():
        loss = sum(model.loss(batch) for batch in held_out) / len(held_out)
    assert loss < (0.97 if name in FORGETTING else 0.8) * math.log(128)


# Precision and state


def test_half_precision_weights_have_float32_memories(make):
    model = Small(dtype=torch.bfloat16)
    optimizer = make(model)
    start = copy.deepcopy(model)
    steps(model, optimizer, batches(3))
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in model.parameters())
    assert not equal(model, start)
    other = make(copy.deepcopy(model))
    other.load_state_dict(optimizer.state_dict())
    for kept in (optimizer, other):
        tensors = [v for state in kept.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
        assert all(t.dtype == torch.float32 for t in tensors)


def test_double_precision_weights_have_double_memories(make):
    model = Small(dtype=torch.float64)
    optimizer = make(model)
    steps(model, optimizer, batches(2))
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert all(t.dtype == torch.float64 for t in tensors if t.ndim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_round_trip_in_mid_run_is_bit_exact(make, dtype):
    model, data = Small(dtype=dtype), batches(9)
    optimizer = make(model)
    steps(model, optimizer, data[:4])
    twin = copy.deepcopy(model)
    saved = copy.deepcopy(optimizer.state_dict())
    steps(model, optimizer, data[4:])
    resumed = make(twin, lr=123.0)  # the saved learning rate counts
    resumed.load_state_dict(saved)
    before = copy.deepcopy(saved)
    steps(twin, resumed, data[4:])
    assert equal(model, twin)
    for index, state in before["state"].items():  # loading does not tie the optimizer to what was loaded
        for key, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(saved["state"][index][key]))


def test_state_is_tensors_and_plain_values(make):
    optimizer = make(Small())
    state = optimizer.state_dict()
    assert all(isinstance(v, torch.Tensor) for entry in state["state"].values() for v in entry.values())
    plain = (int, float, str, bool, type(None), tuple, list)
    for group in state["param_groups"]:
        assert all(isinstance(v, plain) for v in group.values())


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])  # noqa: S301
def test_a_copy_of_model_and_optimizer_goes_on_alike(make, how):
    model, data = Small(), batches(6)
    optimizer = make(model)
    steps(model, optimizer, data[:3])
    twin, copied = how((model, optimizer))
    for m, o in ((model, optimizer), (twin, copied)):
        steps(m, o, data[3:])
    assert equal(model, twin)


def test_distributed_checkpoint_sees_the_state_before_the_first_step(make):
    model = Small()
    optimizer = make(model)
    state = get_optimizer_state_dict(model, optimizer)
    steps(model, optimizer, batches(2))
    other = make(model)
    set_optimizer_state_dict(model, other, get_optimizer_state_dict(model, optimizer))
    for p, entry in optimizer.state.items():
        for key, value in entry.items():
            assert torch.equal(value, other.state[p][key])
    assert set(state) == {"state", "param_groups"}


# Parameters and gradients of every kind


def test_parameters_without_gradient_stay(make):
    model = Small()
    optimizer, start = make(model), copy.deepcopy(model)
    for batch in batches(2):
        optimizer.zero_grad()
        model.loss(batch).backward()
        model.hidden.weight.grad = None
        model.head.bias.grad = None
        optimizer.step()
    assert torch.equal(model.hidden.weight, start.hidden.weight)
    assert torch.equal(model.head.bias, start.head.bias)
    assert not torch.equal(model.head.weight, start.head.weight)


def test_no_gradient_at_all_is_no_step(make):
    model = Small()
    optimizer, start = make(model), copy.deepcopy(model)
    optimizer.step()
    assert equal(model, start)


def test_sparse_gradients_are_read_as_dense_ones(make):
    ends = []
    for sparse in (False, True):
        model = Small()
        model.table.sparse = sparse
        steps(model, make(model), batches(3))
        ends.append(model)
    for a, b in zip(ends[0].parameters(), ends[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)])
def test_empty_parameters(make, shape):
    model = nn.Sequential(nn.Linear(3, 3))
    model.register_parameter("empty", nn.Parameter(torch.zeros(shape)))
    optimizer = make(model)
    (model(torch.ones(2, 3)).sum() + model.empty.sum()).backward()
    optimizer.step()
    assert model.empty.shape == shape


def test_one_number(make):
    model = nn.Sequential(nn.Linear(3, 3))
    model.register_parameter("scale", nn.Parameter(torch.tensor(2.0)))
    optimizer = make(model)
    (model(torch.ones(2, 3)).sum() * model.scale).backward()
    optimizer.step()
    assert model.scale.shape == ()
    assert model.scale.isfinite()
    assert model.scale != 2.0


@pytest.mark.parametrize("name", PARAMS)
def test_memory_layout_does_not_matter(name):
    constructor, lr = PARAMS[name]
    ends = []
    for layout in ("plain", "transposed"):
        torch.manual_seed(0)
        holder, w = nn.Module(), torch.randn(5, 7)
        holder.weight = nn.Parameter(w if layout == "plain" else w.t().contiguous().t())
        kernel = torch.randn(4, 3, 2, 2)
        holder.kernel = nn.Parameter(kernel if layout == "plain" else kernel.to(memory_format=torch.channels_last))
        optimizer = constructor(holder, lr)
        for _ in range(4):
            for p in holder.parameters():
                g = torch.randn(p.shape)
                p.grad = g if layout == "plain" else g.transpose(0, 1).contiguous().transpose(0, 1)
            optimizer.step()
        ends.append(holder)
    torch.testing.assert_close(ends[0].weight, ends[1].weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ends[0].kernel, ends[1].kernel, rtol=1e-4, atol=1e-5)


def test_a_large_parameter_is_updated_whole(make):
    model = nn.Sequential(nn.Linear(700, 800))  # more elements than a piece
    optimizer, start = make(model), model[0].weight.detach().clone()
    model(torch.randn(4, 700)).square().mean().backward()
    optimizer.step()
    assert model[0].weight.ne(start).float().mean() > 0.99


def test_a_parameter_that_is_unfrozen_later_is_trained(make):
    model = Small()
    model.hidden.weight.requires_grad_(False)
    optimizer = make(model)
    if all(model.hidden.weight is not p for group in optimizer.param_groups for p in group["params"]):
        pytest.skip("matrix_groups leaves frozen parameters out")
    steps(model, optimizer, batches(2))
    model.hidden.weight.requires_grad_(True)
    start = model.hidden.weight.detach().clone()
    steps(model, optimizer, batches(2))
    assert not torch.equal(model.hidden.weight, start)


def test_complex_parameters_are_refused():
    with pytest.raises(UserError, match="complex"):
        optim.Momentum([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])


# What users of torch.optim do


def test_parameter_groups_have_their_own_learning_rate(make):
    model = Small()
    optimizer, start = make(model), copy.deepcopy(model)
    for group in optimizer.param_groups[:-1] if len(optimizer.param_groups) > 1 else []:
        group["lr"] = 0.0
    steps(model, optimizer, batches(2))
    last = {id(p) for p in optimizer.param_groups[-1]["params"]}
    for p, q in zip(model.parameters(), start.parameters(), strict=True):
        assert torch.equal(p, q) == (id(p) not in last)


@pytest.mark.parametrize("name", PARAMS)
def test_groups_are_given_as_to_torch(name):
    if name in ("muon-learned", "m3-groups"):
        pytest.skip("makes its own groups")
    constructor, lr = PARAMS[name]

    class Two(nn.Module):
        def named_parameters(self):
            return [{"params": [a.weight], "lr": 0.0}, {"params": [b.weight]}]

    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    optimizer = constructor(Two(), lr)
    before = a.weight.detach().clone(), b.weight.detach().clone()
    for p in (a.weight, b.weight):
        p.grad = torch.ones(3, 3)
    optimizer.step()
    assert torch.equal(a.weight, before[0])
    assert not torch.equal(b.weight, before[1])
    c = nn.Linear(3, 3)
    optimizer.add_param_group({"params": [c.weight]})
    start, c.weight.grad = c.weight.detach().clone(), torch.ones(3, 3)
    optimizer.step()
    assert not torch.equal(c.weight, start)


def test_closure(make):
    model, batch = Small(), batches(1)[0]
    optimizer = make(model)

    def closure():
        optimizer.zero_grad()
        loss = model.loss(batch)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(10)]
    assert losses[-1] < losses[0]


def test_learning_rate_zero_changes_nothing(make):
    model = Small()
    optimizer, start = make(model, lr=0.0), copy.deepcopy(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    steps(model, optimizer, batches(2))
    assert equal(model, start)


def test_weight_decay_is_decoupled(make):
    """On zero gradients it is the only thing that moves a parameter, by the factor 1 - lr * weight_decay."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    optimizer, start = make(model, lr=0.5, weight_decay=0.1), model[0].weight.detach().clone()
    (model(torch.zeros(2, 4)).sum() * 0.0).backward()
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), 0.95 * start, rtol=1e-6, atol=1e-7)


def test_the_same_run_gives_the_same_bits(make):
    ends = []
    for _ in range(2):
        model = Small()
        steps(model, make(model), batches(4))
        ends.append(model)
    assert equal(*ends)


@pytest.mark.parametrize("lr", [-0.1, math.nan])
def test_wrong_learning_rates_are_one_line(make, lr):
    with pytest.raises(UserError, match="lr=") as caught:
        make(Small(), lr=lr)
    assert "\n" not in str(caught.value)

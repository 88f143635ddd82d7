"""LevelwiseOptimizer: Eq. 71 under any optimizer, in a loop of one's own and inside the Trainer."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.errors import UserError
from nestlearn.nn import ContinuumMemory, continuum_periods
from nestlearn.optim import (
    DGD,
    M3,
    DeltaMomentum,
    LevelwiseOptimizer,
    Momentum,
    NotFiniteGradient,
    as_memory,
    matrix_groups,
    periods_of,
)

INNER = {
    "sgd": lambda m: torch.optim.SGD(m.named_parameters(), lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda m: torch.optim.AdamW(m.named_parameters(), lr=0.01),
    "m3": lambda m: M3(m.named_parameters(), lr=0.02, chunk_size=2),
    "delta": lambda m: DeltaMomentum(m.named_parameters(), lr=0.02),
}


def make() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def batches(steps: int) -> Tensor:
    return torch.randn(steps, 8, 4, generator=torch.Generator().manual_seed(1))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :3].sin()).square().sum()


def run(model: nn.Module, optimizer: torch.optim.Optimizer, xs: Tensor) -> list[Tensor]:
    for x in xs:
        loss_of(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


PERIODS = {"2": 3, "4": 4}


@pytest.mark.parametrize("inner", INNER)
def test_periods_of_one_are_the_inner_optimizer_bit_for_bit(inner: str) -> None:
    a, b = make(), make()
    plain = run(a, INNER[inner](a), batches(7))
    wrapped = run(b, LevelwiseOptimizer(INNER[inner](b), dict.fromkeys(b.parameters(), 1)), batches(7))
    assert all(torch.equal(x, y) for x, y in zip(plain, wrapped, strict=True))


@pytest.mark.parametrize("error", ["sum", "mean", "last"])
@pytest.mark.parametrize("inner", INNER)
def test_is_a_plain_loop_over_the_accumulated_error(inner: str, error: str) -> None:
    """Each level by an optimizer of its own, stepped with the error of its chunk (Eq. 71)."""
    model, plain = make(), make()
    ours = run(model, LevelwiseOptimizer(INNER[inner](model), periods_of(model, PERIODS), error), batches(13))
    levels = [(plain[0], 1), (plain[2], 3), (plain[4], 4)]
    optimizers = [INNER[inner](level) for level, _ in levels]
    sums = [[torch.zeros_like(p) for p in level.parameters()] for level, _ in levels]
    for t, x in enumerate(batches(13), start=1):
        gradients = iter(torch.autograd.grad(loss_of(plain, x), list(plain.parameters())))
        for (level, period), optimizer, kept in zip(levels, optimizers, sums, strict=True):
            for total, p in zip(kept, level.parameters(), strict=True):
                g = next(gradients)
                total.copy_(g if error == "last" else total + g)
                p.grad = total / period if error == "mean" else total.clone()
            if t % period == 0:
                optimizer.step()
                for total in kept:
                    total.zero_()
    for a, b in zip(ours, plain.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-6, atol=1e-7)


def test_a_resting_level_keeps_its_weights_its_momentum_and_no_gradient() -> None:
    model = make()
    optimizer = LevelwiseOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1), periods_of(model, {"4": 4}))
    slow = model[4].weight
    run(model, optimizer, batches(4))
    before, momentum = slow.detach().clone(), copy.deepcopy(optimizer.state[slow])
    for x in batches(3):
        loss_of(model, x).backward()
        optimizer.step()
        assert slow.grad is None
        optimizer.zero_grad()
        assert torch.equal(slow, before)
        assert all(torch.equal(v, momentum[k]) for k, v in optimizer.state[slow].items())
    run(model, optimizer, batches(1))
    assert not torch.equal(slow, before)


def test_last_asks_for_no_gradient_between_updates() -> None:
    model = make()
    optimizer = LevelwiseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), periods_of(model, {"4": 3}), "last")
    asked = []
    for x in batches(6):
        asked.append(model[4].weight.requires_grad)
        loss_of(model, x).backward()
        assert (model[4].weight.grad is not None) == asked[-1]
        assert model[0].weight.grad is not None  # the gradient still goes through the resting level
        optimizer.step()
        optimizer.zero_grad()
    assert asked == [False, False, True] * 2
    assert not model[4].weight.requires_grad
    optimizer.flush()
    assert model[4].weight.requires_grad


def test_flush_updates_what_is_left_of_a_chunk_and_nothing_else() -> None:
    model = make()
    optimizer = LevelwiseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), periods_of(model, {"4": 4}))
    run(model, optimizer, batches(2))
    before = [p.detach().clone() for p in model.parameters()]
    kept = optimizer.state_dict()["levelwise"]["kept"]
    optimizer.flush()
    changed = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert changed == [False, False, False, False, True, True]
    torch.testing.assert_close(model[4].weight, before[4] - 0.1 * kept[4])
    after = [p.detach().clone() for p in model.parameters()]
    optimizer.flush()
    assert all(torch.equal(a, b) for a, b in zip(after, model.parameters(), strict=True))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zeroing_gradients_leaves_what_is_kept(set_to_none: bool) -> None:
    model = make()
    optimizer = LevelwiseOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), periods_of(model, {"4": 2}))
    loss_of(model, batches(1)[0]).backward()
    gradient = model[4].weight.grad.clone()
    optimizer.step()
    optimizer.zero_grad(set_to_none)
    model.zero_grad(set_to_none)
    assert torch.equal(optimizer.state_dict()["levelwise"]["kept"][4], gradient)


@given(cut=st.integers(0, 11), inner=st.sampled_from(sorted(INNER)), error=st.sampled_from(["sum", "mean", "last"]))
@settings(max_examples=20, deadline=None)
def test_a_state_in_mid_chunk_goes_on_to_the_same_bits(cut: int, inner: str, error: str) -> None:
    model = make()
    optimizer = LevelwiseOptimizer(INNER[inner](model), periods_of(model, PERIODS), error)
    run(model, optimizer, batches(12)[:cut])
    other = make()
    other.load_state_dict(model.state_dict())
    resumed = LevelwiseOptimizer(INNER[inner](other), periods_of(other, PERIODS), error)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    a, b = run(model, optimizer, batches(12)[cut:]), run(other, resumed, batches(12)[cut:])
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_errors_of_half_precision_weights_are_kept_in_float32() -> None:
    model = make().to(torch.bfloat16)
    optimizer = LevelwiseOptimizer(Momentum(model.parameters(), lr=0.1), periods_of(model, {"4": 3}))
    run(model, optimizer, batches(2).to(torch.bfloat16))
    assert {g.dtype for g in optimizer.state_dict()["levelwise"]["kept"].values()} == {torch.float32}
    run(model, optimizer, batches(1).to(torch.bfloat16))
    assert model[4].weight.dtype == torch.bfloat16


def test_schedulers_and_closures_work() -> None:
    model, x = make(), batches(1)[0]
    optimizer = LevelwiseOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), periods_of(model, {"4": 2}))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0
    scheduler.step()
    assert optimizer.optimizer.param_groups[0]["lr"] == 0.5
    assert isinstance(optimizer, torch.optim.Optimizer)


def test_a_gradient_that_is_not_finite_is_refused_by_name_before_it_is_kept() -> None:
    model = make()
    optimizer = LevelwiseOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.1), periods_of(model, {"4": 4}))
    loss_of(model, batches(1)[0]).backward()
    model[4].bias.grad[1] = float("nan")
    with pytest.raises(NotFiniteGradient, match=r"'4\.bias'"):
        optimizer.step()


class OneOrder(Trainer):
    """A Trainer with our optimizer and the data in its order."""

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        inner = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.optimizer = LevelwiseOptimizer(inner, continuum_periods(self.model, 4 * 16), "mean")
        return self.optimizer

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def test_inside_the_trainer_with_gradient_accumulation_is_a_plain_loop(tmp_path: Any) -> None:
    def model() -> HopeForCausalLM:
        torch.manual_seed(0)
        config = HopeConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
        config.intermediate_size, config.cms_chunk_sizes = 24, [16, 3 * 64]
        return HopeForCausalLM(config)

    ids = torch.randint(0, 32, (28, 16), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=1, report_to=[],
        max_grad_norm=0.0, lr_scheduler_type="constant", save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trained = model()
    OneOrder(trained, arguments, train_dataset=data).train()

    plain = model().train()
    slow = {p for p, period in continuum_periods(plain, 64).items() if period == 3}
    assert {name for name, p in plain.named_parameters() if p in slow} == {
        f"model.layers.0.memory.levels.1.{part}.weight" for part in ("norm", "gate", "up", "down")
    }
    fast = torch.optim.AdamW([p for p in plain.parameters() if p not in slow], lr=0.01)
    rare = torch.optim.AdamW(list(slow), lr=0.01)
    for t, step in enumerate(ids.split(4), start=1):
        for part in step.split(2):
            (plain(input_ids=part, labels=part).loss / 2).backward()
        fast.step()
        fast.zero_grad()
        if t % 3 == 0:
            for p in slow:
                p.grad /= 3
            rare.step()
            rare.zero_grad()
    for a, b in zip(trained.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_works_over_matrix_groups() -> None:
    model = ContinuumMemory(8, [4, 16])
    optimizer = LevelwiseOptimizer(M3(matrix_groups(model), lr=0.02), continuum_periods(model, 4))
    slow = model.levels[1].up.weight
    before = slow.detach().clone()
    for _ in range(4):
        model(torch.randn(1, 4, 8))[0].square().sum().backward()
        assert torch.equal(slow, before)
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(slow, before)


def test_names_cover_what_is_below_them() -> None:
    model = nn.ModuleDict({"a": make(), "ab": nn.Linear(2, 2)})
    assert len(periods_of(model, {"a": 2})) == 6
    assert len(periods_of(model, {"a.*.bias": 2, "ab": 4})) == 5
    assert set(periods_of(model, {"a": 2, "a.0": 2}).values()) == {2}
    tied = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    tied[1].weight = tied[0].weight
    assert len(periods_of(tied, {"0": 3})) == 2


@pytest.mark.parametrize(
    ("periods", "message"),
    [
        ({"5": 2}, "no module or parameter with weights is called '5'"),
        ({"1": 2}, "no module or parameter with weights is called '1'"),
        ({"0": 0}, "the period of '0' is 0"),
        ({"0": 2.0}, "the period of '0' is 2.0"),
        ({"0": True}, "the period of '0' is True"),
        ({0: 2}, "got a dict that is no mapping of names: give steps by the name"),
        ([2], "got a list that is no mapping of names: give steps by the name"),
        ({"0": 2, "*.weight": 3}, "'0' and '\\*.weight' give one parameter two periods"),
    ],
)
def test_bad_periods_are_refused_in_one_line(periods: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        periods_of(make(), periods)
    assert "\n" not in str(error.value)


def test_other_mistakes_are_refused_in_one_line() -> None:
    model = make()
    inner = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(UserError, match="did you mean 'mean'"):
        LevelwiseOptimizer(inner, {}, error="meen")
    with pytest.raises(UserError, match="the optimizer does not have"):
        LevelwiseOptimizer(inner, periods_of(model, {"4": 2}))
    with pytest.raises(UserError, match="no steps and kept gradients of a LevelwiseOptimizer"):
        LevelwiseOptimizer(inner, {}).load_state_dict(inner.state_dict())
    with pytest.raises(UserError, match=r"give as_memory its optimizer\.optimizer"):
        as_memory(LevelwiseOptimizer(inner, {}))
    with pytest.raises(UserError, match="LBFGS evaluates the loss itself"):
        LevelwiseOptimizer(torch.optim.LBFGS(model.parameters()), {})
    with pytest.raises(UserError, match=r"DGD reads the inputs of its layers.*use error='last'"):
        LevelwiseOptimizer(DGD(model), periods_of(model, {"4": 2}))
    with pytest.raises(UserError, match="did you mean 'layers'"):
        periods_of(nn.ModuleDict({"layers": nn.Linear(2, 2)}), {"layer": 2})
    with pytest.raises(UserError, match="has no ContinuumMemory"):
        continuum_periods(model, 4)
    with pytest.raises(UserError, match="tokens_per_step=0"):
        continuum_periods(model, 0)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])  # noqa: S301
@pytest.mark.parametrize("error", ["sum", "last"])
def test_a_copy_in_mid_chunk_goes_on_to_the_same_bits(how: Any, error: str) -> None:
    model, xs = make(), batches(11)
    optimizer = LevelwiseOptimizer(INNER["m3"](model), periods_of(model, PERIODS), error=error)
    seen: list[int] = []
    run(model, optimizer, xs[:5])
    twin, copied = how((model, optimizer))
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    for a, b in zip(run(model, optimizer, xs[5:]), run(twin, copied, xs[5:]), strict=True):
        assert torch.equal(a, b)
    assert len(seen) == 6  # hooks run once a step; torch's own copying wraps step once more


def test_a_gradient_that_lies_in_a_shared_buffer_is_kept_whole() -> None:
    """As the gradient buckets of DistributedDataParallel, which the next backward pass writes again."""
    fast, slow, bucket = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2)), torch.zeros(4)
    optimizer = LevelwiseOptimizer(torch.optim.SGD([fast, slow], lr=1.0), {slow: 3})
    for k in (1.0, 2.0, 3.0):
        bucket.fill_(k)
        fast.grad, slow.grad = bucket[:2], bucket[2:]
        optimizer.step()
        assert bucket.eq(k).all()
        optimizer.zero_grad()
    assert fast.tolist() == slow.tolist() == [-6.0, -6.0]


def test_complex_parameters_keep_their_imaginary_part() -> None:
    w = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    optimizer = LevelwiseOptimizer(torch.optim.SGD([w], lr=1.0), {w: 2})
    for _ in range(2):
        w.grad = torch.full((2,), 1 + 2j)
        optimizer.step()
    assert w.tolist() == [-2 - 4j] * 2


def test_dgd_at_the_frequency_of_a_level_erases_along_the_last_inputs() -> None:
    torch.manual_seed(0)
    model, xs = nn.Sequential(nn.Linear(4, 3, bias=False)).double(), torch.randn(3, 8, 4).double()
    start = model[0].weight.detach().clone()
    optimizer = LevelwiseOptimizer(DGD(model, lr=0.1, mode="explicit"), periods_of(model, {"0": 3}), error="last")
    for x in xs:
        loss = (model(x) ** 3).mean()
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    w, x = start.clone().requires_grad_(), xs[-1]
    (gradient,) = torch.autograd.grad(((x @ w.mT) ** 3).mean(), w)
    torch.testing.assert_close(model[0].weight.detach(), start - 0.1 * (gradient + start @ x.mT @ x / 8))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])  # noqa: S301
def test_a_copy_steps_itself_where_a_scheduler_has_wrapped_step(how: Any) -> None:
    model, xs = make(), batches(6)
    optimizer = LevelwiseOptimizer(INNER["m3"](model), periods_of(model, PERIODS))
    torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    run(model, optimizer, xs[:3])
    before = [p.detach().clone() for p in model.parameters()]
    twin, copied = how((model, optimizer))
    run(twin, copied, xs[3:])
    assert (optimizer.steps, copied.steps) == (3, 6)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_refused_step_changes_nothing() -> None:
    slow, fast = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = LevelwiseOptimizer(Momentum([slow, fast], lr=1.0, momentum=0.0), {slow: 4})
    for gradient in (1.0, 1.0, float("nan"), 1.0, float("nan"), 1.0):
        slow.grad, fast.grad = torch.ones(1), torch.tensor([gradient])
        if gradient == 1.0:
            optimizer.step()
        else:
            with pytest.raises(NotFiniteGradient):
                optimizer.step()
            assert slow.grad.tolist() == [1.0]
    assert (optimizer.steps, slow.tolist(), fast.tolist()) == (4, [-4.0], [-4.0])


def test_a_refused_flush_keeps_what_it_was_to_apply() -> None:
    slow, fast = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = LevelwiseOptimizer(torch.optim.SGD([slow, fast], lr=1.0), {slow: 4})
    slow.grad = fast.grad = torch.ones(1)
    optimizer.step()
    hook = optimizer.optimizer.register_step_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        optimizer.flush()
    hook.remove()
    optimizer.flush()
    assert slow.tolist() == [-1.0]


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler_scales_back_whatever_the_inner_optimizer_can(fused: bool) -> None:
    slow, fast = (nn.Parameter(torch.ones(1)) for _ in range(2))
    optimizer = LevelwiseOptimizer(torch.optim.SGD([slow, fast], lr=0.01, fused=fused), {slow: 2})
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    for _ in range(4):
        optimizer.zero_grad()
        scaler.scale((2 * slow + 3 * fast).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close([slow.item(), fast.item()], [0.92, 0.88])


def test_a_parameter_frozen_in_mid_chunk_rests() -> None:
    slow, fast = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = LevelwiseOptimizer(torch.optim.SGD([slow, fast], lr=1.0), {slow: 4})
    for step in range(4):
        slow.grad, fast.grad = torch.ones(1) if step < 2 else None, torch.ones(1)
        slow.requires_grad_(step < 2)
        optimizer.step()
    assert (slow.tolist(), fast.tolist()) == ([0.0], [-4.0])


def test_a_sum_that_a_half_parameter_cannot_hold_is_refused() -> None:
    w = nn.Parameter(torch.zeros(1, dtype=torch.float16))
    optimizer = LevelwiseOptimizer(torch.optim.SGD([w], lr=1e-6), {w: 100})
    for _ in range(99):
        w.grad = torch.full_like(w, 1000)
        optimizer.step()
    w.grad = torch.full_like(w, 1000)
    with pytest.raises(NotFiniteGradient, match=r"over 100 steps is too large for torch\.float16"):
        optimizer.step()
    assert w.tolist() == [0.0]


def test_what_is_no_optimizer_or_no_parameter_is_refused() -> None:
    w = nn.Parameter(torch.zeros(1))
    inner = torch.optim.SGD([w], lr=1.0)
    for optimizer, periods, message in (
        (LevelwiseOptimizer(inner, {w: 2}), {}, "got a LevelwiseOptimizer"),
        (w, {}, "got a Parameter"),
        (inner, {"weight": 2}, "'weight', which is no parameter"),
        (inner, [2], "got periods as list: give one by parameter"),
        (inner, 4, "got periods as int: give one by parameter"),
    ):
        with pytest.raises(UserError, match=message):
            LevelwiseOptimizer(optimizer, periods)


def test_a_second_wrapper_finds_what_the_first_has_put_to_rest() -> None:
    slow, fast = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
    for _ in range(2):  # as a cell of a notebook that runs twice
        optimizer = LevelwiseOptimizer(torch.optim.SGD([slow, fast, frozen], lr=1.0), {slow: 4, frozen: 2}, "last")
        for _ in range(5):
            (slow + fast).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    optimizer.flush()
    assert (slow.tolist(), fast.tolist(), frozen.tolist()) == ([-2.0], [-10.0], [0.0])
    assert [p.requires_grad for p in (slow, fast, frozen)] == [True, True, False]


def test_last_with_nothing_but_slow_levels_has_a_backward_pass_at_every_step() -> None:
    model, plain, xs = make(), make(), batches(12)
    optimizer = LevelwiseOptimizer(INNER["sgd"](model), periods_of(model, {"0": 4, "2": 6, "4": 2}), error="last")
    asked = []
    for x in xs:
        asked.append([layer.weight.requires_grad for layer in (model[0], model[2], model[4])])
        loss_of(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert asked[:4] == [[False, False, True], [False, False, True], [False, False, True], [True, False, True]]
    levels = [(plain[0], 4), (plain[2], 6), (plain[4], 2)]
    optimizers = [INNER["sgd"](level) for level, _ in levels]
    for t, x in enumerate(xs, start=1):
        loss_of(plain, x).backward()
        for (_, period), each in zip(levels, optimizers, strict=True):
            if t % period == 0:
                each.step()
            each.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_parameter_that_is_frozen_after_a_flush_stays_frozen() -> None:
    slow, fast = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = LevelwiseOptimizer(torch.optim.SGD([slow, fast], lr=1.0), {slow: 2}, "last")
    for step in range(6):
        if step == 3:
            optimizer.flush()
            slow.requires_grad_(False)
        (slow + fast).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (slow.tolist(), fast.tolist(), slow.requires_grad) == ([-1.0], [-6.0], False)

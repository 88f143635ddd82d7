"""The derived recurrences against the optimizers themselves, and what the descriptions say (appendix B)."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import pytorch_optimizer as po
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from nestlearn import optim as ours
from nestlearn.data.images import load_images
from nestlearn.errors import UserError
from nestlearn.memory import objectives
from nestlearn.optim.derivations import OptimizerMemory, as_memory
from nestlearn.optim.descent import DGD, GGD
from nestlearn.optim.generalized import GeneralizedMomentum

torch_optim = torch.optim
STEPS, BATCH = 50, 32
Batches = list[tuple[Tensor, Tensor]]
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # torch keeps step counts and NAdam's product in the default type
    yield
    torch.set_default_dtype(before)


# Data and models


@pytest.fixture(scope="module")
def shapes() -> Batches:
    """Minibatches of 8 x 8 pictures of ten smooth shapes, moved and noisy."""
    generator = torch.Generator().manual_seed(0)
    kind = dict(generator=generator, dtype=torch.float64)
    patterns = F.interpolate(torch.randn(10, 1, 4, 4, **kind), size=8, mode="bilinear")
    labels = torch.randint(10, (STEPS, BATCH), generator=generator)
    moved = [torch.roll(patterns[row], i % 3 - 1, dims=-1) for i, row in enumerate(labels)]
    return [(x + 0.3 * torch.randn(x.shape, **kind), row) for x, row in zip(moved, labels, strict=True)]


@pytest.fixture(scope="module")
def digits(shared_data) -> Batches:
    """Minibatches of MNIST, pooled to 14 x 14 pixels."""
    images = load_images(shared_data, "mnist")
    pixels = F.avg_pool2d(images.train[: STEPS * BATCH].double() / 255, 2)
    return list(zip(pixels.split(BATCH), images.train_labels.split(BATCH), strict=False))


@pytest.fixture(params=["shapes", "digits"])
def batches(request: pytest.FixtureRequest) -> Batches:
    return request.getfixturevalue(request.param)


def network(x: Tensor) -> nn.Module:
    """A small convolutional network for pictures like ``x``."""
    torch.manual_seed(1)
    side = x.shape[-1] // 2
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4 * side * side, 12), nn.Tanh(), nn.Linear(12, 10)).double()


def square(x: Tensor) -> nn.Module:
    """Layers whose gradients have full rank from the first batch, so that every eigenbasis is unique."""
    torch.manual_seed(1)
    features = torch.randn(x[0].numel(), 10, dtype=x.dtype) / 8
    project = nn.Linear(x[0].numel(), 10, bias=False)
    project.weight = nn.Parameter(features.mT.contiguous(), requires_grad=False)
    return nn.Sequential(nn.Flatten(), project, nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 10)).double()


def distance(
    make: Make,
    batches: Batches,
    build: Callable[[Tensor], nn.Module] = network,
    wanted: Callable[[nn.Parameter], bool] = lambda p: True,
    schedule: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
    take_basis: bool = False,
) -> float:
    """Train one model with the optimizer and a copy with its recurrence, each on its own gradients.

    The largest difference of a parameter at the end, in units of how far the optimizer moved it. With ``take_basis``
    the recurrence of SOAP starts from the optimizer's first eigenbases.
    """
    model, copy = build(batches[0][0]), build(batches[0][0])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and wanted(p)}
    optimizer = make(list(trained.values()))
    scheduler = schedule(optimizer) if schedule else None
    where = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    group_of = {name: where[id(p)] for name, p in trained.items()}
    start = {name: p.detach().clone() for name, p in trained.items()}
    weights, memory = dict(start), as_memory(optimizer)
    states = {name: memory.groups[group_of[name]].init(p) for name, p in weights.items()}
    for step, (x, y) in enumerate(batches):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

        inputs = {name: p.clone().requires_grad_() for name, p in weights.items()}
        loss = F.cross_entropy(functional_call(copy, inputs, (x,)), y)
        gradients = torch.autograd.grad(loss, list(inputs.values()))
        for name, g in zip(inputs, gradients, strict=True):
            group = memory.groups[group_of[name]]
            weights[name], states[name] = group.update(states[name], g, weights[name])
            if take_basis and step == 0:
                found = optimizer.state[trained[name]]["Q"]
                states[name]["Q"] = {dim: basis for dim, basis in enumerate(found) if len(basis)}
        if scheduler:
            scheduler.step()
            memory = as_memory(optimizer)
    moved = {name: (p.detach() - start[name]).norm() for name, p in trained.items()}
    assert all(size > 0 for size in moved.values())
    return max(float((weights[name] - p.detach()).norm() / moved[name]) for name, p in trained.items())


# Parity with the real optimizers

EVERYDAY: dict[str, Make] = {
    "sgd": lambda p: torch_optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch_optim.SGD(p, lr=0.05, momentum=0.9),
    "momentum, dampened, decayed": lambda p: torch_optim.SGD(p, lr=0.1, momentum=0.8, dampening=0.3, weight_decay=0.01),
    "nesterov": lambda p: torch_optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch_optim.Adam(p, lr=1e-2, betas=(0.9, 0.99)),
    "adam, coupled decay": lambda p: torch_optim.Adam(p, lr=1e-2, weight_decay=0.01),
    "adam, ascending": lambda p: torch_optim.Adam(p, lr=1e-3, maximize=True),
    "adamw": lambda p: torch_optim.AdamW(p, lr=1e-2, weight_decay=0.1, eps=1e-4),
    "amsgrad": lambda p: torch_optim.Adam(p, lr=1e-2, betas=(0.9, 0.9), amsgrad=True),
    "amsgrad, decoupled decay": lambda p: torch_optim.AdamW(p, lr=1e-2, betas=(0.9, 0.9), amsgrad=True),
    "rmsprop": lambda p: torch_optim.RMSprop(p, lr=3e-3),
    "rmsprop, centred": lambda p: torch_optim.RMSprop(p, lr=3e-3, alpha=0.9, eps=1e-3, centered=True),
    "rmsprop, momentum": lambda p: torch_optim.RMSprop(p, lr=1e-3, momentum=0.9, weight_decay=0.01),
    "nadam": lambda p: torch_optim.NAdam(p, lr=1e-2, eps=1e-4),
    "nadam, decoupled decay": lambda p: torch_optim.NAdam(p, weight_decay=0.1, decoupled_weight_decay=True),
    "radam": lambda p: torch_optim.RAdam(p, lr=1e-2, eps=1e-4),
    "radam, coupled decay": lambda p: torch_optim.RAdam(p, lr=1e-2, betas=(0.9, 0.9), weight_decay=0.01),
    "adagrad": lambda p: torch_optim.Adagrad(p, lr=0.05),
    "adagrad, started, slowing": lambda p: torch_optim.Adagrad(p, 0.05, lr_decay=0.1, initial_accumulator_value=0.1),
    "signsgd": lambda p: po.SignSGD(p, lr=1e-3, momentum=0.0),
    "signum": lambda p: po.SignSGD(p, lr=1e-3, momentum=0.9, weight_decay=0.1),
    "signum, coupled decay": lambda p: po.SignSGD(p, lr=1e-3, weight_decay=0.1, weight_decouple=False),
    "lion": lambda p: po.Lion(p, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1),
    "lion, fixed decay": lambda p: po.Lion(p, lr=1e-3, weight_decay=0.001, fixed_decay=True),
    "shampoo": lambda p: po.Shampoo(p, lr=0.01),
    "shampoo, rare roots": lambda p: po.Shampoo(p, lr=0.01, preconditioning_compute_steps=5, weight_decay=0.01),
}
# A dimension much larger than the others has singular statistics for many steps, and their eigenbasis is anybody's
# choice: up to 12 here, which leaves the first steps, for which the recurrence takes the optimizer's basis.
SOAPS: dict[str, Make] = {
    "every step": lambda p: po.SOAP(p, lr=3e-3, precondition_frequency=1, max_precondition_dim=12),
    "every tenth": lambda p: po.SOAP(
        p, lr=3e-3, shampoo_beta=0.9, betas=(0.9, 0.99), eps=1e-4, max_precondition_dim=12
    ),
    "uncorrected": lambda p: po.SOAP(
        p, lr=3e-3, precondition_frequency=5, correct_bias=False, weight_decay=0.0, max_precondition_dim=12
    ),
    "vectors too": lambda p: po.SOAP(
        p, lr=3e-3, precondition_frequency=20, precondition_1d=True, max_precondition_dim=12
    ),
}


@pytest.mark.parametrize("name", EVERYDAY)
def test_recurrence_is_the_optimizer(name: str, batches: Batches) -> None:
    # Shampoo takes roots of ill-conditioned memories, here by another decomposition than the package
    assert distance(EVERYDAY[name], batches) < (1e-8 if name.startswith("shampoo") else 1e-11)


@pytest.mark.parametrize("name", SOAPS)
def test_soap_is_adam_in_the_eigenbases(name: str, batches: Batches) -> None:
    assert distance(SOAPS[name], batches, take_basis=True) < 1e-8


def test_soap_with_unique_eigenbases_needs_no_help(batches: Batches) -> None:
    assert distance(lambda p: po.SOAP(p, lr=3e-3, precondition_frequency=2), batches, square) < 1e-8


def test_torch_muon(batches: Batches) -> None:
    make = lambda p: torch_optim.Muon(p, lr=0.02, weight_decay=0.1)  # noqa: E731
    assert distance(make, batches, wanted=lambda p: p.ndim == 2) < 1e-6


def test_adam_groups_of_muon_run_too(shapes: Batches) -> None:
    make = lambda p: ours.Muon(p, lr=0.02, weight_decay=0.1)  # noqa: E731
    assert distance(make, shapes, wanted=lambda p: p.ndim < 2) < 1e-12


def test_two_groups_with_their_own_numbers(shapes: Batches) -> None:
    def make(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        groups = [
            {"params": params[::2], "betas": (0.5, 0.9)},
            {"params": params[1::2], "lr": 1e-3, "weight_decay": 0.0, "amsgrad": True},
        ]
        return torch_optim.AdamW(groups, lr=1e-2, weight_decay=0.3)

    assert distance(make, shapes) < 1e-10
    memory = as_memory(make(list(network(shapes[0][0]).parameters())))
    assert [len(group.memories) for group in memory.groups] == [2, 3]
    assert [group.memories[0].retention for group in memory.groups] == [0.5, 0.9]
    assert [group.lr for group in memory.groups] == [1e-2, 1e-3]
    assert len(memory.memories) == 5
    assert "group 0:" in str(memory)
    assert "group 1:" in str(memory)


def test_scheduled_learning_rate(shapes: Batches) -> None:
    schedule = lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.9)  # noqa: E731
    assert distance(lambda p: torch_optim.AdamW(p, lr=1e-2), shapes, schedule=schedule) < 1e-10


def test_update_is_pure() -> None:
    for make in (EVERYDAY["amsgrad"], EVERYDAY["rmsprop, momentum"], EVERYDAY["shampoo"], SOAPS["every step"]):
        start, given = torch.eye(3)[:, :2], torch.arange(6.0).view(3, 2) - 2
        p, g = nn.Parameter(start.clone()), given.clone()
        group = as_memory(make([p])).groups[0]
        state, weight = group.init(p.detach()), p.detach()
        for _ in range(3):
            once, after = group.update(state, g, weight)
            again, _ = group.update(state, g, weight)
            assert torch.equal(once, again)
            assert torch.equal(g, given)
            weight, state = once, after
        assert torch.equal(p, start)


# What the descriptions say

MODEL = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
DESCRIBED: dict[str, Callable[[], torch.optim.Optimizer]] = {
    **{name: (lambda make=make: make(list(MODEL.parameters()))) for name, make in (EVERYDAY | SOAPS).items()},
    "torch muon": lambda: torch_optim.Muon([p for p in MODEL.parameters() if p.ndim == 2]),
    "Momentum": lambda: ours.Momentum(MODEL.parameters(), output="sign"),
    "PreconditionedMomentum": lambda: ours.PreconditionedMomentum(MODEL.parameters()),
    "FeatureMomentum": lambda: ours.FeatureMomentum(MODEL.parameters(), preconditioner=torch.sign),
    "DeltaMomentum": lambda: ours.DeltaMomentum(MODEL.parameters(), keys="whole", preconditioner="diagonal"),
    "DeepMomentum": lambda: ours.DeepMomentum(MODEL.parameters(), inner_steps=2),
    "DeepMomentum, values": lambda: ours.DeepMomentum(MODEL.parameters(), value=torch.tanh, objective="dot"),
    "Muon": lambda: ours.Muon(MODEL.parameters(), nesterov=False, weight_decay=0.1),
    "M3": lambda: ours.M3(MODEL.parameters(), chunk_size=8),
    "M3, printed": lambda: ours.M3(MODEL.parameters(), mode="paper", denom="paper"),
    "M3, no second": lambda: ours.M3(MODEL.parameters(), denom="none", adjust="none"),
    "DGD": lambda: DGD(MODEL, lr=0.1, weight_decay=0.1),
    "GGD": lambda: GGD(MODEL, objective=objectives.lp(3), steps=2),
    "GeneralizedMomentum": lambda: GeneralizedMomentum(MODEL, objective="l2"),
}
LISTED = {"L": "GG", "Q_L": "Q"}


@pytest.mark.parametrize("name", DESCRIBED)
def test_description_prints(name: str) -> None:
    optimizer = DESCRIBED[name]()
    memory = as_memory(optimizer)
    text = str(memory)
    assert text.startswith(f"{type(optimizer).__name__} as memories")
    assert text.count("read: ") == len(set(memory.groups))
    for part in memory.memories:
        assert all(
            cell in text for cell in (part.name, part.structure, part.objective, part.rule, part.key, part.value)
        )
        assert part.frequency > 0
        assert 0 <= part.retention <= 1


@pytest.mark.parametrize("name", [n for n in DESCRIBED if not n.startswith(("D", "G", "shampoo", "every", "M3"))])
def test_every_stored_tensor_is_described(name: str) -> None:
    optimizer = DESCRIBED[name]()
    for p in MODEL.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    for group, described in zip(optimizer.param_groups, as_memory(optimizer).groups, strict=True):
        for p in (p for p in group["params"] if p.ndim == 2 or name not in SOAPS):
            stored = [key for key, value in optimizer.state[p].items() if isinstance(value, Tensor) and value.ndim]
            stored += [name for name, key in LISTED.items() for _ in optimizer.state[p].get(key, [])]
            names = [memory.name for memory in described.memories]
            assert len(stored) == len(names), (stored, names)


def test_numbers_of_a_description() -> None:
    slow = as_memory(DESCRIBED["M3"]()).groups[0].memories[1]
    assert (slow.frequency, slow.retention, slow.value) == (1 / 8, 0.9, "mean of 8 g")
    deep = as_memory(DESCRIBED["DeepMomentum"]()).memories[0]
    assert (deep.frequency, deep.step_size, deep.objective) == (2.0, 0.5, "1/2 ||m(k) + k||^2")
    basis = as_memory(DESCRIBED["every tenth"]()).memories[2]
    assert (basis.name, basis.frequency) == ("Q_L", 0.1)
    v = as_memory(DESCRIBED["adamw"]()).memories[1]
    assert (v.objective, v.rule, v.value) == ("1/2 ||v - g^2||^2", "gradient descent", "g^2")
    assert v.step_size == pytest.approx(1 - v.retention, abs=0)
    weights = as_memory(DESCRIBED["DGD"]()).memories[0]
    assert (weights.key, weights.step_size, weights.retention) == ("layer input x", 0.1, 0.99)
    assert as_memory(DESCRIBED["GGD"]()).memories[0].objective == "l3 of W x - u"


def test_equal_groups_share_a_table() -> None:
    groups = [{"params": [p]} for p in MODEL.parameters()]
    memory = as_memory(torch_optim.SGD([*groups[:3], {**groups[3], "momentum": 0.5}], lr=0.1))
    assert "groups 0, 1, 2: lr 0.1" in str(memory)
    assert "stores nothing between steps" in str(memory)
    assert "group 3: lr 0.1" in str(memory)


# Refusals


class Mine(torch.optim.Adam):
    """A subclass may change anything."""


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: torch_optim.Rprop(p), "torch.optim.R"),
        (lambda p: Mine(p), "test_as_memory.Mine"),
        (lambda p: po.ScalableShampoo(p), "did you mean 'pytorch_optimizer.Shampoo'"),
        (lambda p: po.Shampoo(p, momentum=0.9), "momentum=0.9"),
        (lambda p: po.SOAP(p, merge_dims=True), "merge_dims=True"),
        (lambda p: po.SOAP(p, normalize_gradient=True), "normalize_gradient=True"),
        (lambda p: po.Lion(p, cautious=True), "cautious=True"),
        (lambda p: torch_optim.Muon(p, ns_coefficients=(3.0, -4.0, 2.0)), "ns_coefficients"),
        (lambda p: p, "list"),
    ],
)
def test_what_is_refused(make: Make, words: str) -> None:
    with pytest.raises(UserError) as error:
        as_memory(make([nn.Parameter(torch.zeros(2, 2))]))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_own_optimizers_are_described_only() -> None:
    p = nn.Parameter(torch.zeros(2, 2))
    group = as_memory(ours.Momentum([p])).groups[0]
    for act in (lambda: group.init(p), lambda: group.update({"step": 0}, p, p)):
        with pytest.raises(UserError, match="step the optimizer itself"):
            act()


def test_radam_is_momentum_until_the_variance_is_tractable() -> None:
    p, g = torch.zeros(3, dtype=torch.float64), torch.tensor([1.0, -2.0, 3.0])
    group = as_memory(torch_optim.RAdam([nn.Parameter(p)], lr=1.0)).groups[0]
    state, sizes = group.init(p), []
    for _ in range(8):
        before = p
        p, state = group.update(state, g, p)
        sizes.append(before - p)
    torch.testing.assert_close(sizes[0], g, rtol=1e-12, atol=0)
    torch.testing.assert_close(sizes[4], g, rtol=1e-12, atol=0)  # rho_5 < 5 for beta2 = 0.999
    assert not torch.allclose(sizes[5], g)
    assert (sizes[5].abs() - sizes[5].abs()[0]).abs().max() < 1e-6  # from then on a step of one size


def test_memory_of_an_optimizer_is_hashable_and_comparable() -> None:
    first, second = (as_memory(DESCRIBED["adamw"]()) for _ in range(2))
    assert isinstance(first, OptimizerMemory)
    assert first == second
    assert len({first, second}) == 1

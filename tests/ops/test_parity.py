"""The chunk-parallel core equals the token-by-token oracle: outputs, states, and every gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from nestlearn.errors import UserError
from nestlearn.memory import LinearMemory, MLPMemory
from nestlearn.nn import SelfReferentialTitans
from nestlearn.ops import MEMORY, PROJECTIONS, CoreState, Start, WriteRule, kernel_for, reference, self_modify
from nestlearn.ops.linear_adjoint import LinearSegments
from nestlearn.ops.mlp_adjoint import MLPSegments

GATES = ("eta", "alpha")
HEADS, WIDTH, HIDDEN = 2, 5, 7


def make_start(
    structure: str,
    adaptive: tuple[str, ...],
    *,
    seed: int = 0,
    momentum: bool = False,
    accumulates: bool = False,
    dtype=torch.float64,
) -> Start:
    g = torch.Generator().manual_seed(seed)

    def weights(name: str):
        d_out = 1 if name in GATES else WIDTH
        memory = LinearMemory(WIDTH, d_out) if structure == "linear" else MLPMemory(WIDTH, d_out, HIDDEN)
        return tuple(w.to(dtype) for w in memory.init((HEADS,), g))

    names = (*adaptive, MEMORY)
    draw = lambda: torch.rand(HEADS, generator=g).to(dtype)  # noqa: E731
    return Start(
        weights={name: weights(name) for name in names},
        bias={"eta": draw() - 2, "alpha": 2 + draw()},
        write_scale={name: 0.3 + draw() for name in names if name not in ("k", MEMORY)},
        momentum=0.3 + 0.5 * draw() if momentum else None,
        erase=draw() if accumulates else None,
        accumulates=torch.tensor([False, True]) if accumulates else None,
    )


def make_inputs(
    batch: int, tokens: int, adaptive: tuple[str, ...], dtype=torch.float64, seed: int = 1
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    scalar = {name for name in GATES if name not in adaptive}
    shapes = {n: (batch, HEADS, tokens, *(() if n in scalar else (WIDTH,))) for n in PROJECTIONS}
    return {name: torch.randn(*shape, generator=g).to(dtype) for name, shape in shapes.items()}


def leaves(inputs: dict[str, Tensor], start: Start) -> dict[str, Tensor]:
    named = {f"input {n}": t for n, t in inputs.items()}
    named |= {f"{n} weight {i}": w for n, ws in start.weights.items() for i, w in enumerate(ws)}
    named |= {f"bias {n}": t for n, t in start.bias.items()}
    named |= {f"scale {n}": t for n, t in start.write_scale.items()}
    named |= {} if start.momentum is None else {"momentum": start.momentum}
    return named | ({} if start.erase is None else {"erase": start.erase})


def final_weights(state: CoreState, start: Start, rule: WriteRule) -> dict[str, tuple[Tensor, ...]]:
    kernel = kernel_for(start, rule)
    base = kernel.pack()
    carried = state.current
    if rule.retention == "start":
        carried = tuple(b + c for b, c in zip(base, carried, strict=True))
    return kernel.named(carried)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()


def compare(start: Start, rule: WriteRule, batch: int, tokens: int, dtype=torch.float64) -> dict[str, float]:
    """Relative errors of outputs, states and gradients of the fast form against the oracle."""
    adaptive = tuple(n for n in start.names if n != MEMORY)
    inputs = make_inputs(batch, tokens, adaptive, dtype)
    if not rule.decay:
        del inputs["alpha"]
    results = []
    for fast in (False, True):
        named = leaves(inputs, start)
        for t in named.values():
            t.grad = None
            t.requires_grad_(True)
        if fast:
            y, state = self_modify(inputs, start, rule)
            finals = final_weights(state, start, rule)
            stacked = {n: ws for n, ws in finals.items()}
        else:
            y, per_head = reference.self_modify(inputs, start, rule)
            stacked = {
                n: tuple(
                    torch.stack([torch.stack([h[n][i] for h in row]) for row in per_head])
                    for i in range(len(start.weights[n]))
                )
                for n in start.names
            }
        g = torch.Generator().manual_seed(9)
        weigh = lambda t, g=g: (t * torch.randn(t.shape, generator=g).to(dtype)).sum()  # noqa: E731
        loss = weigh(y) + sum(weigh(w) for n in start.names for w in stacked[n])
        grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        results.append((y, stacked, dict(zip(named, grads, strict=True))))
    (y0, s0, g0), (y1, s1, g1) = results
    errors = {"output": relative(y1, y0)}
    errors |= {f"state {n}{i}": relative(s1[n][i], w) for n, ws in s0.items() for i, w in enumerate(ws)}
    for name, slow in g0.items():
        assert (slow is None) == (g1[name] is None), name
        if slow is not None:
            errors[f"gradient of {name}"] = relative(g1[name], slow)
    return errors


RULES = {
    "default": {},
    "stretched": {"stretch": 0.4},
    "l2": {"objective": "l2", "eta_max": 0.5},
    "anchor read": {"read": "anchor"},
    "toward zero, nothing bounded": {
        "retention": "zero",
        "bounded": False,
        "norm_limit": None,
        "normalize_v": False,
        "eta_max": 0.5,
    },
    "printed": {"objective": "l2", "read": "anchor", "retention": "zero", "bounded": False, "eta_max": 0.2},
    "no erasure": {"delta": False},
    "shared values": {"self_values": False},
    "values as long as they come": {"clip_values": False},
    "tight limit": {"norm_limit": 0.1},
}
ALL = ("eta", "alpha", "k", "v")
# Rules other than DGD write one linear memory with given projections.
OTHER_RULES = {
    "delta": {"update": "delta", "eta_max": 1.0},
    "delta without decay": {"update": "delta", "decay": False, "bounded": False, "normalize_v": False},
    "delta toward zero, anchor": {"update": "delta", "retention": "zero", "bounded": False, "read": "anchor"},
    "oja": {"update": "oja"},
    "oja toward zero": {"update": "oja", "retention": "zero", "bounded": False, "norm_limit": None},
    "oja anchor": {"update": "oja", "read": "anchor", "normalize_v": False, "norm_limit": 0.1},
    "omega": {"update": "omega", "objective": "l2", "window": 3, "eta_max": 0.5},
    "omega dot": {"update": "omega", "window": 2, "norm_limit": None},
    "omega l3 toward zero": {"update": "omega", "objective": "l3", "window": 9, "eta_max": 0.2, "retention": "zero"},
    "omega of one": {"update": "omega", "objective": "l2", "read": "anchor", "eta_max": 0.5},
    "hebbian": {"delta": False, "self_values": False, "retention": "zero", "normalize_v": False},
    "l3": {"objective": "l3", "delta": False, "eta_max": 0.2},
    "l1.5": {"objective": "l1.5", "eta_max": 0.2},
    "l1": {"objective": "l1", "delta": False, "eta_max": 0.2},
}


@pytest.mark.parametrize(("chunk", "tokens"), [(1, 6), (4, 11), (6, 23), (16, 33), (64, 70)])
@pytest.mark.parametrize("name", OTHER_RULES)
def test_rules_of_the_zoo_equal_the_oracle(name: str, chunk: int, tokens: int) -> None:
    start = make_start("linear", ())
    rule = WriteRule(chunk_size=chunk, **OTHER_RULES[name])
    if not rule.decay:
        del start.bias["alpha"]
    errors = compare(start, rule, batch=2 if chunk == 4 else 1, tokens=tokens)
    assert max(errors.values()) < 1e-9, errors


@pytest.mark.parametrize("structure", ["linear", "mlp"])
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_equals_the_oracle_in_float64(structure: str, momentum: bool, name: str) -> None:
    start = make_start(structure, ALL, momentum=momentum)
    rule = WriteRule(chunk_size=4, **RULES[name])
    errors = compare(start, rule, batch=2, tokens=11)
    assert max(errors.values()) < 1e-9, errors


@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize(
    "name", ["default", "stretched", "l2", "shared values", "toward zero, nothing bounded", "tight limit"]
)
def test_heads_that_accumulate_equal_the_oracle(momentum: bool, name: str) -> None:
    start = make_start("linear", ALL, momentum=momentum, accumulates=True)
    errors = compare(start, WriteRule(chunk_size=4, **RULES[name]), batch=2, tokens=11)
    assert max(errors.values()) < 1e-9, errors


def test_a_share_of_the_erasure_equals_the_oracle_with_mlp_memories() -> None:
    start = make_start("mlp", ALL, momentum=True, accumulates=True)
    with pytest.raises(UserError, match="have linear memories"):
        kernel_for(start, WriteRule())
    start.accumulates = None
    errors = compare(start, WriteRule(chunk_size=4), batch=2, tokens=11)
    assert max(errors.values()) < 1e-9, errors


@pytest.mark.parametrize("structure", ["linear", "mlp"])
def test_without_decay_equals_the_oracle(structure: str) -> None:
    start = make_start(structure, ("eta", "k", "v"))
    del start.bias["alpha"]
    errors = compare(start, WriteRule(chunk_size=4, decay=False), batch=2, tokens=11)
    assert max(errors.values()) < 1e-9, errors


@pytest.mark.parametrize("structure", ["linear", "mlp"])
@pytest.mark.parametrize(
    ("chunk", "other", "tokens"),
    [
        (1, None, 5),
        (4, None, 9),
        (16, None, 33),
        (64, None, 70),
        (16, 4, 21),
        (4, 16, 21),
        (6, 4, 23),
        (64, 1, 7),
    ],
)
@pytest.mark.parametrize("objective", ["dot", "l2"])
def test_chunk_sizes_and_ragged_lengths(structure: str, chunk: int, other: int | None, tokens: int, objective):
    start = make_start(structure, (*ALL, "q"))
    rule = WriteRule(chunk_size=chunk, chunk_size_other=other, objective=objective, eta_max=0.5)
    errors = compare(start, rule, batch=1, tokens=tokens)
    assert max(errors.values()) < 1e-9, errors


@pytest.mark.parametrize("structure", ["linear", "mlp"])
@pytest.mark.parametrize("adaptive", [(), ("k",), ("eta", "alpha"), ("eta", "v"), ("alpha", "k", "v", "q")])
def test_any_projection_may_be_static(structure: str, adaptive: tuple[str, ...]) -> None:
    errors = compare(make_start(structure, adaptive), WriteRule(chunk_size=4), batch=2, tokens=10)
    assert max(errors.values()) < 1e-9, errors


@pytest.mark.parametrize(("structure", "objective"), list(itertools.product(["linear", "mlp"], ["dot", "l2"])))
def test_float32_stays_close(structure: str, objective: str) -> None:
    start = make_start(structure, ALL, dtype=torch.float32)
    rule = WriteRule(chunk_size=16, objective=objective, eta_max=0.5)
    errors = compare(start, rule, batch=2, tokens=40, dtype=torch.float32)
    assert max(errors.values()) < 1e-4, errors


@pytest.mark.parametrize("structure", ["linear", "mlp"])
def test_outer_gradient_passes_gradcheck(structure: str) -> None:
    """The outer loss is differentiated through every self-modification, by finite differences."""
    start = make_start(structure, ALL, momentum=True)
    inputs = make_inputs(1, 5, ALL)
    rule = WriteRule(chunk_size=2, objective="l2", eta_max=0.5)
    weights = [w for n in start.names for w in start.weights[n]]

    def run(k: Tensor, v: Tensor, q: Tensor, eta: Tensor, alpha: Tensor, b: Tensor, *flat: Tensor) -> Tensor:
        it = iter(flat)
        rebuilt = {n: tuple(next(it) for _ in start.weights[n]) for n in start.names}
        head = Start(rebuilt, start.bias, start.write_scale, b)
        return self_modify({"k": k, "v": v, "q": q, "eta": eta, "alpha": alpha}, head, rule)[0]

    tensors = [*(inputs[name] for name in ("k", "v", "q", "eta", "alpha")), start.momentum, *weights]
    assert torch.autograd.gradcheck(run, [t.detach().requires_grad_() for t in tensors], fast_mode=True)


@pytest.mark.parametrize("structure", ["linear", "mlp"])
def test_every_memory_receives_a_gradient_through_later_outputs_only(structure: str) -> None:
    """The loss looks at tokens after the first chunk; what the first chunk wrote must reach every memory."""
    start = make_start(structure, (*ALL, "q"))
    inputs = make_inputs(1, 12, (*ALL, "q"))
    for ws in start.weights.values():
        for w in ws:
            w.requires_grad_()
    y, _ = self_modify(inputs, start, WriteRule(chunk_size=4))
    y[:, :, 8:].square().sum().backward()
    for name, ws in start.weights.items():
        for w in ws:
            assert w.grad is not None, name
            assert w.grad.abs().max() > 0, name


@pytest.mark.parametrize("structure", ["linear", "mlp"])
@pytest.mark.parametrize("momentum", [False, True])
def test_a_gradient_that_is_differentiated_again_is_the_same_gradient(structure: str, momentum: bool) -> None:
    """Over several segments, each of which is made from what the earlier ones are made from."""
    start, inputs = make_start(structure, ALL, momentum=momentum), make_inputs(1, 7, ALL)
    rule = WriteRule(chunk_size=3)
    named = leaves(inputs, start)
    for t in named.values():
        t.requires_grad_()
    loss = lambda: self_modify(inputs, start, rule)[0].square().sum()  # noqa: E731
    once, again = (torch.autograd.grad(loss(), list(named.values()), create_graph=c) for c in (False, True))
    for name, a, b in zip(named, once, again, strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12), name


@pytest.mark.parametrize("structure", ["linear", "mlp"])
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("name", ["default", "l2"])
def test_second_derivatives_are_those_of_finite_differences(structure: str, momentum: bool, name: str) -> None:
    """A level that learns by its own gradient inside the outer loss differentiates the backward pass."""
    start = make_start(structure, (*ALL, "q"), momentum=momentum)
    inputs = make_inputs(1, 4, (*ALL, "q"))
    rule = WriteRule(chunk_size=2, **{"eta_max": 0.5, **RULES[name]})

    def run(x: Tensor, *flat: Tensor) -> Tensor:
        it = iter(flat)
        rebuilt = {n: tuple(next(it) for _ in start.weights[n]) for n in start.names}
        head = Start(rebuilt, start.bias, start.write_scale, start.momentum)
        return self_modify(dict.fromkeys(PROJECTIONS, x), head, rule)[0]

    tensors = [inputs["k"], *(w for n in start.names for w in start.weights[n])]
    assert torch.autograd.gradgradcheck(run, [t.detach().requires_grad_() for t in tensors], fast_mode=True)


def test_gates_have_no_residual_where_a_head_has_one_channel() -> None:
    torch.manual_seed(0)
    layer = SelfReferentialTitans(4, heads=4, chunk_size=2, memory="mlp").double()
    with torch.no_grad():
        for p in layer.parameters():
            p += 0.3 * torch.randn_like(p)
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    fast = layer(x)[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NESTLEARN_OPS", "reference")
        slow = layer(x)[0]
    assert (fast - slow).abs().max() < 1e-12
    assert not layer.memories["eta"].residual
    assert layer.memories["k"].residual


@pytest.mark.parametrize("structure", ["linear", "mlp"])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("momentum", [False, True])
def test_step_sizes_and_their_gradients_are_those_of_autograd(structure: str, ragged: bool, momentum: bool) -> None:
    """The node of a segment beside the general path, which a transform of torch.func takes."""
    start = make_start(structure, PROJECTIONS, momentum=momentum)
    rule = WriteRule(chunk_size=4, stretch=0.2, objective="dot" if structure == "linear" else "l2")
    g = torch.Generator().manual_seed(1)
    x = {name: torch.randn(3, HEADS, 10, WIDTH, generator=g, dtype=torch.float64) for name in PROJECTIONS}
    lengths = torch.tensor([10, 7, 0]) if ragged else None
    weights = torch.randn(3, HEADS, 10, generator=g, dtype=torch.float64)

    def cost(k: Tensor, told: bool = True) -> Tensor:
        steps: list[Tensor] | None = [] if told else None
        y, _ = self_modify({**x, "k": k}, start, rule, None, lengths, steps)
        assert steps is None or (len(steps) == 1 and steps[0].shape == (3, HEADS, 10))
        return y.square().sum() * 0.1 + ((steps[0] * weights).sum() if steps else 0.0)

    k = x["k"].clone().requires_grad_()
    (node,) = torch.autograd.grad(cost(k), k)
    (without,) = torch.autograd.grad(cost(k, told=False), k)
    assert not torch.allclose(node, without)
    assert torch.allclose(node, torch.func.grad(cost)(x["k"]), atol=1e-11)
    second = torch.autograd.grad(torch.autograd.grad(cost(k), k, create_graph=True)[0].square().sum(), k)[0]
    assert second.isfinite().all()


@pytest.mark.parametrize("structure", ["linear", "mlp"])
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("adaptive", [ALL, ("k", "v", "q")])
@pytest.mark.parametrize("name", ["default", "l2", "anchor read", "no erasure", "shared values"])
def test_every_gradient_of_a_segment_with_padded_rows_is_that_of_autograd(
    structure: str, momentum: bool, adaptive: tuple[str, ...], name: str
) -> None:
    """With a share of the erasure, and a gradient of the state and the momentum at the end."""
    start = make_start(structure, adaptive, momentum=momentum, accumulates=True)
    if structure == "mlp":
        start.accumulates = None
        if name == "shared values":
            pytest.skip("goes by autograd")
    rule, inputs = WriteRule(chunk_size=4, **RULES[name]), make_inputs(3, 10, adaptive)
    named = leaves(inputs, start)
    for t in named.values():
        t.requires_grad_()
    lengths, found = torch.tensor([10, 7, 0]), []
    for by_hand in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            for segments in (LinearSegments, MLPSegments):
                patch.setattr(segments, "covers", classmethod(lambda cls, kernel, on=by_hand: on))
            y, state = self_modify(inputs, start, rule, None, lengths)
        g = torch.Generator().manual_seed(3)
        weigh = lambda t, g=g: (t * torch.randn(t.shape, generator=g, dtype=t.dtype)).sum()  # noqa: E731
        loss = weigh(y[0]) + weigh(y[1, :, :7]) + sum(map(weigh, (*state.current, *state.momentum)))
        found.append(torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True))
    for key, mine, theirs in zip(named, *found, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-11), key


@pytest.mark.parametrize("name", ["reference", "triton"])
def test_step_sizes_are_refused_where_they_are_not_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("NESTLEARN_OPS", name)
    x = {name: torch.zeros(1, HEADS, 2, WIDTH, dtype=torch.float64) for name in PROJECTIONS}
    with pytest.raises(UserError, match=f"NESTLEARN_OPS={name} does not tell the step sizes: take 'torch'"):
        self_modify(x, make_start("linear", PROJECTIONS), WriteRule(), None, None, [])


@pytest.mark.parametrize("structure", ["linear", "mlp"])
def test_a_retained_fraction_near_one_has_its_gradient_in_float32(structure: str) -> None:
    """As heads that accumulate have: 1 - sigmoid has no digit left there."""
    found = []
    for dtype in (torch.float32, torch.float64):
        start, inputs = make_start(structure, ("k", "v"), dtype=dtype), make_inputs(2, 9, ("k", "v"), dtype)
        start.bias["alpha"] = torch.full((HEADS,), 17.0, dtype=dtype, requires_grad=True)
        y, _ = self_modify({**inputs, "alpha": 0 * inputs["alpha"]}, start, WriteRule(chunk_size=4))
        found.append(torch.autograd.grad(y.square().sum(), start.bias["alpha"])[0].double())
    assert relative(*found) < 1e-4

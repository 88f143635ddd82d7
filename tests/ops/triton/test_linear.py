"""The kernels of the linear memories, in Triton's interpreter, against the oracle and the chunk form in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nestlearn.errors import UserError
from nestlearn.nn import SelfReferentialTitans
from nestlearn.ops import GATES, MEMORY, Start, WriteRule, self_modify
from nestlearn.ops.backend import backend
from nestlearn.ops.triton import unsupported
from nestlearn.ops.triton.support import MEMORIES
from tests.ops.triton.parity import (
    Pieces,
    Small,
    errors,
    make_inputs,
    of_layer,
    of_rounded_inputs,
    relative,
    second_derivatives,
    sequence,
    with_nan,
)

RULES: dict[str, tuple[dict, bool]] = {
    "default": ({}, False),
    "tight limit": ({"norm_limit": 0.1}, False),
    "accumulators": ({"stretch": 0.4, "norm_limit": 0.1}, True),
}


def make(heads: int, width: int, dtype: torch.dtype, accumulates: bool = False) -> Start:
    g = torch.Generator().manual_seed(0)
    rows = {name: 1 if name in GATES else width for name in MEMORIES}
    draw = lambda: torch.rand(heads, generator=g).to(dtype)  # noqa: E731
    return Start(
        weights={
            name: ((torch.randn(heads, r, width, generator=g) / width**0.5).to(dtype),) for name, r in rows.items()
        },
        bias={"eta": draw() - 0.5, "alpha": 2 + draw()},
        write_scale={name: 0.3 + draw() for name in MEMORIES if name not in ("k", MEMORY)},
        erase=draw() if accumulates else None,
        accumulates=torch.arange(heads) == heads - 1 if accumulates else None,
    )


@pytest.mark.parametrize("name", RULES)
def test_outputs_states_and_gradients_equal_the_oracle(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    changes, accumulates = RULES[name]
    rule, pieces = WriteRule(chunk_size=16, **changes), [(0, 40, None)]
    found = errors(monkeypatch, lambda dtype: make(2, 16, dtype, accumulates), rule, pieces, against="reference")
    assert max(found.values()) < 2e-5, found


@pytest.mark.parametrize("accumulates", [False, True])
def test_pieces_of_ragged_rows_equal_the_chunk_form(monkeypatch: pytest.MonkeyPatch, accumulates: bool) -> None:
    """States go in and out in the middle of a chunk, rows stand at different places of it, one is empty."""
    pieces: Pieces = [(0, 9, None), (9, 31, [20, 5]), (31, 33, [0, 2]), (33, 40, [7, 6])]
    rule = WriteRule(chunk_size=16, norm_limit=0.1)
    found = errors(monkeypatch, lambda dtype: make(2, 16, dtype, accumulates), rule, pieces, batch=2)
    assert max(found.values()) < 2e-5, found


@pytest.mark.parametrize(
    ("width", "chunk", "tokens", "cut"), [(2, 1, 4, 0), (11, 13, 30, 17), (20, 7, 9, 5), (3, 20, 21, 20)]
)
def test_any_width_chunk_and_length(
    monkeypatch: pytest.MonkeyPatch, width: int, chunk: int, tokens: int, cut: int
) -> None:
    """Not by hypothesis, whose tracing makes the interpreter ten times slower."""
    pieces: Pieces = [(0, cut, None), (cut, tokens, None)]
    rule = WriteRule(chunk_size=chunk, norm_limit=0.5)
    found = errors(monkeypatch, lambda dtype: make(2, width, dtype), rule, pieces)
    assert max(found.values()) < 1e-4, found


def test_the_largest_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    found = errors(monkeypatch, lambda dtype: make(2, 128, dtype), WriteRule(chunk_size=64), [(0, 70, None)])
    assert max(found.values()) < 2e-5, found


def test_a_key_that_repeats_stays_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an expansion of the inverse in powers would cancel: 64 times one key, steps near 2, nothing forgotten."""
    results = []
    for name, dtype in (("torch", torch.float64), ("triton", torch.float32)):
        monkeypatch.setenv("NESTLEARN_OPS", name)
        start = make(1, 16, dtype)
        start.bias = {"eta": torch.full((1,), 4, dtype=dtype), "alpha": torch.full((1,), 9, dtype=dtype)}
        x = make_inputs(1, 1, 1, 16, dtype)
        y, _ = self_modify({n: t.expand(-1, -1, 64, -1) for n, t in x.items()}, start, WriteRule(chunk_size=64))
        results.append(y)
    assert relative(results[1], results[0]) < 1e-4


def test_bfloat16_inputs_keep_a_float32_state(monkeypatch: pytest.MonkeyPatch) -> None:
    start, rule = make(2, 16, torch.float32), WriteRule(chunk_size=16)
    output, state, gradients = of_rounded_inputs(monkeypatch, start, rule, [(0, 40, None)])
    assert output < 1e-2
    assert state < 1e-5
    assert max(gradients.values()) < 1e-2, gradients


def test_second_derivatives_are_those_of_the_chunk_form(monkeypatch: pytest.MonkeyPatch) -> None:
    found = second_derivatives(monkeypatch, lambda dtype: make(1, 4, dtype, True), WriteRule(chunk_size=4), 6)
    assert max(found.values()) < 1e-4, found


def test_a_layer_of_hope_runs_by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = SelfReferentialTitans(dim=32, heads=2, chunk_size=16, accumulators=1)
    output, gradients = of_layer(monkeypatch, layer, [20, 13])
    assert output < 1e-5
    for name, error in gradients.items():
        assert error < 1e-4, name


@pytest.mark.parametrize("name", ["eta", "alpha", "k", "v"])
def test_nan_passes_loudly_and_padding_is_not_looked_at(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    y, state = with_nan(monkeypatch, make(2, 16, torch.float32), WriteRule(chunk_size=16), name)
    assert y[0, :, 4].isnan().all()
    assert state.current[0][0].isnan().any()
    assert y[1].isfinite().all()
    assert not y[1, :, 4:].any()
    assert state.current[0][1].isfinite().all()


def without(name: str) -> Start:
    start = make(2, 4, torch.float32)
    del start.weights[name]
    return start


def refused() -> Iterator[tuple[str, dict, Start]]:
    start = make(2, 4, torch.float32)
    for changes in (
        {"objective": "l2"},
        {"read": "anchor"},
        {"retention": "zero"},
        {"delta": False},
        {"self_values": False},
        {"bounded": False},
        {"normalize_v": False},
        {"clip_values": False},
        {"norm_limit": None},
        {"chunk_size": 65},
        {"chunk_size_other": 3},
    ):
        yield next(iter(changes)), changes, start
    yield "momentum", {}, Start(start.weights, start.bias, momentum=torch.ones(2))
    yield "memories of", {}, without("v")
    yield "130 channels", {}, make(1, 130, torch.float32)
    yield "float64", {}, make(2, 4, torch.float64)


@pytest.mark.parametrize(("named", "changes", "start"), [pytest.param(*r, id=r[0]) for r in refused()])
def test_what_is_not_supported_is_named(
    monkeypatch: pytest.MonkeyPatch, named: str, changes: dict, start: Start
) -> None:
    width = start.weights[MEMORY][0].shape[-1]
    inputs, rule = make_inputs(1, 2, 3, width, torch.float32), WriteRule(**{"chunk_size": 16, **changes})
    assert named in (unsupported(inputs, start, rule) or "")
    monkeypatch.setenv("NESTLEARN_OPS", "triton")
    with pytest.raises(UserError, match=f"NESTLEARN_OPS=triton: .*{named}.* or take NESTLEARN_OPS=torch"):
        self_modify(inputs, start, rule)


def test_torch_func_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NESTLEARN_OPS", "triton")
    start, inputs = make(2, 4, torch.float32), make_inputs(1, 2, 3, 4, torch.float32)

    def loss(q: torch.Tensor) -> torch.Tensor:
        return self_modify({**inputs, "q": q}, start, WriteRule(chunk_size=16))[0].sum()

    with pytest.raises(UserError, match=r"a transform of torch\.func .* or take NESTLEARN_OPS=torch"):
        torch.func.grad(loss)(inputs["q"])


def test_nothing_but_the_variable_chooses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NESTLEARN_OPS", raising=False)
    assert backend() == "torch"


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NESTLEARN_OPS", "triton")
    monkeypatch.setattr(sequence, "INTERPRETED", False)
    with pytest.raises(UserError, match="does not run on 'cpu' here: it takes CUDA"):
        self_modify(make_inputs(1, 2, 3, 4, torch.float32), make(2, 4, torch.float32), WriteRule())


def test_tiles_that_do_not_fit_a_device_are_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NESTLEARN_OPS", "triton")
    monkeypatch.setattr(sequence.LinearLaunch, "forward", Small())
    layer = SelfReferentialTitans(dim=32, heads=2, chunk_size=16)
    with pytest.raises(UserError, match=r"16 tokens by 16 channels does not fit .*409600 needed, 232448 there"):
        layer(torch.zeros(1, 4, 32))

"""The kernels of the MLP memories, in Triton's interpreter, against the oracle and the chunk form in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nestlearn.errors import UserError
from nestlearn.nn import SelfReferentialTitans
from nestlearn.ops import GATES, MEMORY, Start, WriteRule, self_modify
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


def make(heads: int, width: int, hidden: int, dtype: torch.dtype, erase: bool = False) -> Start:
    g = torch.Generator().manual_seed(0)
    draw = lambda: torch.rand(heads, generator=g).to(dtype)  # noqa: E731
    normal = lambda *shape: (torch.randn(heads, *shape, generator=g) / shape[-1] ** 0.5).to(dtype)  # noqa: E731
    return Start(
        weights={n: (normal(1 if n in GATES else width, hidden), normal(hidden, width)) for n in MEMORIES},
        bias={"eta": draw() - 0.5, "alpha": 2 + draw()},
        write_scale={name: 0.3 + draw() for name in MEMORIES if name not in ("k", MEMORY)},
        erase=draw() if erase else None,
    )


def rule_of(chunk_size: int, **changes: object) -> WriteRule:
    return WriteRule(**{"chunk_size": chunk_size, "objective": "l2", **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "erase"), [({}, False), ({"norm_limit": 0.1, "eta_max": 0.1}, False), ({"stretch": 0.4}, True)]
)
def test_outputs_states_and_gradients_equal_the_oracle(
    monkeypatch: pytest.MonkeyPatch, changes: dict, erase: bool
) -> None:
    """Three segments, the last one short."""
    rule, pieces = rule_of(16, **changes), [(0, 36, None)]
    found = errors(monkeypatch, lambda dtype: make(1, 16, 16, dtype, erase), rule, pieces, against="reference")
    assert max(found.values()) < 5e-5, found  # the gradient of a bias is a sum that cancels


def test_pieces_of_ragged_rows_equal_the_chunk_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """States go in and out in the middle of a chunk, rows stand at different places of it, one is empty."""
    pieces: Pieces = [(0, 9, None), (9, 31, [20, 5]), (31, 33, [0, 2])]
    found = errors(monkeypatch, lambda dtype: make(1, 16, 16, dtype), rule_of(16, norm_limit=0.1), pieces, batch=2)
    assert max(found.values()) < 2e-5, found


def test_pieces_equal_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NESTLEARN_OPS", "triton")
    start, inputs, rule = make(1, 16, 16, torch.float32), make_inputs(1, 1, 20, 16, torch.float32), rule_of(16)
    whole, end = self_modify(inputs, start, rule)
    outputs, state = [], None
    for i, j in ((0, 5), (5, 16), (16, 20)):
        y, state = self_modify({n: x[:, :, i:j] for n, x in inputs.items()}, start, rule, state)
        outputs.append(y)
    assert state is not None
    assert torch.equal(state.clock, end.clock)
    assert relative(torch.cat(outputs, 2), whole) < 1e-6
    for a, b in zip((*state.current, *state.anchor), (*end.current, *end.anchor), strict=True):
        assert relative(a, b) < 1e-6


@pytest.mark.parametrize(
    ("width", "hidden", "chunk", "tokens", "cut"), [(2, 3, 1, 3, 0), (11, 20, 13, 15, 4), (20, 7, 7, 9, 5)]
)
def test_any_width_chunk_and_length(
    monkeypatch: pytest.MonkeyPatch, width: int, hidden: int, chunk: int, tokens: int, cut: int
) -> None:
    pieces: Pieces = [(0, cut, None), (cut, tokens, None)]
    rule = rule_of(chunk, norm_limit=0.5)
    found = errors(monkeypatch, lambda dtype: make(1, width, hidden, dtype), rule, pieces)
    assert max(found.values()) < 1e-4, found


def test_the_largest_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    found = errors(monkeypatch, lambda dtype: make(1, 128, 128, dtype), rule_of(64), [(0, 66, None)])
    assert max(found.values()) < 2e-5, found


def test_bfloat16_inputs_keep_a_float32_state(monkeypatch: pytest.MonkeyPatch) -> None:
    start = make(1, 16, 16, torch.float32)
    output, state, gradients = of_rounded_inputs(monkeypatch, start, rule_of(16), [(0, 20, None)])
    assert output < 1e-2
    assert state < 1e-5
    assert max(gradients.values()) < 1e-2, gradients


def test_second_derivatives_are_those_of_the_chunk_form(monkeypatch: pytest.MonkeyPatch) -> None:
    found = second_derivatives(monkeypatch, lambda dtype: make(1, 4, 3, dtype, True), rule_of(4), 6)
    assert max(found.values()) < 1e-4, found


def test_a_layer_of_hope_runs_by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = SelfReferentialTitans(dim=32, heads=2, chunk_size=16, memory="mlp")
    output, gradients = of_layer(monkeypatch, layer, [12, 7])
    assert output < 1e-5
    for name, error in gradients.items():
        assert error < 1e-4, name


@pytest.mark.parametrize("name", ["eta", "alpha", "k", "v"])
def test_nan_passes_loudly_and_padding_is_not_looked_at(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    y, state = with_nan(monkeypatch, make(1, 16, 16, torch.float32), rule_of(16), name)
    assert y[0, :, 4].isnan().all()
    assert state.current[0][0].isnan().any()
    assert y[1].isfinite().all()
    assert not y[1, :, 4:].any()
    assert all(s[1].isfinite().all() for s in state.current)


def refused() -> Iterator[tuple[str, dict, Start]]:
    start = make(2, 4, 4, torch.float32)
    for changes in (
        {"objective": "dot"},
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
    yield "memories of", {}, Start({n: ws for n, ws in start.weights.items() if n != "v"}, start.bias)
    yield "130 channels", {}, make(1, 130, 4, torch.float32)
    yield "memory_hidden=130", {}, make(1, 4, 130, torch.float32)
    yield "float64", {}, make(2, 4, 4, torch.float64)


@pytest.mark.parametrize(("named", "changes", "start"), [pytest.param(*r, id=r[0]) for r in refused()])
def test_what_is_not_supported_is_named(
    monkeypatch: pytest.MonkeyPatch, named: str, changes: dict, start: Start
) -> None:
    heads, _, width = start.weights[MEMORY][-1].shape
    inputs, rule = make_inputs(1, heads, 3, width, torch.float32), rule_of(**{"chunk_size": 16, **changes})
    assert named in (unsupported(inputs, start, rule) or "")
    monkeypatch.setenv("NESTLEARN_OPS", "triton")
    with pytest.raises(UserError, match=f"NESTLEARN_OPS=triton: .*{named}.* or take NESTLEARN_OPS=torch"):
        self_modify(inputs, start, rule)


def test_tiles_that_do_not_fit_a_device_are_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NESTLEARN_OPS", "triton")
    monkeypatch.setattr(sequence.MLPLaunch, "forward", Small())
    layer = SelfReferentialTitans(dim=32, heads=2, chunk_size=16, memory="mlp", memory_hidden=20)
    with pytest.raises(UserError, match=r"16 tokens by 16 channels, 32 hidden, does not fit .*409600 needed"):
        layer(torch.zeros(1, 4, 32))

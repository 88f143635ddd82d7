"""What the tests of the kernels share: in Triton's interpreter, against the chunk form or the oracle in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nestlearn.nn import SelfReferentialTitans
from nestlearn.ops import CoreState, Start, WriteRule, self_modify

pytest.importorskip("triton", reason="needs Triton: pip install -e '.[oracles]'")
sequence = pytest.importorskip("nestlearn.ops.triton.sequence")
OutOfResources = pytest.importorskip("triton.runtime.errors").OutOfResources
if not sequence.INTERPRETED:
    pytest.skip("needs Triton's interpreter: TRITON_INTERPRET=1 before it is imported", allow_module_level=True)

NAMES = ("eta", "alpha", "k", "v", "q")
Pieces = list[tuple[int, int, list[int] | None]]


class Small:
    """A kernel on a device with too little memory."""

    def __getitem__(self, grid: tuple[int]) -> None:
        raise OutOfResources(409_600, 232_448, "shared memory")


def make_inputs(batch: int, heads: int, tokens: int, width: int, dtype: torch.dtype) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {name: torch.randn(batch, heads, tokens, width, generator=g).to(dtype) for name in NAMES}


def leaves(inputs: dict[str, Tensor], start: Start) -> dict[str, Tensor]:
    """Everything that is differentiated by, by name, now with gradients."""
    named = {f"input {n}": t for n, t in inputs.items()}
    named |= {f"{n} weight {i}": w for n, ws in start.weights.items() for i, w in enumerate(ws)}
    named |= {f"bias {n}": t for n, t in start.bias.items()}
    named |= {f"scale {n}": t for n, t in start.write_scale.items()}
    named |= {} if start.erase is None else {"erase": start.erase}
    for t in named.values():
        t.requires_grad_()
    return named


def weigh(*tensors: Tensor) -> Tensor:
    g = torch.Generator().manual_seed(9)
    return torch.stack([(t * torch.randn(t.shape, generator=g).to(t.dtype)).sum() for t in tensors]).sum()


def in_pieces(
    inputs: dict[str, Tensor], start: Start, rule: WriteRule, pieces: Pieces
) -> tuple[Tensor, CoreState, dict[str, Tensor]]:
    """Outputs with those of tokens that do not count at zero, the state, and gradients through all pieces."""
    named, outputs, state = leaves(inputs, start), [], None
    for i, j, lengths in pieces:
        counts = None if lengths is None else torch.tensor(lengths)
        y, state = self_modify({n: t[:, :, i:j] for n, t in inputs.items()}, start, rule, state, counts)
        if counts is not None:
            y = y * (torch.arange(j - i) < counts[:, None])[:, None, :, None]
        outputs.append(y)
    y = torch.cat(outputs, 2)
    grads = torch.autograd.grad(weigh(y, *state.current, *state.anchor), list(named.values()))
    return y, state, dict(zip(named, grads, strict=True))


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-3)).item()


def errors(
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[torch.dtype], Start],
    rule: WriteRule,
    pieces: Pieces,
    batch: int = 1,
    against: str = "torch",
) -> dict[str, float]:
    """Relative errors of the kernels in float32 against the chunk form, or the oracle, in float64."""
    results = []
    for name, dtype in ((against, torch.float64), ("triton", torch.float32)):
        monkeypatch.setenv("NESTLEARN_OPS", name)
        start = make(dtype)
        heads, _, width = start.weights["memory"][-1].shape
        inputs = make_inputs(batch, heads, pieces[-1][1], width, dtype)
        results.append(in_pieces(inputs, start, rule, pieces))
    (y0, s0, g0), (y1, s1, g1) = results
    assert torch.equal(s0.clock, s1.clock)
    found = {"output": relative(y1, y0)}
    for n in ("current", "anchor"):
        pairs = zip(getattr(s1, n), getattr(s0, n), strict=True)
        found |= {f"{n} {i}": relative(a, b) for i, (a, b) in enumerate(pairs)}
    return found | {f"gradient of {n}": relative(g1[n], g0[n]) for n in g0}


def of_rounded_inputs(
    monkeypatch: pytest.MonkeyPatch, start: Start, rule: WriteRule, pieces: Pieces
) -> tuple[float, float, dict[str, float]]:
    """What the kernels in bfloat16 differ by from the chunk form in float32: outputs, state and gradients."""
    heads, _, width = start.weights["memory"][-1].shape
    rounded = {n: t.bfloat16() for n, t in make_inputs(1, heads, pieces[-1][1], width, torch.float32).items()}
    results = []
    for name, inputs in (("torch", {n: t.float() for n, t in rounded.items()}), ("triton", rounded)):
        monkeypatch.setenv("NESTLEARN_OPS", name)
        results.append(in_pieces(inputs, start, rule, pieces))
    (y0, s0, g0), (y1, s1, g1) = results
    assert y1.dtype == torch.bfloat16
    assert s1.current[0].dtype == torch.float32
    state = max(relative(a, b) for a, b in zip(s1.current, s0.current, strict=True))
    return relative(y1, y0), state, {n: relative(g1[n], g0[n]) for n in g0}


def second_derivatives(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[torch.dtype], Start], rule: WriteRule, tokens: int
) -> dict[str, float]:
    """By how much second derivatives by the kernels differ from those by the chunk form."""
    results = []
    for name, dtype in (("torch", torch.float64), ("triton", torch.float32)):
        monkeypatch.setenv("NESTLEARN_OPS", name)
        start = make(dtype)
        heads, _, width = start.weights["memory"][-1].shape
        inputs = make_inputs(1, heads, tokens, width, dtype)
        named = leaves(inputs, start)
        y, _ = self_modify(inputs, start, rule)
        first = torch.autograd.grad(weigh(y), list(named.values()), create_graph=True)
        second = torch.autograd.grad(weigh(*first), list(named.values()))
        results.append(dict(zip(named, second, strict=True)))
    return {n: relative(results[1][n], b) for n, b in results[0].items()}


def of_layer(
    monkeypatch: pytest.MonkeyPatch, layer: SelfReferentialTitans, lengths: list[int]
) -> tuple[float, dict[str, float]]:
    """What a layer by the kernels differs by from the chunk form: outputs that count, and gradients by parameter."""
    x, counts = torch.randn(len(lengths), max(lengths), layer.dim), torch.tensor(lengths)
    results = []
    for name in ("torch", "triton"):
        monkeypatch.setenv("NESTLEARN_OPS", name)
        y, _ = layer(x, lengths=counts)
        y = y * (torch.arange(max(lengths)) < counts[:, None]).unsqueeze(-1)
        results.append((y, torch.autograd.grad(weigh(y), list(layer.parameters()))))
    (y0, g0), (y1, g1) = results
    names = [name for name, _ in layer.named_parameters()]
    return relative(y1, y0), {name: relative(a, b) for name, a, b in zip(names, g1, g0, strict=True)}


def with_nan(monkeypatch: pytest.MonkeyPatch, start: Start, rule: WriteRule, name: str) -> tuple[Tensor, CoreState]:
    """Outputs and state of two rows of six tokens of which ``name`` is NaN at the fifth; it counts in the first."""
    monkeypatch.setenv("NESTLEARN_OPS", "triton")
    heads, _, width = start.weights["memory"][-1].shape
    inputs = make_inputs(2, heads, 6, width, torch.float32)
    inputs[name][:, :, 4] = torch.nan
    return self_modify(inputs, start, rule, None, torch.tensor([6, 4]))

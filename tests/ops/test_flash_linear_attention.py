"""The core against the naive operations of flash-linear-attention (extra ``oracles``).

``test_identities.py`` and ``tests/nn/test_zoo.py`` hold it to closed forms and textbook loops where the package is
absent. Only the files of its naive operations are loaded: the package itself needs Triton.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from nestlearn.ops import MEMORY, Start, WriteRule, self_modify
from nestlearn.ops.rule import unit
from tests.ops.test_parity import HEADS, WIDTH, make_inputs

fla = pytest.importorskip("fla", reason="needs flash-linear-attention: pip install -e '.[oracles]'")
pytest.importorskip("einops", reason="flash-linear-attention's naive operations need einops")

STATIC = {"self_values": False, "retention": "zero", "bounded": False, "normalize_v": False, "norm_limit": None}


def naive(operation: str) -> ModuleType:
    folders = (Path(folder) / "ops" / operation / "naive.py" for folder in fla.__path__)
    path = next(path for path in folders if path.exists())
    spec = importlib.util.spec_from_file_location(f"naive_{operation}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def inputs(tokens: int = 40) -> dict[str, Tensor]:
    x = make_inputs(2, tokens, (), torch.float32)
    # They take q and k as they come and divide q by sqrt(d).
    return x | {"q": unit(x["q"]), "k": unit(x["k"])}


def ours(x: dict[str, Tensor], rule: WriteRule, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Outputs (B, H, T, d) and final memory (B, H, d_v, d_k) from a memory that starts empty."""
    start = Start(
        {MEMORY: (torch.zeros(HEADS, WIDTH, WIDTH),)},
        {"eta": torch.zeros(HEADS), "alpha": torch.full((HEADS,), 2.0) if bias is None else bias},
    )
    y, state = self_modify(x, start, rule)
    return y, state.current[0]


def agree(fast: list[Tensor], theirs: list[Tensor], x: dict[str, Tensor], names: tuple[str, ...]) -> None:
    """Outputs, and gradients with respect to the inputs, of the two."""
    weigh = torch.randn(fast[0].shape, generator=torch.Generator().manual_seed(4))
    for a, b in zip(fast, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)
    wanted = [x[name] for name in names]
    mine = torch.autograd.grad((fast[0] * weigh).sum(), wanted)
    other = torch.autograd.grad((theirs[0] * weigh).sum(), wanted)
    for name, a, b in zip(names, mine, other, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("chunk_size", [1, 16, 64])
def test_delta_rule(chunk_size: int) -> None:
    x = {name: t.requires_grad_() for name, t in inputs().items() if name != "alpha"}
    y, w = ours(x, WriteRule(chunk_size, update="delta", decay=False, eta_max=1.0, **STATIC))
    theirs, s = naive("delta_rule").delta_rule_recurrence(unit(x["q"]), unit(x["k"]), x["v"], x["eta"].sigmoid())
    agree([y, w], [theirs * WIDTH**0.5, s.mT], x, ("q", "k", "v", "eta"))


@pytest.mark.parametrize("chunk_size", [1, 16, 64])
def test_gated_delta_rule(chunk_size: int) -> None:
    x = {name: t.requires_grad_() for name, t in inputs().items()}
    y, w = ours(x, WriteRule(chunk_size, update="delta", eta_max=1.0, **STATIC))
    q, k, v, beta = (t.transpose(1, 2) for t in (unit(x["q"]), unit(x["k"]), x["v"], x["eta"].sigmoid()))
    g = torch.nn.functional.logsigmoid(x["alpha"] + 2).transpose(1, 2)
    gated = naive("gated_delta_rule").naive_recurrent_gated_delta_rule
    theirs, s = gated(q, k, v, beta, g, scale=1.0, output_final_state=True)
    agree([y, w], [theirs.transpose(1, 2), s.mT], x, ("q", "k", "v", "eta", "alpha"))


def test_retention() -> None:
    x = inputs()
    x |= {name: torch.zeros_like(x[name]) for name in ("eta", "alpha")}
    x = {name: t.requires_grad_() for name, t in x.items()}
    bias = (2.0 ** (5 + torch.arange(HEADS)) - 1).log()
    y, _ = ours(x, WriteRule(16, delta=False, eta_max=2.0, **STATIC), bias)
    theirs = naive("retention").naive_retention(unit(x["q"]), unit(x["k"]), x["v"])
    agree([y], [theirs * WIDTH**0.5], x, ("q", "k", "v"))

"""The count of useful operations against what PyTorch counts while the oracle-equal forward pass runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nestlearn.nn import SelfReferentialTitans
from nestlearn.tasks.speed.operations import per_token


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("memory", ["linear", "mlp"])
def test_what_runs_is_the_useful_operations_and_little_more(memory: str, heads: int) -> None:
    dim, chunk, tokens = 64, 16, 64
    layer = SelfReferentialTitans(dim, heads, chunk, memory=memory)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.randn(1, tokens, dim))
    useful, counted = per_token(memory, dim, heads, chunk) * tokens, counter.get_total_flops()
    # Tables are computed whole and counted as their lower triangle; the triangular solve is not counted by PyTorch.
    width = dim // heads
    solve = tokens * heads * chunk * (3 * width + 2 if memory == "linear" else 5 * width)
    assert 0.9 * useful < counted + solve < 1.5 * useful

"""Between what one thread of a program stores in global memory and what another loads there, a barrier stands.

Triton's interpreter runs a program as one thread, so nothing else would notice that one is missing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from nestlearn.nn import SelfReferentialTitans

interpreter = pytest.importorskip("triton.runtime.interpreter", reason="needs Triton: pip install -e '.[oracles]'")
if not pytest.importorskip("triton").knobs.runtime.interpret:
    pytest.skip("needs Triton's interpreter: TRITON_INTERPRET=1 before it is imported", allow_module_level=True)


class Epochs:
    """What a program has loaded and stored since its last barrier, and how often that met the same address."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, barriers: bool) -> None:
        self.conflicts = self.stores = 0
        self.begin()
        for name, before in (
            ("create_masked_load", self.load),
            ("create_masked_store", self.store),
            ("create_barrier", self.begin if barriers else lambda *_: None),
            ("set_grid_idx", self.begin),
        ):
            self.watch(monkeypatch, name, before)

    def watch(self, monkeypatch: pytest.MonkeyPatch, name: str, before: Any) -> None:
        method = getattr(interpreter.InterpreterBuilder, name)

        def watched(builder: Any, *given: Any) -> Any:
            before(*given)
            return method(builder, *given)

        monkeypatch.setattr(interpreter.InterpreterBuilder, name, watched)

    def begin(self, *_: Any) -> None:
        self.loaded, self.stored = set(), set()

    def load(self, at: Any, mask: Any, *_: Any) -> None:
        addresses = set(at.data[mask.data].tolist())
        self.conflicts += not addresses.isdisjoint(self.stored)
        self.loaded |= addresses

    def store(self, at: Any, _: Any, mask: Any, *__: Any) -> None:
        addresses = set(at.data[mask.data].tolist())
        self.stores += 1
        self.conflicts += not addresses.isdisjoint(self.stored | self.loaded)
        self.stored |= addresses


@pytest.mark.parametrize("barriers", [True, False])
@pytest.mark.parametrize("given", [{"accumulators": 1}, {"memory": "mlp"}], ids=["linear", "mlp"])
def test_nothing_is_loaded_or_stored_anew_before_a_barrier(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], barriers: bool
) -> None:
    """Through a state that stands in the middle of a chunk, an accumulating head, and a row without tokens."""
    monkeypatch.setenv("NESTLEARN_OPS", "triton")
    torch.manual_seed(0)
    layer = SelfReferentialTitans(dim=32, heads=2, chunk_size=16, **given)
    epochs = Epochs(monkeypatch, barriers)
    x = torch.randn(2, 40, 32)
    y, state = layer(x[:, :20], lengths=torch.tensor([20, 13]))
    z, _ = layer(x[:, 20:], state, lengths=torch.tensor([20, 0]))
    (y.sum() + z.sum()).backward()
    assert epochs.stores > 100
    assert (epochs.conflicts == 0) == barriers


def test_what_a_mask_leaves_out_is_no_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    epochs = Epochs(monkeypatch, True)
    at, on = (np.arange(4), np.array([True, True, False, False]))
    tensor = lambda data: type("Handle", (), {"data": data})  # noqa: E731
    epochs.store(tensor(at), None, tensor(on))
    epochs.load(tensor(at), tensor(~on))
    assert epochs.conflicts == 0
    epochs.load(tensor(np.array([1])), tensor(np.array([True])))
    assert epochs.conflicts == 1

"""``NESTLEARN_OPS``: the oracle in place of the chunk-parallel form, and what else it may say."""

from __future__ import annotations

import pytest
import torch

from nestlearn.errors import UserError
from nestlearn.ops import WriteRule, self_modify
from tests.ops.test_parity import ALL, make_inputs, make_start


def both(monkeypatch: pytest.MonkeyPatch, *args: object) -> list:
    results = []
    for name in ("torch", "reference"):
        monkeypatch.setenv("NESTLEARN_OPS", name)
        results.append(self_modify(*args))
    return results


@pytest.mark.parametrize("structure", ["linear", "mlp"])
@pytest.mark.parametrize("changes", [{}, {"retention": "zero", "bounded": False, "eta_max": 0.5}])
@pytest.mark.parametrize("momentum", [False, True])
def test_the_oracle_takes_states_and_lengths_as_the_chunk_form_does(
    monkeypatch: pytest.MonkeyPatch, structure: str, changes: dict, momentum: bool
) -> None:
    start = make_start(structure, ALL, momentum=momentum)
    rule = WriteRule(chunk_size=4, chunk_size_other=3, norm_limit=0.5, **changes)
    first, more = make_inputs(2, 9, ALL), make_inputs(2, 6, ALL, seed=5)
    lengths = torch.tensor([9, 5])
    (y0, s0), (y1, s1) = both(monkeypatch, first, start, rule, None, lengths)
    for row, n in enumerate(lengths):
        torch.testing.assert_close(y0[row, :, :n], y1[row, :, :n], rtol=1e-9, atol=1e-12)
    assert torch.equal(s0.clock, s1.clock)
    for group in ("current", "anchor", "momentum"):
        for a, b in zip(getattr(s0, group), getattr(s1, group), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    (z0, _), _ = both(monkeypatch, more, start, rule, s0)
    _, (z1, _) = both(monkeypatch, more, start, rule, s1)
    torch.testing.assert_close(z0, z1, rtol=1e-9, atol=1e-12)


def test_mistakes_get_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    start, x = make_start("linear", ALL), make_inputs(1, 3, ALL)
    monkeypatch.setenv("NESTLEARN_OPS", "tritn")
    with pytest.raises(UserError, match="did you mean 'triton'"):
        self_modify(x, start, WriteRule())
    monkeypatch.setenv("NESTLEARN_OPS", "reference")
    with pytest.raises(UserError, match="omega"):
        self_modify(make_inputs(1, 3, ()), make_start("linear", ()), WriteRule(update="omega", window=2))


def test_triton_is_refused_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nestlearn.ops.backend.importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("NESTLEARN_OPS", "triton")
    with pytest.raises(UserError, match="needs the triton package"):
        self_modify(make_inputs(1, 3, ALL), make_start("linear", ALL), WriteRule())

"""One token at a time equals the chunk-parallel core, and takes the short way where it may."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestlearn.nn import decoding, mixer
from nestlearn.nn.decoding import inside_chunk, write_token
from nestlearn.nn.titans import SelfReferentialTitans
from nestlearn.ops import CoreState, WriteRule, self_modify
from tests.ops.test_parity import ALL, make_inputs, make_start

CASES = st.fixed_dictionaries(
    {
        "objective": st.sampled_from(["dot", "l2", "l3"]),
        "read": st.sampled_from(["anchor", "inclusive"]),
        "retention": st.sampled_from(["zero", "start"]),
        "delta": st.booleans(),
        "decay": st.booleans(),
        "self_values": st.booleans(),
        "bounded": st.booleans(),
        "normalize_v": st.booleans(),
        "clip_values": st.booleans(),
    }
)
ADAPTIVE = st.sampled_from([ALL, ("eta", "alpha", "k", "v"), ("k", "v"), ("eta", "alpha"), ("alpha", "v", "q"), ()])


def close(a: CoreState, b: CoreState) -> None:
    assert torch.equal(a.clock, b.clock)
    for ours, theirs in zip((*a.current, *a.anchor, *a.momentum), (*b.current, *b.anchor, *b.momentum), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@torch.no_grad()
@given(switches=CASES, adaptive=ADAPTIVE, accumulates=st.booleans(), shared=st.booleans())
@settings(max_examples=80, deadline=None)
def test_a_token_equals_the_chunk_parallel_core(switches, adaptive, accumulates, shared) -> None:
    if "alpha" in adaptive and not switches["decay"]:
        adaptive = tuple(name for name in adaptive if name != "alpha")
    rule = WriteRule(chunk_size=8, chunk_size_other=5, norm_limit=0.5, **switches)
    start, x = make_start("linear", adaptive, accumulates=accumulates), make_inputs(2, 12, adaptive)
    if shared:  # memories that read the same tensor share one product
        x |= {name: x["k"] for name in ("eta", "alpha") if name in adaptive}
    piece = {name: x[name][:, :, :11] for name in x}
    token = {id(t): t[:, :, 11:] for t in x.values()}
    token = {name: token[id(t)] for name, t in x.items()}
    _, state = self_modify(piece, start, rule)
    assert inside_chunk(start, rule, state)
    y, ours = write_token(token, start, rule, state)
    expected, theirs = self_modify(token, start, rule, state)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-12)
    close(ours, theirs)


@torch.no_grad()
def test_the_delta_rule_too() -> None:
    rule = WriteRule(chunk_size=8, update="delta", retention="zero")
    start, x = make_start("linear", ()), make_inputs(3, 4, ())
    _, state = self_modify({name: t[:, :, :3] for name, t in x.items()}, start, rule)
    token = {name: t[:, :, 3:] for name, t in x.items()}
    y, ours = write_token(token, start, rule, state)
    expected, theirs = self_modify(token, start, rule, state)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-12)
    close(ours, theirs)


def test_what_it_does_not_cover(monkeypatch) -> None:
    rule, start, x = WriteRule(chunk_size=4), make_start("linear", ALL), make_inputs(2, 6, ALL)
    _, state = self_modify(x, start, rule)
    assert not inside_chunk(start, rule, state)  # a gradient may be asked for
    with torch.no_grad():
        assert inside_chunk(start, rule, state)
        assert not inside_chunk(make_start("linear", ALL, momentum=True), rule, state)
        assert not inside_chunk(make_start("mlp", ALL), rule, state)
        _, ended = self_modify(x, start, rule, lengths=torch.tensor([4, 6]))
        assert not inside_chunk(start, rule, ended)  # the first row begins a chunk
        monkeypatch.setenv("NESTLEARN_OPS", "reference")
        assert not inside_chunk(start, rule, state)


@pytest.mark.parametrize("changes", [{}, {"memory": "mlp"}, {"momentum": True}, {"chunk_size_other": 3}], ids=str)
def test_decoding_independent_streams_equals_one_pass_of_each(changes: dict, monkeypatch) -> None:
    torch.manual_seed(0)
    layer = SelfReferentialTitans(dim=8, heads=2, **{"chunk_size": 4, **changes}).double()
    x, lengths = torch.randn(3, 5 + 14, 8, dtype=torch.float64), torch.tensor([5, 2, 4])
    rows = [torch.cat([row[:n], row[5:]]) for row, n in zip(x, lengths, strict=True)]
    calls = {"token": 0, "chunk": 0}

    def count(name: str, function):
        def counted(*args):
            calls[name] += 1
            return function(*args)

        return counted

    with torch.no_grad():
        whole = [layer(row[None])[0][0, n:] for row, n in zip(rows, lengths, strict=True)]
        monkeypatch.setattr(mixer, "write_token", count("token", decoding.write_token))
        monkeypatch.setattr(mixer, "self_modify", count("chunk", self_modify))
        _, state = layer(x[:, :5], lengths=lengths)
        outputs = []
        for t in range(5, 19):
            y, state = layer(x[:, t : t + 1], state)
            outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), torch.stack(whole), rtol=1e-8, atol=1e-10)
    assert sum(calls.values()) == 1 + 14
    assert (calls["token"] > 0) == (changes in ({}, {"chunk_size_other": 3}))

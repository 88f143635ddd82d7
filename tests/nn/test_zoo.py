"""The architectures of section 5: each is what its name says, streams, and stays bounded."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nestlearn.errors import UserError
from nestlearn.nn import DESIGNS, Design, MemoryLayer, MemoryState
from nestlearn.nn.attention import attend
from nestlearn.ops import kernel_for
from tests.nn import zoo_textbook

DIM, HEADS = 8, 2
EXACT = [name for name, design in DESIGNS.items() if not design.at_anchor]
each_design = pytest.mark.parametrize("design", DESIGNS)


def layer(design: str, chunk_size: int = 4, **options: object) -> MemoryLayer:
    torch.manual_seed(0)
    if design == "omega":
        options = {"window": 3, **options}
    made = MemoryLayer(DIM, HEADS, chunk_size, design=design, **options)  # type: ignore[arg-type]
    with torch.no_grad():  # away from the neutral start: gates, momentum and memories all differ by head
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made.double()


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def final(made: MemoryLayer, state: MemoryState) -> tuple[Tensor, ...]:
    """The memory's own weights, (B, H, ...)."""
    kernel = kernel_for(made.initial(), made.rule)
    carried = state.core.current
    if made.rule.retention == "start":
        carried = tuple(b + c for b, c in zip(kernel.pack(), carried, strict=True))
    return kernel.named(carried)["memory"]


@each_design
def test_is_its_textbook_loop_with_outputs_states_and_gradients(design: str) -> None:
    """Chunks of one token; where the error is that of every single token, chunks of any size."""
    x = tokens(2, 11)
    weigh = torch.randn(2, 11, DIM, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for chunk_size in (1, 4, 64) if design in EXACT else (1,):
        made = layer(design, chunk_size)
        parameters = dict(made.named_parameters())
        y, state = made(x)
        expected, finals = zoo_textbook.run(made, design, x)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)  # angles and RetNet's constants
        for i, w in enumerate(final(made, state)):
            plain = torch.stack([torch.stack([head[i] for head in row]) for row in finals])
            torch.testing.assert_close(w, plain, rtol=1e-9, atol=1e-9)
        ours = torch.autograd.grad((y * weigh).sum(), list(parameters.values()))
        theirs = torch.autograd.grad((expected * weigh).sum(), list(parameters.values()))
        for name, a, b in zip(parameters, ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=f"{name}: {a} {b}")


@each_design
def test_the_chunk_size_is_a_matter_of_speed_for_exact_rules_alone(design: str) -> None:
    x = tokens(1, 70)
    with torch.no_grad():
        outputs = [layer(design, chunk_size)(x)[0] for chunk_size in (1, 7, 16, 64)]
    for y in outputs[1:]:
        same = torch.allclose(y, outputs[0], rtol=1e-9, atol=1e-10)
        assert same == (design in EXACT)


@each_design
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_pieces_equal_one_pass(design: str, data: st.DataObject) -> None:
    chunk_size = data.draw(st.integers(1, 6))
    edges = sorted({0, 14, *data.draw(st.lists(st.integers(0, 14), max_size=4))})
    made, x = layer(design, chunk_size), tokens(2, 14)
    with torch.no_grad():
        whole, end = made(x)
        state, outputs = None, []
        for i, j in pairwise(edges):
            y, state = made(x[:, i:j], state)
            outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-6, atol=1e-7)
    for a, b in zip((*state.core.current, *state.core.momentum), (*end.core.current, *end.core.momentum), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@each_design
@given(lengths=st.tuples(st.integers(0, 9), st.integers(0, 9)), chunk_size=st.integers(1, 6))
@settings(max_examples=12, deadline=None)
def test_a_padded_row_equals_the_row_alone_and_goes_on_equally(
    design: str, lengths: tuple[int, int], chunk_size: int
) -> None:
    made, x, more = layer(design, chunk_size), tokens(2, 9), tokens(2, 5, seed=3)
    with torch.no_grad():
        y, state = made(x, lengths=torch.tensor(lengths))
        y_more, _ = made(more, state)
        for row, n in enumerate(lengths):
            alone, state_alone = made(x[row : row + 1, :n])
            torch.testing.assert_close(y[row : row + 1, :n], alone, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(
                y_more[row : row + 1], made(more[row : row + 1], state_alone)[0], rtol=1e-6, atol=1e-7
            )
            picked = state.index_select(torch.tensor([row])).detach()
            torch.testing.assert_close(made(more[row : row + 1], picked)[0], y_more[row : row + 1])


@each_design
@torch.no_grad()
def test_20k_tokens_leave_the_state_finite_and_bounded(design: str) -> None:
    """One row reads random tokens, the other copies of one token, at initial weights and at three times their size."""
    torch.manual_seed(1)
    copy = torch.randn(1, 1, DIM)
    if DESIGNS[design].attention:
        pieces, size = 10, 200  # attention's own cost grows with the square
    else:
        pieces, size = 4, 5000
    for scale in (1.0, 3.0):
        torch.manual_seed(0)
        made = MemoryLayer(DIM, HEADS, 64, design=design)
        for parameter in made.parameters():
            parameter.mul_(scale)
        state, norms = None, []
        for _ in range(pieces):
            x = torch.cat([torch.randn(1, size, DIM), copy.expand(1, size, DIM)])
            y, state = made(x, state)
            assert y.isfinite().all()
            assert y.abs().max() < 1000
            norms.append(max(t.flatten(2).norm(dim=2).max().item() for t in state.core.current))
        if design in ("linear-attention", "ada-transformer"):  # by definition the sum of all that it was given
            assert norms[-1] > 2 * norms[0]
        elif design in EXACT:  # RetNet holds up to 1 / (1 - gamma) = 64 values
            assert max(norms) < 2000
            assert norms[-1] < 2 * norms[0]
        else:
            # Inside a chunk of copies a state overshoots; matrices of width 4 are held to 2 sqrt(4) at its end.
            assert max(norms) < 5000
            assert max(t.norm(dim=(-2, -1)).max() for t in state.core.anchor if t.numel()) < 4.001


@torch.no_grad()
def test_the_norm_limit_bounds_linear_attention_too() -> None:
    made, x = layer("linear-attention", norm_limit=2.0), tokens(1, 1).expand(1, 2000, DIM)
    _, state = made(x)
    # Two 4 x 4 matrices held to 2 sqrt(4) at chunk boundaries, and what one chunk of four adds.
    assert state.core.current[0].norm(dim=(-2, -1)).max() < 4 + 4 * made.project["v"](made.conv(x)[0]).norm()
    assert layer("linear-attention")(x)[1].core.current[0].norm() > 500


# Closed forms


def bare(design: str, **options: object) -> MemoryLayer:
    """Without convolution and gate, and with an output projection that leaves the normalised memory as it is."""
    made = layer(design, conv_size=1, gate=False, **options)
    with torch.no_grad():
        made.out.weight.copy_(torch.eye(DIM))
        made.norm.weight.fill_(1.0)
        made.conv.weight.fill_(1.0)
    return made


def projections(made: MemoryLayer, x: Tensor) -> tuple[Tensor, ...]:
    parts = (made.project[name](x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for name in ("q", "k", "v"))
    q, k, v = parts
    return q, k, v


def normalised(y_BHTd: Tensor) -> Tensor:
    y = y_BHTd * (y_BHTd.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    return y.transpose(1, 2).flatten(-2)


@pytest.mark.parametrize("design", ["linear-attention", "retnet"])
def test_linear_attention_and_retention_are_masked_products(design: str) -> None:
    made, x = bare(design), tokens(2, 13)
    q, k, v = projections(made, x)
    q, k = (t / t.norm(dim=-1, keepdim=True) for t in (q, k))
    mask = torch.ones(HEADS, 13, 13, dtype=torch.float64).tril()
    if design == "retnet":
        gamma = 1 - 2.0 ** (-5 - torch.arange(HEADS, dtype=torch.float64))
        behind = torch.arange(13)[:, None] - torch.arange(13)
        mask = mask * gamma[:, None, None] ** behind
    expected = normalised(((q @ k.mT) * mask) @ v)
    torch.testing.assert_close(made(x)[0], expected, rtol=1e-4, atol=1e-5)  # unit() smooths the length at zero


def test_the_adaptive_transformer_without_writes_is_attention_and_a_matrix() -> None:
    made, x = bare("ada-transformer", eta_max=1e-30), tokens(2, 13)
    q, k, v = projections(made, x)
    y, _ = attend(q, k, v, None, None, made.rope_theta)
    expected = normalised((y / y.norm(dim=-1, keepdim=True)) @ made.initial().weights["memory"][0].mT)
    torch.testing.assert_close(made(x)[0], expected, rtol=1e-4, atol=1e-5)


def test_omega_with_a_window_of_one_is_a_delta_rule() -> None:
    """With chunks of one token and no decay of what was learned, a step on the last pair alone is Eq. 65."""
    x = tokens(2, 9)
    rule = replace(DESIGNS["deltanet"].rule, update="omega", objective="l2", bounded=False)
    one = layer(Design(rule, gates=("eta",)), chunk_size=1)  # type: ignore[arg-type]
    torch.testing.assert_close(one(x)[0], layer("deltanet", chunk_size=1)(x)[0], rtol=1e-9, atol=1e-10)


def test_a_design_of_ones_own() -> None:
    own = Design(replace(DESIGNS["gated-deltanet"].rule, eta_max=2.0))
    made = MemoryLayer(DIM, HEADS, design=own)
    assert made.rule.eta_max == 2.0
    assert made(torch.randn(1, 5, DIM))[0].shape == (1, 5, DIM)


def test_steps_and_starts_that_suit_the_rule() -> None:
    def fresh(design: str, chunk_size: int, **options: float) -> MemoryLayer:
        return MemoryLayer(DIM, HEADS, chunk_size, design=design, **options)

    assert [fresh("ttt-linear", c).rule.eta_max for c in (1, 8, 64)] == [0.5, 0.5, 4 / 64]
    assert fresh("ttt-linear", 64, eta_max=0.3).rule.eta_max == 0.3
    assert [fresh("titans", c).rule.eta_max for c in (1, 64)] == pytest.approx([0.05, 0.4 / 64])
    assert fresh("deltanet", 64).rule.eta_max == 1.0
    assert torch.equal(fresh("ada-transformer", 4).start["memory"][0][1], torch.eye(4))
    assert fresh("ttt-linear", 4).start["memory"][0].abs().max() < 0.1
    assert not fresh("gated-deltanet", 4).start


# Numbers and mistakes


@each_design
def test_states_stay_float32_and_seeds_repeat(design: str) -> None:
    x = torch.randn(1, 6, DIM, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, state = layer(design).float()(x)
    assert {t.dtype for t in (*state.core.current, *state.core.momentum)} == {torch.float32}
    _, state = layer(design).bfloat16()(x.bfloat16())
    assert {t.dtype for t in state.core.current} == {torch.float32}
    assert torch.equal(layer(design).float()(x)[0], layer(design).float()(x)[0])


@each_design
def test_silence_has_a_finite_gradient(design: str) -> None:
    made = layer(design, **({"objective": "l1.5"} if design == "miras" else {}))
    made(torch.zeros(1, 9, DIM, dtype=torch.float64))[0].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in made.parameters())


def test_mistakes_get_one_clear_line() -> None:
    for options, message in [
        ({"design": "deltanett"}, "did you mean 'deltanet'"),
        ({"heads": 3}, "heads=3 must divide dim=8"),
        ({"norm_limits": 1.0}, "unknown option 'norm_limits': did you mean 'norm_limit'"),
        ({"norm_limit": 0.0}, "must be positive"),
        ({"chunk_size": 0}, "positive number of tokens"),
        ({"window": 0}, "window must be a positive number"),
        ({"design": "miras", "objective": "l0.5"}, "needs p >= 1"),
        ({"design": "miras", "objective": "huber"}, "unknown objective 'huber'"),
        ({"objective": "l2"}, "has an objective of its own"),
        ({"design": "titans", "update": "oja", "objective": "dot"}, "update='oja' writes one linear memory"),
        ({"design": "ttt-mlp", "memory_hidden": 0}, "at least 1"),
        ({"design": "ada-transformer", "heads": 8}, "even integer"),
        ({"retained": (0.5, 1.5)}, "between 0 and 1"),
    ]:
        with pytest.raises(UserError, match=message):
            MemoryLayer(**{"dim": DIM, "heads": HEADS, "design": "gated-deltanet", **options})


def test_a_state_of_another_window_is_refused() -> None:
    _, state = layer("omega")(tokens(1, 5))
    with pytest.raises(UserError, match="Omega's window"):
        layer("omega", window=4)(tokens(1, 5), state)

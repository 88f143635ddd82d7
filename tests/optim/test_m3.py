"""M3 against Algorithm 1 and its identities (SPEC section 11.2)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nestlearn.errors import UserError
from nestlearn.optim import M3, Muon, reference

BETAS = (0.9, 0.99, 0.8)


def gradients(count, shape=(8, 12), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [0.1 * torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(count)]


def run(grads, optimizer_class=M3, scale=1.0, **kwargs):
    p = nn.Parameter(torch.ones(grads[0].shape, dtype=torch.float64))
    optimizer = optimizer_class([p], **{"lr": 0.1, "adjust": "none", **kwargs})
    for g in grads:
        p.grad = scale * g
        optimizer.step()
    return p.detach(), optimizer.state[p]


def close(a, b, tolerance=1e-10):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 25), st.integers(1, 7), st.floats(0, 2), st.booleans(), st.booleans())
def test_equals_algorithm_1(count, chunk, alpha, ema, second_moment):
    grads = gradients(count)
    start = torch.ones(8, 12, dtype=torch.float64)
    options = dict(betas=BETAS, alpha=alpha, eps=1e-8)
    expected = reference.m3(start, grads, 0.1, chunk=chunk, ema=ema, second_moment=second_moment, **options)
    mode, denom = "ema" if ema else "paper", "paper" if second_moment else "none"
    close(run(grads, chunk_size=chunk, mode=mode, denom=denom, **options)[0], expected)


def test_without_slow_memory_and_second_moment_it_is_muon_without_nesterov():
    grads = gradients(23)
    options = dict(momentum=0.9, nesterov=False)
    close(run(grads, alpha=0.0, betas=BETAS, denom="none")[0], run(grads, Muon, **options)[0])


def test_without_orthogonalisation_and_slow_memory_it_is_adam_without_bias_correction():
    grads = gradients(23)
    w, m, v = torch.ones(8, 12).double(), 0.0, 0.0
    for g in grads:
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g
        w = w - 0.1 * m / (v.sqrt() + 1e-8)
    close(run(grads, alpha=0.0, steps=0, betas=BETAS, denom="paper")[0], w)


@pytest.mark.parametrize("denom", ["relative", "paper", "none"])
def test_the_first_chunk_has_no_slow_memory(denom):
    grads = gradients(10)
    close(run(grads, chunk_size=10, denom=denom)[0], run(grads, alpha=0.0, denom=denom)[0])
    longer = gradients(11)
    assert not torch.allclose(run(longer, chunk_size=10, denom=denom)[0], run(longer, alpha=0.0, denom=denom)[0])


def test_slow_memory_is_an_ema_of_chunk_means_one_chunk_late():
    grads, expected = gradients(23), torch.zeros(8, 12).double()
    for n in range(4):
        expected = 0.8 * expected + 0.2 * torch.stack(grads[5 * n : 5 * n + 5]).mean(0)
    _, state = run(grads, chunk_size=5, betas=BETAS)
    close(state["slow_orthogonal"], reference.newton_schulz(expected))
    _, later = run(gradients(24), chunk_size=5, betas=BETAS)
    close(later["slow_orthogonal"], reference.newton_schulz(expected))


@pytest.mark.parametrize("mode", ["ema", "paper"])
def test_the_printed_step_is_inverse_to_the_gradient_and_the_default_is_free_of_its_scale(mode):
    """SPEC 11.2: a loss times 100 divides the printed update by 100."""
    grads = gradients(23)
    for denom, ratio in (("paper", 100.0), ("relative", 1.0), ("none", 1.0)):
        moved = [(run(grads, scale=s, mode=mode, denom=denom, eps=0.0)[0] - 1).norm() for s in (1.0, 100.0)]
        assert moved[0] / moved[1] == pytest.approx(ratio, rel=1e-6)


def test_relative_division_keeps_the_size_of_the_update():
    for g in (gradients(1)[0], torch.zeros(8, 12).double(), torch.eye(8, 12).double()):
        relative, plain = (run([g], denom=denom)[0] - 1 for denom in ("relative", "none"))
        assert relative.isfinite().all()
        close(relative.norm(), plain.norm())


def test_relative_division_favours_elements_of_small_gradient():
    grads = gradients(30)
    for g in grads:
        g[:, :6] *= 10
    relative, plain = ((run(grads, denom=denom)[0] - 1).square().mean(0) for denom in ("relative", "none"))
    assert (relative[6:].sum() / relative[:6].sum()) > 1.5 * (plain[6:].sum() / plain[:6].sum())


def test_without_second_moment_none_is_kept():
    assert "second_moment" not in run(gradients(1), denom="none")[1]
    assert "second_moment" in run(gradients(1))[1]


def test_batched_equals_single_also_when_a_gradient_was_missing():
    """A matrix that missed a step is one step behind in its chunk, and is not mixed up with the others."""
    ends = []
    for foreach in (True, False):
        params = [nn.Parameter(torch.zeros(4, 6, dtype=torch.float64)) for _ in range(3)]
        optimizer = M3(params, chunk_size=2, foreach=foreach)
        for step, group in enumerate(zip(*(gradients(7, (4, 6), seed) for seed in range(3)), strict=True)):
            for i, (p, g) in enumerate(zip(params, group, strict=True)):
                p.grad = None if i == step == 1 else g.clone()
            optimizer.step()
        ends.append(torch.stack([p.detach() for p in params]))
    close(*ends)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"betas": (0.9, 0.99)}, "three fractions"),
        ({"betas": (0.9, 0.99, 1.2)}, "three fractions"),
        ({"betas": 0.9}, "three fractions"),
        ({"betas": ("0.9", "0.99", "0.9")}, "three fractions"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"chunk_size": True}, "chunk_size=True"),
        ({"lr": "0.1"}, "lr='0.1'"),
        ({"lr": None}, "lr=None"),
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"mode": "papr"}, "did you mean 'paper'"),
        ({"denom": "sqrt"}, "relative"),
    ],
)
def test_mistakes_are_one_line(wrong, words):
    with pytest.raises(UserError, match=words):
        M3([nn.Parameter(torch.zeros(2, 2))], **wrong)


def test_a_module_is_not_a_list_of_parameters():
    with pytest.raises(UserError, match=r"M3 got the module Linear: give its parameters, M3\(model.parameters"):
        M3(nn.Linear(2, 2))

"""The loss of a learner, whose gradient takes the place of the logits, against PyTorch's."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from nestlearn.learner import cross_entropy as module
from nestlearn.learner.cross_entropy import NOTHING, cross_entropy


def _theirs(logits, targets, above):
    leaf = logits.clone().requires_grad_()
    losses = F.cross_entropy(leaf, targets, ignore_index=NOTHING, reduction="none")
    return losses.detach(), torch.autograd.grad((losses * above).sum(), leaf)[0]


def _ours(logits, targets, above):
    leaf = logits.clone().requires_grad_()
    losses = cross_entropy(leaf * 1, targets)  # * 1: a tensor that it may overwrite
    return losses.detach(), torch.autograd.grad((losses * above).sum(), leaf)[0]


@settings(deadline=None)
@given(
    tokens=st.integers(0, 9),
    words=st.integers(1, 12),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1000.0]),
    ones=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_losses_and_gradients_are_those_of_pytorch_whatever_the_pieces(tokens, words, scale, ones, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", 2 * words)
        generator = torch.Generator().manual_seed(seed)
        logits = scale * torch.randn(tokens, words, generator=generator, dtype=torch.float64)
        targets = torch.randint(0, words, (tokens,), generator=generator)
        targets[torch.rand(tokens, generator=generator) < 0.3] = NOTHING
        above = torch.ones(tokens) if ones else torch.randn(tokens, generator=generator)
        for mine, theirs in zip(_ours(logits, targets, above), _theirs(logits, targets, above), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_an_answer_whose_share_is_rounded_to_zero_has_a_finite_loss():
    losses = cross_entropy(torch.tensor([[0.0, -500.0]]), torch.tensor([1]))
    assert losses.tolist() == [500.0]


def test_what_is_not_finite_stays_so():
    logits = torch.tensor([[0.0, float("nan")], [float("inf"), 0.0], [0.0, float("-inf")]])
    losses = cross_entropy(logits, torch.tensor([0, 0, 1]))
    assert losses.isnan().tolist() == [True, True, False]
    assert losses[2] == float("inf")


def test_logits_are_overwritten_only_for_a_gradient():
    logits = torch.randn(3, 5)
    before = logits.clone()
    with torch.no_grad():
        cross_entropy(logits, torch.tensor([0, 1, 2]))
    assert torch.equal(logits, before)


def test_logits_that_another_gradient_needs_are_refused():
    leaf = torch.randn(2, 4, requires_grad=True)
    logits = leaf.tanh()  # which keeps its result for its own gradient
    losses = cross_entropy(logits, torch.tensor([0, 1]))
    with pytest.raises(RuntimeError, match="inplace"):
        losses.sum().backward()

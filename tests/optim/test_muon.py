"""Muon against `torch.optim.Muon`, and the split of a whole model between matrices and AdamW."""

import pytest
import torch
from torch import nn

from nestlearn.errors import UserError
from nestlearn.optim import Muon, matrix_groups, newton_schulz
from nestlearn.optim.matrices import adjustment


def train(optimizer, p, steps=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (32, 32)])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_equals_torch_muon_to_the_rounding_of_bfloat16(shape, nesterov, adjust):
    """torch multiplies in bfloat16, so a step may differ by its 8 bits; 20 steps must not differ by more."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    settings = dict(lr=0.02, momentum=0.95, nesterov=nesterov, weight_decay=0.1)
    moved = train(Muon([ours], adjust=adjust, **settings), ours) - start
    expected = train(torch.optim.Muon([theirs], adjust_lr_fn=adjust, **settings), theirs) - start
    assert ((moved - expected).norm() / expected.norm()).item() < 2**-6


def test_equals_torch_muon_exactly_where_newton_schulz_is_off():
    """With no steps sigma only normalises: what is left to differ is one rounding of bfloat16 a step."""
    start = torch.randn(8, 12, generator=torch.Generator().manual_seed(1))
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    moved = train(Muon([ours], lr=0.1, steps=0), ours) - start
    expected = train(torch.optim.Muon([theirs], lr=0.1, ns_steps=0, weight_decay=0.0), theirs) - start
    assert ((moved - expected).norm() / expected.norm()).item() < 2**-8


def test_a_convolution_is_a_matrix_per_output():
    w = torch.randn(6, 3, 2, 2, dtype=torch.float64)
    kernel, matrix = nn.Parameter(w.clone()), nn.Parameter(w.flatten(1).clone())
    for p, optimizer in ((kernel, Muon([kernel])), (matrix, Muon([matrix]))):
        p.grad = torch.arange(72, dtype=torch.float64).sin().view(p.shape)
        optimizer.step()
    torch.testing.assert_close(kernel.flatten(1), matrix)


@pytest.mark.parametrize("orthogonalization", ["newton-schulz", "learned"])
def test_batched_equals_single(orthogonalization):
    grads = [torch.randn(5, 9, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    ends = []
    for foreach in (True, False):
        params = [nn.Parameter(torch.zeros(5, 9)) for _ in range(3)]
        optimizer = Muon(params, orthogonalization=orthogonalization, foreach=foreach)
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        ends.append(torch.stack([p.detach() for p in params]))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-7)


def test_learned_orthogonalisation_is_near_newton_schulz():
    g = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    p = nn.Parameter(torch.zeros(16, 24))
    optimizer = Muon([p], lr=1.0, orthogonalization="learned", adjust="none")
    p.grad = g.clone()
    optimizer.step()
    cosine = torch.nn.functional.cosine_similarity(-p.detach().flatten(), newton_schulz(g).flatten(), dim=0)
    assert cosine > 0.95


def test_vectors_are_trained_by_adamw():
    start = torch.randn(7)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    moved = train(Muon([ours], adam_lr=0.01, adam_betas=(0.9, 0.99), weight_decay=0.1), ours)
    expected = train(torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.99), weight_decay=0.1), theirs)
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-6)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 4)
        self.mix = nn.Conv1d(4, 6, 3)
        self.depthwise = nn.Conv1d(6, 6, 3, groups=6)
        self.norm = nn.LayerNorm(6)
        self.stack = nn.Parameter(torch.randn(2, 6, 6))
        self.frozen = nn.Linear(6, 6, bias=False).requires_grad_(False)
        self.head = nn.Linear(6, 11, bias=False)

    def get_output_embeddings(self):
        return self.head


def test_groups_of_a_model():
    model = Model()
    groups = [[name for name, _ in group["params"]] for group in matrix_groups(model)]
    assert groups == [
        ["mix.weight"],
        ["stack", "table.weight", "depthwise.weight", "head.weight"],
        ["mix.bias", "depthwise.bias", "norm.weight", "norm.bias"],
    ]
    optimizer = Muon(matrix_groups(model), lr=0.5, adam_lr=0.25, weight_decay=0.125)
    assert [(g["lr"], g["weight_decay"], g["adam"]) for g in optimizer.param_groups] == [
        (0.5, 0.125, False),
        (0.25, 0.125, True),
        (0.25, 0.0, True),
    ]


def test_every_given_group_is_split_and_both_halves_follow_a_schedule():
    a, b = nn.Linear(3, 4), nn.Linear(4, 2)
    groups = [{"params": a.parameters(), "lr": 0.1}, {"params": b.parameters(), "lr": 0.2, "adam_lr": 0.01}]
    optimizer = Muon(groups, adam_lr=0.03)
    assert [(g["adam"], g["lr"]) for g in optimizer.param_groups] == [
        (False, 0.1),
        (True, 0.03),
        (False, 0.2),
        (True, 0.01),
    ]
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.015, 0.1, 0.005]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"orthogonalization": "newton"}, "newton-schulz"),
        ({"adjust": "originl"}, "did you mean 'original'"),
        ({"steps": -1}, "steps=-1"),
        ({"adam_betas": (0.9, 1.0)}, "adam_betas"),
        ({"adam_betas": "0.9"}, "adam_betas='0.9': give two fractions"),
        ({"adam_betas": ("0.9", "0.99")}, "give two fractions"),
        ({"adam_betas": (0.9,)}, "give two fractions"),
        ({"momentum": 2.0}, "momentum=2.0"),
    ],
)
def test_mistakes_are_one_line(wrong, words):
    with pytest.raises(UserError, match=words):
        Muon([nn.Parameter(torch.zeros(2, 2))], **wrong)


@pytest.mark.parametrize("given", [nn.Linear(2, 2).parameters(), [nn.Parameter(torch.zeros(2, 2))], None])
def test_groups_are_made_of_a_model_and_not_of_parameters(given):
    with pytest.raises(UserError, match=f"matrix_groups got a {type(given).__name__}: give it the model"):
        matrix_groups(given)


def test_adjustment():
    assert adjustment(torch.Size([8, 2]), "original") == 2.0
    assert adjustment(torch.Size([2, 8]), "original") == 1.0
    assert adjustment(torch.Size([2, 2, 2]), "match_rms_adamw") == 0.4
    assert adjustment(torch.Size([8, 2]), "none") == 1.0

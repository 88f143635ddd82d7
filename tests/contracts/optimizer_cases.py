"""Every optimizer by name, and the small real problem that the contract puts to each."""

import inspect
import io
import math

import torch
from torch import nn

from nestlearn import optim
from nestlearn.optim import matrix_groups

# Name: a constructor from a module and a learning rate, and a learning rate that suits the small problems below.
PARAMS = {
    "momentum": (lambda m, lr, **k: optim.Momentum(m.named_parameters(), lr, **k), 0.05),
    "momentum-orthogonal": (
        lambda m, lr, **k: optim.Momentum(m.named_parameters(), lr, output="orthogonal", **k),
        0.03,
    ),
    "preconditioned": (lambda m, lr, **k: optim.PreconditionedMomentum(m.named_parameters(), lr, **k), 0.003),
    "feature": (lambda m, lr, **k: optim.FeatureMomentum(m.named_parameters(), lr, **k), 0.05),
    "delta": (lambda m, lr, **k: optim.DeltaMomentum(m.named_parameters(), lr, **k), 0.05),
    "delta-inf": (lambda m, lr, **k: optim.DeltaMomentum(m.named_parameters(), lr, erase=math.inf, **k), 0.05),
    "delta-elements": (lambda m, lr, **k: optim.DeltaMomentum(m.named_parameters(), lr, keys="elements", **k), 0.05),
    "deep": (lambda m, lr, **k: optim.DeepMomentum(m.named_parameters(), lr, **k), 0.02),
    "muon": (lambda m, lr, **k: optim.Muon(m.named_parameters(), lr, adam_lr=lr / 2, **k), 0.05),
    "muon-learned": (
        lambda m, lr, **k: optim.Muon(matrix_groups(m), lr, adam_lr=lr / 2, orthogonalization="learned", **k),
        0.05,
    ),
    "m3": (lambda m, lr, **k: optim.M3(m.named_parameters(), lr, adam_lr=lr / 2, chunk_size=3, **k), 0.03),
    "m3-groups": (lambda m, lr, **k: optim.M3(matrix_groups(m), lr, adam_lr=lr / 2, chunk_size=3, **k), 0.03),
}
MODULES = {
    "dgd": (lambda m, lr, **k: optim.DGD(m, lr, **k), 0.1),
    "dgd-explicit": (lambda m, lr, **k: optim.DGD(m, lr, mode="explicit", **k), 0.05),
    "ggd": (lambda m, lr, **k: optim.GGD(m, lr, **k), 0.05),
    "generalized": (lambda m, lr, **k: optim.GeneralizedMomentum(m, lr, **k), 0.03),
}
EVERY = {**PARAMS, **MODULES}
FORGETTING = ("dgd", "dgd-explicit", "ggd")


class Small(nn.Module):
    """A table, a matrix, a convolution and vectors: one of each kind of parameter."""

    def __init__(self, seed=0, dtype=torch.float32, vocabulary=128):
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(vocabulary, 12)
        self.mix = nn.Conv1d(12, 16, 2)
        self.norm = nn.LayerNorm(16)
        self.hidden = nn.Linear(16, 16)
        self.head = nn.Linear(16, vocabulary)
        self.to(dtype)

    def forward(self, ids):
        x = self.mix(self.table(ids).mT).mT
        return self.head(torch.tanh(self.hidden(self.norm(x))))

    def loss(self, ids):
        logits = self(ids[:, :-1]).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 2:].flatten())


def text():
    """Real bytes that every machine has: the source of a module of the standard library."""
    return torch.tensor([min(ord(c), 127) for c in inspect.getsource(io)])


def batches(count, seed=0, length=24, size=8):
    ids, generator = text(), torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(ids) - length, (count, size), generator=generator)
    return [torch.stack([ids[s : s + length] for s in row]) for row in starts]


def steps(model, optimizer, data):
    for batch in data:
        optimizer.zero_grad()
        model.loss(batch).backward()
        optimizer.step()


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))

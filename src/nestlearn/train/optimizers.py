"""The optimizers that a run can be trained with, by name (`nestlearn.train.recipe.OPTIMIZERS`), over a whole model.

Every one decays matrices alone, decoupled from the gradient, by ``lr * weight_decay`` a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from nestlearn import optim
from nestlearn.errors import UserError, nearest

BETAS = (0.9, 0.95)  # of AdamW, also where it trains what Muon and M3 leave over
MOMENTUM = 0.9
# The learning rate of AdamW inside Muon and M3, as a share of theirs: 0.003 beside Muon's usual 0.02.
ADAM_SHARE = 0.15

Groups = list[dict[str, Any]]


def build(name: str, model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
    """The optimizer called ``name`` over the trainable parameters of ``model``.

    Args:
        name: ``"adamw"``, ``"sgd-momentum"`` (torch's), ``"momentum"`` (Eq. 33), ``"delta-momentum"`` (Eq. 49),
            ``"deep-momentum"`` (Eq. 50), ``"preconditioned"`` (Eq. 47), ``"feature"`` (Eq. 51), ``"muon"`` or
            ``"m3"`` (Eq. 75).
        model: its embeddings, heads and vectors go to AdamW at ``ADAM_SHARE * lr`` under Muon and M3.
        lr: peak step size, in the units of the optimizer's own class.
        weight_decay: in units of ``lr``.

    Raises:
        UserError: an unknown name, or a number below zero or not finite.

    >>> [group["weight_decay"] for group in build("momentum", nn.Linear(3, 2), 0.1, 0.05).param_groups]
    [0.05, 0.0]
    """
    if name not in BUILDERS:
        raise UserError(f"unknown optimizer '{name}'; {nearest(name, BUILDERS)}")
    for what, value in (("lr", lr), ("weight_decay", weight_decay)):
        if not 0 <= value < math.inf:
            raise UserError(f"{name} got {what}={value}: it must be a finite number, 0 or more")
    return BUILDERS[name](model, lr, weight_decay)


def split_decay(groups: Groups, weight_decay: float) -> Groups:
    """Each group of named parameters as two: what has two dimensions or more decays, vectors do not.

    >>> [group["params"][0][0] for group in split_decay([{"params": [*nn.Linear(3, 2).named_parameters()]}], 0.1)]
    ['weight', 'bias']
    """
    split = []
    for group in groups:
        for decay, wanted in ((weight_decay, True), (0.0, False)):
            named = [(name, p) for name, p in group["params"] if (p.ndim >= 2) == wanted]
            if named:
                split.append({**group, "params": named, "weight_decay": decay})
    return split


def _all(model: nn.Module, weight_decay: float) -> Groups:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return split_decay([{"params": named}], weight_decay)


def _adamw(model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
    # Fused is 3.5 times faster than the plain loop on a CPU. A model that is only a structure has no kernel for it.
    fused = not any(p.is_meta for p in model.parameters())
    return torch.optim.AdamW(_all(model, weight_decay), lr=lr, betas=BETAS, eps=1e-8, fused=fused)


def _sgd(model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
    # torch adds the decay to the gradient, and momentum sums it up: this share of it sums to the decoupled one.
    groups = _all(model, (1 - MOMENTUM) * weight_decay)
    return torch.optim.SGD(groups, lr=lr, momentum=MOMENTUM)


def _of_all(optimizer: Callable[..., Optimizer]) -> Callable[[nn.Module, float, float], Optimizer]:
    """A builder of an optimizer that treats every parameter alike."""
    return lambda model, lr, weight_decay: optimizer(_all(model, weight_decay), lr=lr)


def _of_matrices(optimizer: Callable[..., Optimizer]) -> Callable[[nn.Module, float, float], Optimizer]:
    """A builder of an optimizer that orthogonalises hidden matrices and leaves the rest to AdamW."""

    def build(model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
        groups = split_decay(optim.matrix_groups(model), weight_decay)
        return optimizer(groups, lr=lr, adam_lr=ADAM_SHARE * lr, adam_betas=BETAS)

    return build


BUILDERS: dict[str, Callable[[nn.Module, float, float], Optimizer]] = {
    "adamw": _adamw,
    "sgd-momentum": _sgd,
    "momentum": _of_all(optim.Momentum),
    "delta-momentum": _of_all(optim.DeltaMomentum),
    "deep-momentum": _of_all(optim.DeepMomentum),
    "preconditioned": _of_all(optim.PreconditionedMomentum),
    "feature": _of_all(optim.FeatureMomentum),
    "muon": _of_matrices(optim.Muon),
    "m3": _of_matrices(optim.M3),
}

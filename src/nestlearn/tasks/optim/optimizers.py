"""The optimizers of all experiments by name: those that a run can be trained with, and peers for comparison only."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from nestlearn import optim
from nestlearn.errors import UserError, nearest
from nestlearn.train import optimizers as trained
from nestlearn.train.optimizers import ADAM_SHARE, BETAS, split_decay

PEER = {"package": "pytorch_optimizer", "install": "pip install --no-deps pytorch-optimizer==4.1.0"}


def build(name: str, model: nn.Module, lr: float, weight_decay: float = 0.0) -> Optimizer:
    """The optimizer called ``name`` over the trainable parameters of ``model``.

    Args:
        name: a name of `nestlearn.train.optimizers.build`, or one of
            ``"delta-momentum-inf"``: delta momentum that always forgets half along the gradient (``erase=math.inf``);
            ``"m3-paper"``: M3 to the letter, sums without decay and the division by ``sqrt(V)``;
            ``"adamuon"``: AdaMuon of the package pytorch-optimizer, with Muon's scale of the learning rate.
        model: under Muon, M3 and AdaMuon its embeddings, heads and vectors go to AdamW at ``ADAM_SHARE * lr``,
            0.003 beside Muon's usual 0.02, so that one search covers both rates; under ``"m3-paper"`` always at 0.003.
        lr: in the units of the optimizer's class.
        weight_decay: decoupled, in units of ``lr``; of matrices alone.

    Raises:
        UserError: an unknown name, a package that is not installed, or a number that the optimizer refuses.

    >>> [group["lr"] for group in build("m3-paper", nn.Linear(3, 2), 0.02).param_groups]
    [0.02, 0.003]
    """
    if name not in NAMES:
        raise UserError(f"unknown optimizer '{name}'; {nearest(name, NAMES)}")
    reason = missing(name)
    if reason is not None:
        raise UserError(reason)
    if name in PEERS:
        return PEERS[name](model, lr, weight_decay)
    return trained.build(name, model, lr, weight_decay)


def missing(name: str) -> str | None:
    """Why the optimizer cannot be built here, in one line; ``None`` if it can."""
    if name == "adamuon" and importlib.util.find_spec(PEER["package"]) is None:
        return f"adamuon needs a package that is not installed: {PEER['install']}"
    return None


def _delta_inf(model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
    return optim.DeltaMomentum(_groups(model, weight_decay), lr=lr, erase=math.inf)


def _m3_paper(model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
    # Its lr has the unit of a gradient, so AdamW's stays at the share of Muon's usual 0.02.
    groups = split_decay(optim.matrix_groups(model), weight_decay)
    return optim.M3(groups, lr=lr, mode="paper", denom="paper", adam_lr=ADAM_SHARE * 0.02, adam_betas=BETAS)


def _adamuon(model: nn.Module, lr: float, weight_decay: float) -> Optimizer:
    from pytorch_optimizer import AdaMuon

    groups = []
    for group in split_decay(optim.matrix_groups(model), weight_decay):
        params = [p for _, p in group["params"]]
        if group.get("adam"):
            inner = dict(use_muon=False, lr=ADAM_SHARE * lr, betas=BETAS, eps=1e-8)
            groups.append({"params": params, "weight_decay": group["weight_decay"], **inner})
        else:
            groups.append({"params": params, "weight_decay": group["weight_decay"], "use_muon": True, "lr": lr})
    return AdaMuon(groups, use_adjusted_lr=False)  # the shape's factor is then that of Muon


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return split_decay([{"params": named}], weight_decay)


PEERS: dict[str, Callable[[nn.Module, float, float], Optimizer]] = {
    "delta-momentum-inf": _delta_inf,
    "m3-paper": _m3_paper,
    "adamuon": _adamuon,
}
NAMES = (*trained.BUILDERS, *PEERS)

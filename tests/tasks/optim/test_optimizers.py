"""The one table of optimizers of the experiments."""

import importlib.util
import math

import pytest
import torch
from torch import nn

from nestlearn.errors import UserError
from nestlearn.tasks.optim import MODEL_OPTIMIZERS
from nestlearn.tasks.optim.optimizers import NAMES, build, missing
from nestlearn.tasks.optim.search import CENTRES

HERE = [name for name in NAMES if missing(name) is None]
RATES = {"m3-paper": 1e-2, "preconditioned": 1e-3} | dict.fromkeys(["sgd-momentum", "momentum", "feature"], 0.1)


def small_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4))


@pytest.mark.parametrize("name", HERE)
def test_every_optimizer_learns(name: str) -> None:
    model = small_model()
    optimizer = build(name, model, RATES.get(name, 1e-2))
    tokens, target = torch.arange(7), torch.sin(torch.arange(28.0)).view(7, 4)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(tokens) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", [name for name in ("muon", "m3", "m3-paper", "adamuon") if name in HERE])
def test_one_search_covers_the_inner_adam(name: str) -> None:
    model = small_model()
    groups = build(name, model, 0.02, weight_decay=0.1).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for parameter_name, p in model.named_parameters():
        hidden = parameter_name in ("1.weight", "3.weight")
        assert rates[id(p)] == pytest.approx(0.02 if hidden else 0.003)
        assert decays[id(p)] == (0.1 if p.ndim > 1 else 0.0)
    assert len(rates) == len(list(model.parameters()))


def test_variants_are_what_their_names_say() -> None:
    model = small_model()
    assert build("delta-momentum-inf", model, 0.1).param_groups[0]["erase"] == math.inf
    assert build("delta-momentum", model, 0.1).param_groups[0]["erase"] == 1
    paper, ours = (build(name, model, 0.1).param_groups[0] for name in ("m3-paper", "m3"))
    assert (paper["mode"], paper["denom"], paper["adam_lr"]) == ("paper", "paper", 0.003)  # whatever its own rate
    assert (ours["mode"], ours["denom"]) == ("ema", "relative")


def test_unknown_names_and_missing_packages_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="did you mean 'muon'"):
        build("muonn", small_model(), 0.1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="adamuon needs a package that is not installed: pip install"):
        build("adamuon", small_model(), 0.1)
    assert missing("muon") is None


def test_every_searched_optimizer_exists() -> None:
    assert {name for centres in CENTRES.values() for name in centres} <= set(NAMES)
    for experiment in ("vision", "language"):
        assert set(CENTRES[experiment]) == set(MODEL_OPTIMIZERS[experiment])

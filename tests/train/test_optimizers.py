"""The optimizers of a recipe: what they train and decay, and runs that end, resume and fail like those of AdamW."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer

from nestlearn import optim
from nestlearn.errors import UserError
from nestlearn.train.callbacks import read_metrics
from nestlearn.train.model import build as build_model
from nestlearn.train.model import model_config
from nestlearn.train.optimizers import ADAM_SHARE, BUILDERS, build
from nestlearn.train.recipe import OPTIMIZERS, Recipe, changes, dump, parse
from nestlearn.train.run import read_data, train
from nestlearn.train.trainer import LanguageModelTrainer, training_arguments

MATRIX = ("muon", "m3")


class Net(nn.Module):
    """An embedding, a convolution, a matrix with its bias, and a frozen matrix."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(5, 4)
        self.kernel = nn.Conv1d(4, 4, 3, padding=1)
        self.hidden = nn.Linear(4, 6)
        self.frozen = nn.Linear(2, 2, bias=False).requires_grad_(False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.hidden(self.kernel(self.table(ids).mT).mT)


def test_the_names_of_a_recipe_are_those_that_can_be_built() -> None:
    assert tuple(BUILDERS) == OPTIMIZERS


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_trainable_parameter_is_in_one_group(name: str) -> None:
    model = Net()
    groups = build(name, model, 0.01, 0.1).param_groups
    found = [
        (group_name, p) for group in groups for group_name, p in zip(group["param_names"], group["params"], strict=True)
    ]
    expected = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(found) == len(expected)
    assert all(expected[n] is p for n, p in found)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_learns(name: str) -> None:
    model = Net()
    ids = torch.arange(5)[None]
    target = torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(1))
    optimizer = build(name, model, 0.02, 0.0)

    def loss() -> torch.Tensor:
        return (model(ids) - target).square().mean()

    before = loss().item()
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.8 * before


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_matrices_alone_decay_and_by_the_same_share(name: str) -> None:
    """Without a gradient a step is the decay, at the group's own rate, once momentum has settled."""
    model = Net()
    lr, weight_decay, settled = 0.1, 0.05, 200
    optimizer = build(name, model, lr, weight_decay)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    before = {}
    for step in range(settled + 1):
        if step == settled:
            before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.step()
    for n, p in model.named_parameters():
        adam = name in MATRIX and n == "table.weight"
        share = (ADAM_SHARE if adam else 1.0) * lr * weight_decay
        decayed = before[n] * (1 - share) if p.ndim > 1 and p.requires_grad else before[n]
        torch.testing.assert_close(p.detach(), decayed, rtol=3e-4, atol=0)  # SGD's momentum lags by a term of share^2


@pytest.mark.parametrize("name", MATRIX)
def test_tables_and_vectors_go_to_adamw_at_its_share(name: str) -> None:
    groups = build(name, Net(), 0.02, 0.1).param_groups
    rates = {n: (group["adam"], group["lr"]) for group in groups for n in group["param_names"]}
    assert rates["hidden.weight"] == rates["kernel.weight"] == (False, 0.02)
    assert rates["table.weight"] == rates["hidden.bias"] == (True, pytest.approx(0.003))


@pytest.mark.parametrize("name", ["muno", "adam", "", "M3"])
def test_unknown_name_is_one_line(name: str) -> None:
    expected = f"unknown optimizer '{name}'; .*allowed: adamw, "
    with pytest.raises(UserError, match=expected) as caught:
        build(name, Net(), 0.1, 0.0)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=f"unknown train.optimizer '{name}' in recipe; .*allowed: adamw, ") as caught:
        parse(f'[train]\noptimizer = "{name}"')
    assert "\n" not in str(caught.value)
    if name == "muno":
        assert "did you mean 'muon'?" in str(caught.value)


def test_a_recipe_of_an_older_version_means_adamw(recipe: Recipe) -> None:
    old = "".join(line for line in dump(recipe).splitlines(keepends=True) if not line.startswith("optimizer"))
    assert "optimizer" not in old
    assert parse(old) == recipe
    assert changes(recipe, parse(old)) == ""
    assert parse(dump(recipe.replace("train", optimizer="m3"))).train.optimizer == "m3"


def trainer_of(recipe: Recipe, folder: Path) -> LanguageModelTrainer:
    data = read_data(recipe)
    return LanguageModelTrainer(
        model=build_model(model_config(recipe.model, data.tokenizer, recipe.data.sequence_length)),
        args=training_arguments(recipe, folder),
        train_dataset=data.train,
        eval_dataset=data.validation,
        tokenizer=data.tokenizer,
        recipe=recipe,
        fingerprint=data.fingerprint,
    )


def test_adamw_is_the_trainers_own(hope_recipe: Recipe, tmp_path: Path) -> None:
    """By default nothing has changed, and what `build` gives is the same optimizer."""
    trainer = trainer_of(hope_recipe, tmp_path)
    own = Trainer.create_optimizer(trainer)
    trainer.optimizer = None
    chosen = trainer.create_optimizer()
    built = build("adamw", trainer.model, hope_recipe.train.learning_rate, hope_recipe.train.weight_decay)
    keys = ("lr", "betas", "eps", "weight_decay", "fused", "amsgrad", "maximize")
    for other in (chosen, built):
        assert type(other) is type(own) is torch.optim.AdamW
        for a, b in zip(own.param_groups, other.param_groups, strict=True):
            assert [a[key] for key in keys] == [b[key] for key in keys]
            assert [id(p) for p in a["params"]] == [id(p) for p in b["params"]]


@pytest.fixture(scope="module")
def m3_recipe(hope_recipe: Recipe) -> Recipe:
    """12 steps of Hope with M3, whose slow momentum is read for the first time in step 11."""
    recipe = hope_recipe.replace("baseline", kind="none")
    return recipe.replace("train", optimizer="m3", learning_rate=0.02, max_grad_norm=0.05)


@pytest.fixture(scope="module")
def whole(m3_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a whole run gives: its weights and rows, the rates of both groups and the gradient norm of each step."""
    seen: dict[str, Any] = {"rates": [], "norms": [], "folder": tmp_path_factory.mktemp("whole") / "run"}
    original = optim.M3.step

    def spy(self: optim.M3, *args: Any, **kwargs: Any) -> Any:
        rates = {bool(group["adam"]): group["lr"] for group in self.param_groups}
        seen["rates"].append((rates[False], rates[True]))
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        seen["norms"].append(torch.stack([g.norm() for g in grads]).norm().item())
        return original(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optim.M3, "step", spy)
        train(m3_recipe, seen["folder"])
    return seen


def test_schedule_and_clipping_reach_both_groups(m3_recipe: Recipe, whole: dict[str, Any]) -> None:
    rates = whole["rates"]
    assert len(rates) == m3_recipe.steps
    assert all(adam == pytest.approx(ADAM_SHARE * matrices) for matrices, adam in rates)
    peak = max(matrices for matrices, _ in rates)
    assert peak == pytest.approx(0.02)
    assert rates[0][0] < peak / 1.9  # warm-up
    assert rates[-1][0] < peak / 10  # cosine
    limit = m3_recipe.train.max_grad_norm
    assert max(whole["norms"]) <= limit * 1.001
    assert max(row["grad_norm"] for row in read_metrics(whole["folder"] / "metrics.jsonl") if "loss" in row) > limit


def test_interrupted_and_resumed_is_bit_identical(
    m3_recipe: Recipe, whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in step 11, after the checkpoint of step 9: within the first chunk of the slow momentum."""
    original = LanguageModelTrainer.training_step

    def stopping(self: LanguageModelTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 10:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModelTrainer, "training_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(m3_recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "model.safetensors").exists()
    train(m3_recipe, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (whole["folder"] / "model.safetensors").read_bytes()
    resumed, straight = (
        [row["loss"] for row in read_metrics(folder / "metrics.jsonl") if "loss" in row]
        for folder in (tmp_path / "run", whole["folder"])
    )
    assert resumed == straight


def test_the_name_stands_in_the_run_and_guards_a_resume(m3_recipe: Recipe, whole: dict[str, Any]) -> None:
    assert 'optimizer = "m3"' in (whole["folder"] / "run.toml").read_text()
    with pytest.raises(UserError, match=r"another recipe .train.optimizer differ"):
        train(m3_recipe.replace("train", optimizer="muon"), whole["folder"], resume=True)


def test_a_run_that_diverges_is_one_line(m3_recipe: Recipe, tmp_path: Path) -> None:
    recipe = m3_recipe.replace("train", optimizer="momentum", learning_rate=1e30, max_grad_norm=0.0)
    with pytest.raises(UserError, match="start again with a lower learning rate") as caught:
        train(recipe, tmp_path / "run")
    assert "\n" not in str(caught.value)

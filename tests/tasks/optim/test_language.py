"""The language model of section 9.7: the recipe's own path, a test text of its own, and an end when it diverges."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nestlearn import optim
from nestlearn.errors import UserError
from nestlearn.tasks.optim import language
from nestlearn.tasks.optim.language import halves
from nestlearn.train.evaluate import evaluate_text
from nestlearn.train.recipe import load_preset
from nestlearn.train.trainer import LanguageModelTrainer

KEYS = {
    *("train_loss", "validation_loss", "test_loss", "bits_per_byte", "seconds_per_step", "optimizer_seconds_per_step"),
    *("steps", "tokens", "parameters", "curve", "diverged"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("".join(f"line {i}: {i * i % 97} foxes jump over {i % 13} dogs\n" for i in range(400)))
    return str(path)


def run(source: str, optimizer: str = "adamw", lr: float = 3e-3, seed: int = 0) -> dict[str, Any]:
    return language.train(optimizer, lr, seed, "smoke", source)


def numbers(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result.items() if "seconds" not in key}


@pytest.mark.parametrize("optimizer", ["adamw", "m3", "m3-paper"])
def test_a_result_has_every_key_and_repeats_to_the_bit(source: str, optimizer: str) -> None:
    result = run(source, optimizer, 1e-3)
    assert result.keys() == KEYS
    assert not result["diverged"]
    assert result["steps"] == language.STEPS["smoke"]
    assert result["tokens"] == 4 * 4 * 64
    assert [step for step, _ in result["curve"]] == [1, 2, 3, 4]
    assert 0 < result["optimizer_seconds_per_step"] < result["seconds_per_step"]
    json.dumps(result, allow_nan=False)
    assert numbers(run(source, optimizer, 1e-3)) == numbers(result)
    assert numbers(run(source, optimizer, 1e-3, seed=1)) != numbers(result)


def test_it_learns_and_bits_are_of_the_test_text(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(language.STEPS, "smoke", 80)
    result = run(source, "muon", 0.02)
    assert result["curve"][0][1] > 5
    assert max(result["train_loss"], result["validation_loss"], result["test_loss"]) < 3.2
    assert len({result["train_loss"], result["validation_loss"], result["test_loss"]}) == 3
    # One token is one byte of this text.
    assert result["bits_per_byte"] == pytest.approx(result["test_loss"] / torch.log(torch.tensor(2.0)).item(), rel=1e-5)


def seen(source: str, optimizer: str, monkeypatch: pytest.MonkeyPatch) -> tuple[str, type]:
    """What a run's recipe says, and the class of the optimizer that took its steps."""
    found: list[tuple[str, type]] = []
    original = LanguageModelTrainer.training_step

    def spy(self: LanguageModelTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        found.append((self._recipe.train.optimizer, type(self.optimizer.optimizer)))
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModelTrainer, "training_step", spy)
        run(source, optimizer, 1e-3)
    assert len(set(found)) == 1
    return found[0]


def test_the_recipe_names_the_optimizer_if_it_can(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert seen(source, "m3", monkeypatch) == ("m3", optim.M3)
    assert seen(source, "adamw", monkeypatch) == ("adamw", torch.optim.AdamW)
    assert seen(source, "m3-paper", monkeypatch) == ("adamw", optim.M3)  # a peer is handed over


def test_the_recipe_is_the_preset_but_for_budget_batch_and_optimizer() -> None:
    recipe, preset = language._recipe("m3", 0.01, 5, "cpu", "stdlib"), load_preset("tiny")
    assert recipe.model == preset.model
    assert recipe.data == preset.data
    assert recipe.seed == 5
    same = {"warmup", "schedule", "weight_decay", "max_grad_norm", "gradient_accumulation", "precision"}
    assert all(getattr(recipe.train, name) == getattr(preset.train, name) for name in same)
    assert (recipe.train.optimizer, recipe.train.learning_rate) == ("m3", 0.01)
    assert (recipe.steps, recipe.train.batch_size) == (language.STEPS["cpu"], 2)
    assert recipe.baseline.kind == "none"


def test_the_test_text_is_no_part_of_the_validation_text(source: str, tmp_path: Path) -> None:
    recipe = language._recipe("adamw", 0.01, 0, "smoke", source)
    corpus = language._read(recipe.data, 4).corpus
    assert "".join([*corpus.validation, *corpus.test]) in Path(source).read_text()
    assert corpus.validation[0].endswith("\n")
    for number in range(60):
        (tmp_path / f"{number}.txt").write_text(f"document {number} " * (40 + number))
    corpus = language._read(language._recipe("adamw", 0.01, 0, "smoke", str(tmp_path)).data, 4).corpus
    assert corpus.validation
    assert corpus.test
    assert not set(corpus.validation) & set(corpus.test)
    assert not {*corpus.validation, *corpus.test} & set(corpus.train)


def test_a_test_split_of_the_source_is_the_test_text(tmp_path: Path) -> None:
    for name in ("train", "valid", "test"):
        (tmp_path / f"wiki.{name}.txt").write_text(f"the {name} text of many words\n" * 60)
    corpus = language._read(language._recipe("adamw", 0.01, 0, "smoke", str(tmp_path)).data, 4).corpus
    assert [text[:9] for text in (*corpus.train, *corpus.validation, *corpus.test)] == [
        *("the train", "the valid", "the test ")
    ]


@pytest.mark.parametrize("documents", [["one"], ["a\nb\nc\nd"], ["x\n"], ["1", "2"], ["1", "2", "3", "4", "5"]])
def test_halves_lose_nothing_and_share_nothing(documents: list[str]) -> None:
    first, second = halves(documents)
    assert sorted("".join([*first, *second])) == sorted("".join(documents))
    assert first
    assert second
    assert abs(len(first) - len(second)) <= 1


@pytest.mark.parametrize(("optimizer", "lr"), [("momentum", 1e30), ("m3", 1e30), ("adamw", 1e30)])
def test_a_run_that_diverges_says_so(source: str, optimizer: str, lr: float) -> None:
    result = run(source, optimizer, lr)
    assert result.keys() == KEYS
    assert result["diverged"]
    assert result["train_loss"] is result["validation_loss"] is result["test_loss"] is result["bits_per_byte"] is None
    json.dumps(result, allow_nan=False)


def test_a_loss_that_is_not_finite_at_the_end_is_a_divergence(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = evaluate_text

    def spoiled(model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        next(model.parameters()).data.fill_(float("nan"))
        return original(model, *args, **kwargs)

    monkeypatch.setattr(language, "evaluate_text", spoiled)
    result = run(source)
    assert result["diverged"]
    assert result["steps"] == language.STEPS["smoke"]
    assert result["test_loss"] is None


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("adamm", 0.1, 0, "smoke", "DATA"), "unknown optimizer 'adamm'; did you mean 'adamw'"),
        (("adamw", 0.1, 0, "smok", "DATA"), "unknown scale 'smok'; did you mean 'smoke'"),
        (("adamw", 0.1, 0, "smoke", "absent.txt"), "absent.txt' does not exist"),
        (("adamw", -0.1, 0, "smoke", "DATA"), "learning_rate in recipe must be at least 0"),
    ],
)
def test_mistakes_are_one_line(source: str, arguments: tuple, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        language.train(*(source if argument == "DATA" else argument for argument in arguments))
    assert "\n" not in str(caught.value)

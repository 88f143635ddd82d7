"""A run folder holds what it promises, a run repeats to the bit, and the baseline learns from the same tokens."""

import hashlib
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nestlearn.errors import UserError
from nestlearn.files import alone
from nestlearn.train.callbacks import read_metrics
from nestlearn.train.curves import plot_curves
from nestlearn.train.recipe import Recipe, dump, load_recipe
from nestlearn.train.run import LOCK, resolve, train
from nestlearn.train.trainer import LanguageModelTrainer, training_arguments


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The batches of every model that is trained, by the name of its class, as hashes."""
    batches: dict[str, list[str]] = {}
    original = LanguageModelTrainer.training_step

    def spy(self: LanguageModelTrainer, model: torch.nn.Module, inputs: dict, *args: Any) -> torch.Tensor:
        name = hashlib.sha256(inputs["input_ids"].numpy().tobytes()).hexdigest()
        batches.setdefault(type(model).__name__, []).append(name)
        return original(self, model, inputs, *args)

    monkeypatch.setattr(LanguageModelTrainer, "training_step", spy)
    return batches


def test_run_folder(hope_recipe: Recipe, tmp_path: Path, seen: dict[str, list[str]]) -> None:
    out = tmp_path / "run"
    result = train(hope_recipe, out)

    assert seen["HopeForCausalLM"] == seen["LlamaForCausalLM"]
    assert len(set(seen["HopeForCausalLM"])) == 12 * 2

    hope, baseline = result["models"]
    assert (hope["model"], baseline["model"]) == ("hope", "transformer++")
    assert abs(baseline["parameters"] - hope["parameters"]) <= 0.02 * hope["parameters"]
    for entry in (hope, baseline):
        assert entry["steps"] == 12
        assert entry["tokens"] == 12 * 128
        assert entry["tokens_per_second"] > 0
        assert 1 < entry["validation"]["perplexity"] < 400
        bits = entry["validation"]["nats"] / math.log(2) / entry["validation"]["bytes"]
        assert entry["validation"]["bits_per_byte"] == pytest.approx(bits)

    layout = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    layout |= {"metrics.jsonl", "result.json", "run.toml"}
    assert {path.name for path in out.iterdir()} == layout | {"curves.png", "baseline"}
    assert {path.name for path in (out / "baseline").iterdir()} == layout
    assert json.loads((out / "result.json").read_text()) == {k: v for k, v in result.items() if k != "folder"}

    for folder, name in ((out, "HopeForCausalLM"), (out / "baseline", "LlamaForCausalLM")):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert type(model).__name__ == name
        assert model.config.use_cache
        assert model.config.max_position_embeddings == 32
        assert len(AutoTokenizer.from_pretrained(folder)) == model.config.vocab_size

    rows = read_metrics(out / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))
    assert [row["step"] for row in rows if "eval_loss" in row] == [4, 8, 12]
    assert rows[-1]["tokens"] == 12 * 128
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]


def test_repeating_from_its_own_recipe_gives_the_same_weights(hope_recipe: Recipe, tmp_path: Path) -> None:
    train(hope_recipe, tmp_path / "one")
    train(load_recipe(tmp_path / "one" / "run.toml"), tmp_path / "two")
    assert digest(tmp_path / "one" / "model.safetensors") == digest(tmp_path / "two" / "model.safetensors")
    # the baseline's own recipe trains it alone
    train(load_recipe(tmp_path / "one" / "baseline" / "run.toml"), tmp_path / "three")
    alone, beside = tmp_path / "three", tmp_path / "one" / "baseline"
    assert digest(alone / "model.safetensors") == digest(beside / "model.safetensors")
    assert (alone / "run.toml").read_text() == (beside / "run.toml").read_text()


def test_the_seed_matters(recipe: Recipe, tmp_path: Path) -> None:
    train(recipe, tmp_path / "one")
    train(recipe.replace(seed=4), tmp_path / "two")
    assert digest(tmp_path / "one" / "model.safetensors") != digest(tmp_path / "two" / "model.safetensors")


def test_no_noise(recipe: Recipe, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(recipe, tmp_path / "run")
    out, err = capfd.readouterr()
    assert out == ""
    lines = [line for line in err.replace("\r", "\n").split("\n") if line.strip()]
    assert all(line.startswith("transformer++:") for line in lines), err
    assert "12/12" in lines[-1]
    assert "tokens/s" in lines[-1]


def test_only_matrices_decay(hope_recipe: Recipe) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3), torch.nn.Embedding(4, 2))
    names = LanguageModelTrainer.get_decay_parameter_names(None, model)  # pyrefly: ignore
    assert names == ["0.weight", "2.weight"]


def test_arguments_of_the_trainer(recipe: Recipe, tmp_path: Path) -> None:
    arguments = training_arguments(recipe.replace("train", warmup=0.3, schedule="constant"), tmp_path)
    assert arguments.max_steps == 12
    assert arguments.warmup_steps == 4
    assert arguments.lr_scheduler_type == "constant_with_warmup"
    assert arguments.report_to == []
    assert training_arguments(recipe.replace("train", precision="bf16"), tmp_path).bf16
    assert not training_arguments(recipe.replace("train", precision="fp32"), tmp_path).bf16


def test_existing_folder_is_never_overwritten(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty: add --resume"):
        train(recipe, tmp_path / "run")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file"):
        train(recipe, tmp_path / "file")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious.txt"]


def test_one_process_trains_in_a_folder(recipe: Recipe, tmp_path: Path) -> None:
    with alone(tmp_path / "run" / LOCK, ""):
        for resume in (False, True):
            with pytest.raises(UserError, match=r"another process trains in .*: wait for it, or give another folder"):
                train(recipe, tmp_path / "run", resume)
            (tmp_path / "run" / "run.toml").write_text(dump(resolve(recipe)))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["run.toml"]


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("data", {"source": "absent.txt"}, "absent.txt"),
        ("data", {"sequence_length": 100_000}, "one sequence needs 100000"),
        ("train", {"batch_size": 500}, "less than one batch of 500"),
        ("train", {"tokens": 5}, "less than one step"),
        ("model", {"hidden_sise": 5}, "did you mean 'hidden_size'"),
        ("baseline", {"kind": "transformer++"}, "like the model"),
    ],
)
def test_a_refused_run_leaves_no_folder(
    recipe: Recipe, tmp_path: Path, section: str, values: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        train(recipe.replace("train", tokens=10**7).replace(section, **values), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_what_training_needs_is_asked_for_before_anything_is_written(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(UserError, match=r"training needs accelerate: pip install 'nestlearn\[train\]'"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_curves_are_a_picture(tmp_path: Path) -> None:
    rows = [{"tokens": 10 * i, "loss": 5.0 / i} for i in range(1, 9)] + [{"tokens": 80, "eval_loss": 0.7}]
    plot_curves(tmp_path / "curves.png", {"hope": rows, "transformer++": rows, "empty": []}, "on a_$b_$.txt")
    content = (tmp_path / "curves.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 10_000

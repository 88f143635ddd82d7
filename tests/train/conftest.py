"""A run small enough for a test: 12 thousand parameters, a generated text, a few hundred tokens."""

from pathlib import Path

import pytest
import torch

from nestlearn.train.recipe import BaselineRecipe, DataRecipe, ModelRecipe, Recipe, TrainRecipe
from nestlearn.train.run import train

SIZES = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text("".join(f"line {i}: {i * i % 97} foxes jump over {i % 13} dogs\n" for i in range(120)))
    return path


@pytest.fixture(scope="session")
def recipe(text: Path) -> Recipe:
    """12 steps of 2 x 2 sequences of 32 tokens, a checkpoint every 3 steps, no baseline."""
    return Recipe(
        seed=3,
        data=DataRecipe(source=str(text), sequence_length=32),
        model=ModelRecipe("transformer++", SIZES | {"intermediate_size": 48}),
        train=TrainRecipe(
            tokens=12 * 128,
            batch_size=2,
            gradient_accumulation=2,
            log_every=1,
            eval_every=4,
            eval_tokens=96,
            final_eval_tokens=256,
            save_every=3,
        ),
    )


@pytest.fixture(scope="session")
def straight(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights that ``recipe`` gives when nothing goes wrong."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("straight") / "run"
    train(recipe, out)
    return (out / "model.safetensors").read_bytes()


@pytest.fixture(scope="session")
def hope_recipe(recipe: Recipe) -> Recipe:
    """The same with Hope and the baseline beside it."""
    model = ModelRecipe("hope", SIZES | {"intermediate_size": 96, "chunk_size": 8, "cms_chunk_sizes": [8, 32]})
    return Recipe(recipe.seed, recipe.data, model, recipe.train, BaselineRecipe("transformer++"))

"""Section 9.7 at small scale: the language model of the preset ``tiny``, trained by an optimizer of the package.

The run is that of ``nestlearn train``: the same Trainer and recipe, but for the optimizer and fewer, smaller steps.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Subset
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, set_seed

from nestlearn.errors import UserError, nearest
from nestlearn.optim import NotFiniteGradient
from nestlearn.tasks.optim import optimizers
from nestlearn.train.evaluate import NotFinite, evaluate_text
from nestlearn.train.model import build, count_parameters, model_config
from nestlearn.train.recipe import OPTIMIZERS, DataRecipe, Recipe, load_preset
from nestlearn.train.run import Data, read_data
from nestlearn.train.trainer import LanguageModelTrainer, training_arguments

SCALES = ("cpu", "smoke")
STEPS = {"cpu": 160, "smoke": 4}
SCORED = {"cpu": 65_536, "smoke": 512}  # tokens of each of the three final measurements, at most
POINTS = 40  # of the curve
SMOKE = {
    "data": dict(sequence_length=64),
    "model": dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=96),
    "train": dict(batch_size=4),
}
FEW = {"train": dict(batch_size=2)}  # the preset's 8 sequences would leave a fourth of the steps for these tokens
NEVER = 2**31  # more steps than there are: nothing is evaluated or saved on the way


def train(optimizer: str, lr: float, seed: int, scale: str, data: str | None) -> dict[str, Any]:
    """Train the model of the preset ``tiny`` on ``data`` and measure it.

    Args:
        optimizer, lr: see `nestlearn.tasks.optim.optimizers.build`; ``lr`` is the peak of the preset's schedule.
        seed: of the weights and the order of the data.
        scale: ``"cpu"``, or ``"smoke"`` for a few steps of a smaller model.
        data: a source as in ``[data]`` of a recipe; by default ``"stdlib"``.

    Returns train_loss, validation_loss and test_loss (nats per token), bits_per_byte (of the test text),
    seconds_per_step (all of a step but reading the data), optimizer_seconds_per_step, steps, tokens, parameters, curve
    (``[step, mean training loss since the last point]``) and diverged. A loss or a gradient that is not finite ends the
    run: then ``diverged`` is true, and losses and bits_per_byte are None. The test text is the source's own test split,
    or every second document of its held-out part; the validation loss is of the others.

    Raises `UserError` for unknown names and for data that cannot be trained on.
    """
    if scale not in SCALES:
        raise UserError(f"unknown scale '{scale}'; {nearest(scale, SCALES)}")
    recipe = _recipe(optimizer, lr, seed, scale, data or "stdlib")
    read = _read(recipe.data, recipe.train.batch_size)
    set_seed(seed)
    model = build(model_config(recipe.model, read.tokenizer, recipe.data.sequence_length))
    handed = None  # what a recipe cannot name is handed over
    if optimizer not in OPTIMIZERS:
        handed = optimizers.build(optimizer, model, lr, recipe.train.weight_decay)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = LanguageModelTrainer(
            model=model,
            args=training_arguments(recipe, Path(folder)),
            train_dataset=read.train,
            eval_dataset=Subset(read.validation, [0]),  # the Trainer evaluates once at the end, and nobody looks
            tokenizer=read.tokenizer,
            recipe=recipe,
            fingerprint=read.fingerprint,
            callbacks=[clock],
            optimizers=(handed, None),
        )
        trainer.remove_callback(PrinterCallback)
        try:
            trainer.train()
            losses = _measure(model, recipe, read, SCORED[scale])
        except (NotFinite, NotFiniteGradient):
            losses = None
    steps = trainer.state.global_step
    names = ("train_loss", "validation_loss", "test_loss", "bits_per_byte")
    return {
        **(losses or dict.fromkeys(names)),
        "diverged": losses is None,
        "seconds_per_step": clock.step / max(1, steps),
        "optimizer_seconds_per_step": clock.optimizer / max(1, steps),
        "steps": steps,
        "tokens": steps * recipe.tokens_per_step,
        "parameters": count_parameters(model),
        "curve": [[row["step"], row["loss"]] for row in trainer.state.log_history if "loss" in row],
    }


class Clock(TrainerCallback):
    """Seconds of training steps and, of these, of the optimizer."""

    def __init__(self) -> None:
        self.step = self.optimizer = 0.0
        self._began = self._updated = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._updated = time.perf_counter()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.optimizer += time.perf_counter() - self._updated

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.step += time.perf_counter() - self._began


def _recipe(optimizer: str, lr: float, seed: int, scale: str, source: str) -> Recipe:
    recipe = load_preset("tiny").replace(seed=seed).replace("baseline", kind="none").replace("data", source=source)
    for section, values in (SMOKE if scale == "smoke" else FEW).items():
        recipe = recipe.replace(section, **values)
    if optimizer in OPTIMIZERS:
        recipe = recipe.replace("train", optimizer=optimizer)
    steps = STEPS[scale]
    tokens = steps * recipe.tokens_per_step
    log_every = max(1, steps // POINTS)
    return recipe.replace(
        "train", learning_rate=lr, tokens=tokens, log_every=log_every, eval_every=NEVER, save_every=NEVER
    )


@functools.lru_cache(maxsize=1)
def _read(source: DataRecipe, batch: int) -> Data:
    """The recipe's data, its held-out documents divided into validation and test unless the source does so."""
    recipe = Recipe(data=source).replace("train", batch_size=batch, tokens=NEVER)
    data = read_data(recipe)
    if data.corpus.test:
        return data
    validation, test = halves(data.corpus.validation)
    return data._replace(corpus=dataclasses.replace(data.corpus, validation=validation, test=test))


def halves(documents: Sequence[str]) -> tuple[Sequence[str], Sequence[str]]:
    """Every second document on either side; the two halves of a single one, cut at a line end if it has one.

    >>> halves(["one", "two", "three"]), halves(["a line\\nand another"])
    ((['one', 'three'], ['two']), (['a line\\n'], ['and another']))
    """
    if len(documents) > 1:
        return documents[::2], documents[1::2]
    text = documents[0]
    middle = text.find("\n", len(text) // 3) + 1 or len(text) // 2
    return [text[:middle]], [text[middle:]]


def _measure(model: PreTrainedModel, recipe: Recipe, data: Data, tokens: int) -> dict[str, float]:
    results = {
        f"{name}_loss": evaluate_text(
            model,
            data.tokenizer,
            getattr(data.corpus, name),
            context_length=recipe.data.sequence_length,
            batch_size=recipe.train.batch_size,
            max_tokens=tokens,
        )
        for name in ("train", "validation", "test")
    }
    losses = {name: result["nats_per_token"] for name, result in results.items()}
    return losses | {"bits_per_byte": results["test_loss"]["bits_per_byte"]}

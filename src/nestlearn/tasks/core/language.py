"""Language modelling (table 2, figure 10; sections 9.2 and 9.3): WikiText-2 in words' pieces and in bytes.

Every model is trained by the package's own Trainer on the same tokens in the same order, has the parameters of Hope
(the width of its MLPs takes up the difference) and ties its embeddings. What is measured:

* perplexity per token of the test split in fresh windows of the training length, and bits per byte;
* perplexity of the same test tokens with 128 to 32,768 tokens of context (`nestlearn.tasks.core.contexts`);
* accuracy by lm-eval (`nestlearn.tasks.core.accuracy`) of the very model, on the first examples of each task. Models of
  this size score near chance there: the numbers say that the harness works, not which model reasons.

The learning rate is chosen on the validation split.
"""

from __future__ import annotations

import functools
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Subset
from transformers import PreTrainedModel, PrinterCallback, set_seed

from nestlearn.data.streams import token_units
from nestlearn.optim import NotFiniteGradient
from nestlearn.tasks.core import accuracy
from nestlearn.tasks.core.contexts import losses_by_context
from nestlearn.tasks.core.models import Size, language_model
from nestlearn.tasks.core.paper import FIGURE_10, FIGURE_10_CONTEXTS, TABLE_2, TABLE_2_COLUMNS
from nestlearn.tasks.datasets import lacking
from nestlearn.tasks.layout import PALETTE, legend_below, new_figure, save_figure, table
from nestlearn.tasks.plan import Plan, Row
from nestlearn.tasks.report import differences, measured, order_section
from nestlearn.train.evaluate import NotFinite, evaluate_text, perplexity
from nestlearn.train.model import TOKENS, count_parameters
from nestlearn.train.recipe import DataRecipe, Recipe, TrainRecipe
from nestlearn.train.run import Data, read_data
from nestlearn.train.trainer import LanguageModelTrainer, check_weights, training_arguments

TITLE = "Language modelling (table 2, figure 10, sections 9.2 and 9.3)"
CORPUS = "wikitext2"
PAPER_SCALE = "1.3B / 100B"  # of table 2
MODELS = (
    "transformer",
    "transformer+conv",
    "deltanet",
    "gated-deltanet",
    "titans",
    "hope-attention",
    "hope",
    "hope-mlp",
)
WORDS, BYTES = "WikiText-2", "WikiText-2 in bytes"
CONTEXTS = tuple(2**n for n in range(7, 16))

SIZE = {"dim": 128, "layers": 4, "heads": 4, "intermediate": 384}
TINY = {"dim": 16, "layers": 1, "heads": 2, "intermediate": 24}
LARGE = {"dim": 512, "layers": 8, "heads": 8, "intermediate": 1536}
RECIPES: dict[str, dict[str, Any]] = {
    "smoke": dict(size=TINY, tokens=1024, step=256, contexts=[128, 256], spans=1, scored=512, examples=2),
    "cpu": dict(size=SIZE, tokens=2_400_000, step=1024, contexts=CONTEXTS, spans=2, scored=65_536, examples=50),
    "gpu": dict(size=LARGE, tokens=12_000_000, step=16_384, contexts=CONTEXTS, spans=16, scored=500_000, examples=None),
}
# Of each setting: the tokenizer, and tokens of a training sequence. Both read as many bytes or so in a sequence.
TEXTS: dict[str, dict[str, dict[str, Any]]] = {
    "smoke": {
        WORDS: {"tokenizer": "bpe:300", "length": 64},
        BYTES: {"tokenizer": "bytes", "length": 128},
    },
    "cpu": {WORDS: {"tokenizer": "bpe:4096", "length": 512}, BYTES: {"tokenizer": "bytes", "length": 1024}},
    "gpu": {WORDS: {"tokenizer": "bpe:8192", "length": 1024}, BYTES: {"tokenizer": "bytes", "length": 4096}},
}
RATES = {"smoke": (2e-3,), "cpu": (2e-3, 4e-3, 8e-3), "gpu": (5e-4, 1e-3, 2e-3)}
SEEDS = {"smoke": (0,), "cpu": (0, 1), "gpu": (0, 1, 2)}
CRITERION = ("validation_loss",)
SPAN = {"smoke": 128, "cpu": 1024, "gpu": 1024}
NEVER = 2**31  # more steps than there are: nothing is evaluated or saved on the way


def plan(scale: str, data: str | None) -> Plan:
    """Every model on both texts."""
    absent = lacking(data, [CORPUS])
    rows = [
        Row(text, model, {"model": model, **values, "examples": shared_examples(scale, text)}, absent)
        for text, values in TEXTS[scale].items()
        for model in MODELS
    ]
    return Plan("language", train_one, shared(scale), rows, RATES[scale], SEEDS[scale], CRITERION, data)


def shared(scale: str) -> dict[str, Any]:
    """The arguments of `train_one` that all models of a scale have in common."""
    recipe = {key: value for key, value in RECIPES[scale].items() if key != "examples"}
    return {**recipe, "contexts": list(recipe["contexts"]), "span": SPAN[scale]}


def shared_examples(scale: str, text: str) -> int | None:
    """Of each accuracy task: none for models of bytes, whose scores would only repeat the column."""
    return RECIPES[scale]["examples"] if text == WORDS else 0


def train_one(
    model: str,
    lr: float,
    seed: int,
    *,
    tokenizer: str,
    length: int,
    tokens: int,
    step: int,
    data: str,
    contexts: Sequence[int],
    spans: int,
    scored: int,
    examples: int | None,
    span: int = 1024,
    size: Mapping[str, int] | None = None,
    options: Mapping[str, Any] | None = None,
    corpus: str = CORPUS,
) -> dict[str, Any]:
    """A cell: train a language model and measure it. On a GPU if there is one.

    Args:
        model: a name of `nestlearn.tasks.core.models.BLOCKS`.
        lr: peak of AdamW's schedule (a tenth of the steps up, then a cosine to zero).
        seed: of the weights and the order of the data.
        tokenizer: as in ``[data]`` of a recipe.
        length: tokens of a training sequence.
        tokens, step: to train on in all, and in one optimizer step.
        data, corpus: the folder of real data, and the folder in it with train, validation and test text.
        contexts, spans, span: see `losses_by_context`, on the test text.
        scored: tokens of the validation and of the test text that are scored, at most.
        examples: of each accuracy task, the first ones; ``None`` for all, 0 to leave them out.
        size: fields of `Size`.
        options: fields of `HopeConfig`.

    Returns ``validation_loss`` and ``test_loss`` (nats per token), ``wikitext ppl`` (of the test text),
    ``bits_per_byte``, ``context N`` (perplexity), the columns of table 2, ``parameters``, ``steps``, ``tokens``,
    ``tokens_per_second`` of training, ``curve`` (``[step, training loss]``) and ``diverged``. ``accuracy`` says why
    there is none, or null.

    Raises `UserError` for unknown names and for data that cannot be trained on.
    """
    read = _read(str(Path(data) / corpus), tokenizer, length, step // length)
    recipe = _recipe(lr, seed, tokens, step, read.tokenizer_spec, length, str(Path(data) / corpus))
    set_seed(seed)
    ids = {name: getattr(read.data.tokenizer, name) for name in TOKENS}
    given = {"tie_word_embeddings": True, "max_position_embeddings": length, **ids, **(options or {})}
    network = language_model(model, len(read.data.tokenizer), Size(**(size or {})), given)
    result: dict[str, Any] = {"parameters": count_parameters(network), "steps": recipe.steps, "diverged": False}
    result["tokens"] = recipe.steps * recipe.tokens_per_step
    began = time.perf_counter()
    try:
        result["curve"] = _train(network, recipe, read.data)
        result["tokens_per_second"] = result["tokens"] / (time.perf_counter() - began)
        result |= _losses(network, read.data, length, scored)
        by_context = losses_by_context(network, read.test_ids, contexts, spans, span)
    except (NotFinite, NotFiniteGradient):
        return {**result, "diverged": True}
    result |= {f"context {context}": perplexity(loss) for context, loss in by_context.items()}
    result["accuracy"] = accuracy.missing() if examples != 0 else "not asked for"
    if result["accuracy"] is None:
        result |= accuracy.score(network, read.data.tokenizer, data, examples)
    return result


class _Text:
    """A corpus in tokens: what is trained on, and the test text as one array."""

    def __init__(self, source: str, tokenizer: str, length: int, batch: int) -> None:
        recipe = Recipe(data=DataRecipe(source, tokenizer, length), train=TrainRecipe(batch_size=batch, tokens=NEVER))
        self.tokenizer_spec = tokenizer
        self.data = read_data(recipe)
        self.test_ids = np.concatenate([unit.ids for unit in token_units(self.data.corpus.test, self.data.tokenizer)])


@functools.lru_cache(maxsize=2)
def _read(source: str, tokenizer: str, length: int, batch: int) -> _Text:
    return _Text(source, tokenizer, length, batch)


def _recipe(lr: float, seed: int, tokens: int, step: int, tokenizer: str, length: int, source: str) -> Recipe:
    train = TrainRecipe(
        tokens=tokens,
        batch_size=step // length,
        learning_rate=lr,
        log_every=max(1, tokens // step // 40),
        eval_every=NEVER,
        save_every=NEVER,
    )
    return Recipe(seed=seed, data=DataRecipe(source, tokenizer, length), train=train)


def _train(network: PreTrainedModel, recipe: Recipe, data: Data) -> list[list[float]]:
    """The training loss along the way, ``[step, nats per token]``."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = LanguageModelTrainer(
            model=network,
            args=training_arguments(recipe, Path(folder)),
            train_dataset=data.train,
            eval_dataset=Subset(data.validation, [0]),  # the Trainer evaluates once at the end, and nobody looks
            tokenizer=data.tokenizer,
            recipe=recipe,
            fingerprint=data.fingerprint,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    check_weights(network, recipe.steps)
    return [[row["step"], row["loss"]] for row in trainer.state.log_history if "loss" in row]


def _losses(network: PreTrainedModel, data: Data, length: int, scored: int) -> dict[str, float]:
    found = {
        name: evaluate_text(
            network,
            data.tokenizer,
            getattr(data.corpus, name),
            context_length=length,
            batch_size=max(1, 4096 // length),
            max_tokens=scored,
        )
        for name in ("validation", "test")
    }
    return {
        "validation_loss": found["validation"]["nats_per_token"],
        "test_loss": found["test"]["nats_per_token"],
        "wikitext ppl": found["test"]["perplexity"],
        "bits_per_byte": found["test"]["bits_per_byte"],
    }


def section(found: Mapping[str, Mapping[str, Any]], folder: Path) -> str:
    """Table 2, bits per byte, figure 10, and what differs in order."""
    words, in_bytes = found.get(WORDS, {}), found.get(BYTES, {})
    papers = TABLE_2[PAPER_SCALE]
    rows = []
    for name in MODELS:
        paper = papers.get(name)
        cells = [
            measured(words.get(name), [column], None if paper is None else [paper[place]])
            for place, column in enumerate(TABLE_2_COLUMNS)
        ]
        rows.append([name, cells[0], measured(in_bytes.get(name), ["bits_per_byte"]), *cells[1:]])
    sentences = [
        differences(
            words,
            column,
            {model: values[place] for model, values in papers.items()},
            column,
            higher=not column.endswith("ppl"),
        )
        for place, column in enumerate(TABLE_2_COLUMNS)
    ]
    figure = draw(found, folder / "contexts.png")
    first, *others = TABLE_2_COLUMNS
    return "\n".join(
        [
            f"Below each number the paper's at {PAPER_SCALE} tokens, of a tokenizer of its own. Perplexity is per "
            "token of the test text, in fresh windows of the training length; accuracies are in percent, of the first "
            "examples of each task, and near chance for models of this size.\n",
            table(["model", first, "bytes: bits per byte", *others], rows),
            *_without_accuracy(words),
            "Perplexity of the same test tokens by the context before them, in fresh windows:\n",
            contexts_table(words),
            contexts_table(in_bytes, "model, bytes"),
            order_section([*sentences, *_context_sentences(words)]),
            f"![Perplexity against the context used, ours and the paper's]({figure.name})\n",
        ]
    )


def contexts_table(models: Mapping[str, Mapping[str, Any]], title: str = "model") -> str:
    """Perplexity by model and context, the paper's below where figure 10 has it."""
    rows = []
    for name, outcome in models.items():
        paper = dict(zip(FIGURE_10_CONTEXTS, FIGURE_10.get(name, ()), strict=False)) if title == "model" else {}
        cells = [measured(outcome, [f"context {c}"], [paper[c]] if c in paper else None) for c in CONTEXTS]
        rows.append([name, *cells])
    return table([title, *(f"{context:,}" for context in CONTEXTS)], rows)


def _context_sentences(models: Mapping[str, Mapping[str, Any]]) -> list[str | None]:
    return [
        differences(
            models,
            f"context {context}",
            {name: values[place] for name, values in FIGURE_10.items()},
            f"{context:,} tokens of context",
            higher=False,
        )
        for place, context in enumerate(FIGURE_10_CONTEXTS)
    ]


def _without_accuracy(models: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Why some runs have no accuracy."""
    reasons: dict[str, list[str]] = {}
    for name, outcome in models.items():
        for reason in {run.get("accuracy") for run in outcome.get("runs", [])} - {None}:
            reasons.setdefault(reason, []).append(name)
    return [
        f"Accuracy of {', '.join(names)}: {reason}, and give another folder.\n" for reason, names in reasons.items()
    ]


def draw(found: Mapping[str, Mapping[str, Any]], path: Path) -> Path:
    """Perplexity against context: a panel for each text that was read, and the paper's."""
    texts = [text for text in (WORDS, BYTES) if any(o["mean"] for o in found.get(text, {}).values())]
    figure = new_figure(4.3 * (len(texts) + 1), 4.6)
    panels = figure.subplots(1, len(texts) + 1, squeeze=False)[0]
    colours = dict(zip([*MODELS, "comba"], [*PALETTE, "#999999", "#8c6d31"], strict=False))
    for axes, text in zip(panels, texts, strict=False):
        for name, outcome in found.get(text, {}).items():
            points = [(c, outcome["mean"].get(f"context {c}")) for c in CONTEXTS]
            drawn = [(c, value) for c, value in points if value is not None and math.isfinite(value)]
            if drawn:
                style = dict(color=colours[name], linewidth=2.5 if name in ("hope", "hope-mlp") else 1.4)
                axes.plot(*zip(*drawn, strict=True), "o-", markersize=4, label=name, **style)
        axes.set_title(text, fontsize=11)
    for name, values in FIGURE_10.items():
        plain = name.partition(" ")[0]
        style = "o-" if plain == name else "o:"
        panels[-1].plot(FIGURE_10_CONTEXTS, values, style, color=colours[plain], markersize=4, label=name)
    panels[-1].set_title("the paper's figure 10", fontsize=11)
    panels[-1].legend(frameon=False, fontsize=8)
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_xlabel("context (tokens)")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("perplexity per token")
    legend_below(figure, panels[0])
    return save_figure(figure, path)

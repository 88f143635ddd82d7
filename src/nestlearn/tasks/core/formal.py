"""Formal languages (table 5, section 9.5): can a model keep track of a state, and for longer than it was trained?

The protocol of Bhattamishra et al. 2020 and Irie et al. 2023, see `nestlearn.tasks.core.languages`: binary cross
entropy over the set of symbols that may come next; a position is right if the whole set is, a word if every position
is. The paper does not define its bins. Here bin 0 has the training lengths and bin 1 lengths up to twice as long:

    Parity, Shuffle-2    lengths 2 to 50 (Shuffle-2 even)            51 to 100
    (aa)*, (abab)*       multiples of 2 and of 4 up to 50            up to 100
    a^n b^n, a^n b^n c^n n from 1 to 50                              n from 51 to 100

Every batch is drawn afresh; lengths are drawn evenly. Every model makes equally many steps, of a^n b^n c^n twice as
many as of the others. Where a language has one word of each size, training, validation and test of bin 0 are the same
words. Nothing is chosen by bin 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from nestlearn.errors import UserError, nearest
from nestlearn.tasks.core.languages import LANGUAGES, Batch, Language, Word, collate, fixed_words, sample
from nestlearn.tasks.core.models import Size, build
from nestlearn.tasks.core.paper import TABLE_5, TABLE_5_LANGUAGES
from nestlearn.tasks.core.step import UsualNorm, descend
from nestlearn.tasks.layout import PALETTE, new_figure, save_figure, table
from nestlearn.tasks.plan import Plan, Row
from nestlearn.tasks.report import base, differences, measured, order_section
from nestlearn.train.model import count_parameters
from nestlearn.train.optimizers import build as build_optimizer

TITLE = "Formal languages (table 5, section 9.5)"
# The first four have no convolution; a "+conv" stands behind Hope's short convolution, as titans and hope do anyway.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("lstm", {}),
    "transformer": ("transformer", {}),
    "linear": ("linear", {"conv_size": 1}),
    "deltanet": ("deltanet", {"conv_size": 1}),
    "transformer+conv": ("transformer+conv", {}),
    "linear+conv": ("linear", {}),
    "deltanet+conv": ("deltanet", {}),
    # Steps up to 2 turn a sign, which Hope's do too: what of its result is that alone?
    "deltanet+conv, steps to 2": ("deltanet", {"eta_max": 2.0}),
    "titans, chunk 16": ("titans", {"chunk_size": 16}),
    "srwm": ("srwm", {}),
    "hope, chunk 1": ("hope", {"chunk_size": 1, "accumulators": 2}),
    "hope, chunk 4": ("hope", {"chunk_size": 4, "accumulators": 2}),
    "hope, chunk 16": ("hope", {"chunk_size": 16, "accumulators": 2}),
    "hope, chunk 16, no accumulators": ("hope", {"chunk_size": 16}),
}
SIZE = {"dim": 32, "layers": 2, "heads": 4, "intermediate": 96}
TINY = {"dim": 16, "layers": 1, "heads": 2, "intermediate": 24}
RECIPES: dict[str, dict[str, Any]] = {
    "smoke": dict(size=TINY, steps=10, batch=8, longest=8, every=5, device="cpu"),
    "cpu": dict(size=SIZE, steps=1500, batch=32, longest=50, every=75, device="cpu"),
    "gpu": dict(size=SIZE | {"dim": 128, "intermediate": 384}, steps=5000, batch=128, longest=50, every=50)
    | {"device": "cuda"},
}
RATES = {"smoke": (3e-3,), "cpu": (3e-3, 1e-2), "gpu": (1e-3, 3e-3, 1e-2)}
SEEDS = {"smoke": (0,), "cpu": (0, 1, 2, 3, 4), "gpu": (0, 1, 2, 3, 4)}
CRITERION = ("validation_error", "validation_loss")

# Three counts in words of up to three times the others' length: with the others' steps three cells of Hope in eight
# miss some of the longest words, and none of those that were run again with twice as many (docs/log.md).
LONGER = {"a^n b^n c^n": 2}  # times the steps

# After it the rate falls to zero over the whole run: at the full rate and a loss of almost nothing the weights wander
# until a batch has a gradient 10,000 times the usual (docs/log.md).
WARMUP = 50  # steps
# Tested are not the last weights but their running mean over about 500 steps (Polyak 1992), in which what the steps
# differ in cancels: with the last ones one cell in ten of Hope misses some longer words (docs/log.md).
AVERAGED = 0.998  # of the mean is retained with each step
WEIGHT_DECAY = 0.01  # decoupled, in units of the learning rate, on matrices
# Of the embeddings' root mean square, while a model trains. Without it the loss falls to 1e-8, where nothing asks for
# more precision, and a count that is right to a percent is wrong in a longer word.
NOISE = 0.1
# The certainty that is asked for in training is finite. Else the loss falls with every larger logit, says nothing once
# all are large, and lets them drift along a word, which goes on in a longer one; a logit to hold, here 9.2, makes that
# cost. A count must turn within one symbol, which ten times the smoothing makes harder (docs/log.md).
SMOOTHED = 1e-4  # of each target's probability is given to the other answer
TEST_WORDS = 500  # of each bin, where a language has many words of a size
VALIDATION_WORDS = 300
VALIDATION_SEED, TEST_SEED = 1, 2  # training draws from seeds of its own
EVALUATED = 64  # words at a time


def plan(scale: str, data: str | None) -> Plan:
    """Every model of `ROWS` on every language; no data is needed."""
    longer = {language: {"steps": times * RECIPES[scale]["steps"]} for language, times in LONGER.items()}
    rows = [
        Row(
            language,
            row,
            {"language": language, "model": model, "options": options} | longer.get(language, {}),
        )
        for language in TABLE_5_LANGUAGES
        for row, (model, options) in ROWS.items()
    ]
    return Plan("formal", train_one, RECIPES[scale], rows, RATES[scale], SEEDS[scale], CRITERION)


def section(found: Mapping[str, Mapping[str, Any]], folder: Path) -> str:
    """Table 5 with both bins, what differs in order, and every seed as a point."""
    rows = []
    for name in ROWS:
        papers = dict(zip(TABLE_5_LANGUAGES, TABLE_5.get(base(name), ()), strict=False))
        cells = [
            measured(found.get(language, {}).get(name), ["bin0", "bin1"], papers.get(language))
            for language in TABLE_5_LANGUAGES
        ]
        rows.append([name, *cells])
    sentences = []
    for place, language in enumerate(TABLE_5_LANGUAGES):
        for bin, words in ((0, "training lengths"), (1, "longer words")):
            papers = {model: values[place][bin] for model, values in TABLE_5.items()}
            sentences.append(differences(found.get(language, {}), f"bin{bin}", papers, f"{language}, {words}"))
    figure = draw(found, folder / "formal.png")
    return "\n".join(
        [
            "Words that are right at every position, in percent: training lengths / up to twice as long. A word counts "
            "only if the whole set of next symbols is right after each of its symbols (Parity: the parity). "
            "A model with +conv has Hope's short convolution in front, titans and hope always. Steps to 2 are those of "
            "Hope's main memory: that row is what they give without self-modification. Two heads of hope "
            "accumulate, except in the row without. a^n b^n c^n has twice the others' steps. Neither training nor the "
            "choice of the learning rate sees longer words.\n",
            table(["model", *TABLE_5_LANGUAGES], rows),
            order_section(sentences),
            f"![Right words of every seed by model and language]({figure.name})\n",
        ]
    )


def draw(found: Mapping[str, Mapping[str, Any]], path: Path) -> Path:
    """A panel a language, a line a model that was run, a point a seed: full on training lengths, open on longer."""
    figure = new_figure(11, 7.5)
    panels = figure.subplots(2, 3, sharex=True, sharey=True)
    shown = {name for models in found.values() for name, outcome in models.items() if outcome.get("runs")}
    names = [name for name in ROWS if name in shown][::-1]
    for axes, language in zip(panels.flat, TABLE_5_LANGUAGES, strict=True):
        for place, name in enumerate(names):
            runs = [run for run in found.get(language, {}).get(name, {}).get("runs", []) if run.get("bin0") is not None]
            colour = PALETTE[0] if base(name) == "hope" else PALETTE[1]
            for bin, shift, fill in ((0, 0.15, colour), (1, -0.15, "white")):
                scores = [run[f"bin{bin}"] for run in runs]
                places = [place + shift] * len(scores)
                axes.plot(scores, places, "o", color=colour, markerfacecolor=fill, markersize=6)
        axes.set_title(language, fontsize=11)
        axes.set_yticks(range(len(names)), names, fontsize=9)
        axes.set_xlim(-4, 104)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(
        "right words (percent): full on training lengths, open on longer words; a point a seed", fontsize=10
    )
    return save_figure(figure, path)


def train_one(
    language: str,
    model: str,
    lr: float,
    seed: int,
    *,
    options: Mapping[str, Any] | None = None,
    size: Mapping[str, int] | None = None,
    steps: int = 1500,
    batch: int = 32,
    longest: int = 50,
    every: int = 50,
    device: str = "cpu",
    log: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """A cell: train a model on a language and test it on both bins.

    The learning rate rises over `WARMUP` steps and then falls to zero; a gradient far above the usual is clipped. All
    scores are of the running mean of the weights.

    Args:
        language: a name of `LANGUAGES`.
        model: a name of `nestlearn.tasks.core.models.MODELS`.
        lr: of AdamW, per step.
        seed: of the weights and the training words.
        options: fields of `HopeConfig`, as ``{"chunk_size": 1}``.
        size: fields of `Size`.
        steps, batch: optimizer steps, words of each.
        longest: the largest size of bin 0, in symbols (of a^n b^n and a^n b^n c^n: n).
        every: steps between two validations.
        device: a torch device.
        log: gets a line at every validation.

    Returns ``bin0`` and ``bin1`` (right words, percent), ``symbols0`` and ``symbols1`` (right positions, percent),
    ``validation_error`` (wrong words, percent), ``validation_loss`` (nats per position and output), ``parameters``,
    ``seconds`` of all of it, ``curve`` (``[step, validation loss, right words in percent]``) and
    ``diverged``: a loss or a gradient was not finite, and there are no scores but the number of ``steps`` made.

    Raises `UserError` for unknown names and options that the model refuses.

    >>> tiny = dict(size={"dim": 8, "layers": 1, "heads": 2, "intermediate": 12}, steps=2, longest=4)
    >>> len(train_one("(aa)*", "hope", lr=1e-3, seed=0, **tiny)["curve"])
    1
    """
    if language not in LANGUAGES:
        raise UserError(f"unknown language '{language}'; {nearest(language, LANGUAGES)}")
    began = time.perf_counter()
    rules = LANGUAGES[language]
    torch.manual_seed(seed)
    network = build(model, len(rules.symbols), rules.outputs, Size(**(size or {})), options).to(device)
    averaged = AveragedModel(network, multi_avg_fn=_average)  # a copy without the noise
    add_noise(network)
    optimizer = build_optimizer("adamw", network, lr, WEIGHT_DECAY)
    generator = np.random.default_rng([seed, 0])
    validation = fixed_words(rules, longest, 0, VALIDATION_WORDS, VALIDATION_SEED)
    result: dict[str, Any] = {"parameters": count_parameters(network), "curve": [], "diverged": False}
    sizes, usual = rules.sizes(longest, 0), UsualNorm()

    for step in range(1, steps + 1):
        network.train()
        words = collate(rules, sample(rules, sizes, batch, generator))
        loss = _losses(network, words, device, SMOOTHED)[0].mean()
        rate = lr * min(step / WARMUP, (steps - step + 1) / max(1, steps - WARMUP))
        if not descend(network, optimizer, loss, rate, usual):
            return result | {"diverged": True, "steps": step}
        averaged.update_parameters(network)
        if step % every == 0 or step == steps:
            found = evaluate(averaged, rules, validation, device)
            result["curve"].append([step, found["loss"], found["words"]])
            if log is not None:
                log(f"step {step} train {loss.item():.5f} validation {found['loss']:.5f} words {found['words']:.1f}%")

    _, loss, right = result["curve"][-1]
    result |= {"validation_error": 100 - right, "validation_loss": loss}
    for bin in (0, 1):
        found = evaluate(averaged, rules, fixed_words(rules, longest, bin, TEST_WORDS, TEST_SEED), device)
        result |= {f"bin{bin}": found["words"], f"symbols{bin}": found["positions"]}
    return result | {"seconds": time.perf_counter() - began}


@torch.no_grad()
def _average(
    means: tuple[Tensor, ...] | list[Tensor], now: tuple[Tensor, ...] | list[Tensor], steps: Tensor | int
) -> None:
    """The mean of all so far until there are 500, then one that forgets."""
    torch._foreach_lerp_(means, now, max(1 - AVERAGED, 1 / (int(steps) + 1)))


def add_noise(network: nn.Module) -> None:
    """Let the embeddings have Gaussian noise of `NOISE` while the network trains."""
    (embedding,) = (module for module in network.modules() if isinstance(module, nn.Embedding))

    def noisy(module: nn.Module, inputs: tuple[Tensor, ...], embedded: Tensor) -> Tensor:
        if not network.training:
            return embedded
        return embedded + NOISE * embedded.detach().square().mean().sqrt() * torch.randn_like(embedded)

    embedding.register_forward_hook(noisy)


@torch.no_grad()
def evaluate(network: nn.Module, language: Language, words: Sequence[Word], device: str = "cpu") -> dict[str, float]:
    """``words`` and ``positions`` that are right, in percent, and ``loss`` in nats per position and output."""
    network.eval()
    right_words = right = positions = 0
    total = 0.0
    in_order = sorted(words, key=len)
    for begin in range(0, len(words), EVALUATED):
        batch = collate(language, in_order[begin : begin + EVALUATED])
        losses, correct = _losses(network, batch, device)
        right_words += wholly_right(correct.cpu().numpy(), batch.real).sum().item()
        right += (correct.cpu().numpy() & batch.real).sum().item()
        positions += batch.real.sum().item()
        total += losses.sum().item()
    return {
        "words": 100 * right_words / len(words),
        "positions": 100 * right / positions,
        "loss": total / positions / language.outputs,
    }


def wholly_right(correct: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Which words (B,) are right at each real position, from (B, T) and (B, T).

    >>> wholly_right(np.array([[True, False], [True, False]]), np.array([[True, False], [True, True]])).tolist()
    [True, False]
    """
    return np.all(correct | ~real, axis=1)


def _losses(network: nn.Module, batch: Batch, device: str, smoothed: float = 0.0) -> tuple[Tensor, Tensor]:
    """The loss of every output at every real position (N, outputs), and which positions are right (B, T)."""
    tokens, targets, real = (torch.from_numpy(array).to(device) for array in batch)
    logits = network(tokens)
    asked = targets[real].float() * (1 - 2 * smoothed) + smoothed
    losses = nn.functional.binary_cross_entropy_with_logits(logits[real], asked, reduction="none")
    return losses, ((logits > 0) == targets).all(-1)

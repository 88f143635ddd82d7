"""A needle in a haystack (table 1, section 9.2): does a model find what was said once, long ago?

Models are trained from scratch on a mixture of the six tasks of `nestlearn.tasks.core.needles`, at lengths up to one
that all can train on, and then answer at that length and far beyond it. They write the answer, by greedy generation;
there is nothing to choose from. The text goes through the cache in pieces, so that a model with a state of constant
size reads any length in constant memory.

Only answers are trained on. The first part of the steps (`DENSE`) has only the shortest prompts, of one needle up to as
many as fit, all asked and of two digits; after it each step has a length of the doublings up to the longest, drawn
evenly, and as many rows of any task as fill its tokens. In the paper the models are language models of 50 billion
tokens that never saw the task; here it is all that they saw, so that the comparison is among the rows. Learning rates
are chosen at the longest training length; training, choice and test have haystacks from different texts. At scale
``cpu`` numbers have 4 digits and uuids 8; ``gpu`` has RULER's 7 and 32.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.errors import UserError
from nestlearn.models.hope import HopeForCausalLM
from nestlearn.tasks.core.mad import GREY, schedule
from nestlearn.tasks.core.models import Size, language_model
from nestlearn.tasks.core.needles import (
    END,
    TASKS,
    Form,
    Library,
    Sample,
    draw,
    fullest,
    missing_text,
    read_library,
    share_found,
)
from nestlearn.tasks.core.paper import TABLE_1, TABLE_1_LENGTHS
from nestlearn.tasks.core.step import descend
from nestlearn.tasks.core.writing import ROWS as WRITES_COST
from nestlearn.tasks.core.writing import cost_of, lines, with_cost
from nestlearn.tasks.layout import PALETTE, legend_below, new_figure, save_figure, table
from nestlearn.tasks.plan import Plan, Row
from nestlearn.tasks.report import base, differences, measured, order_section
from nestlearn.train.model import count_parameters
from nestlearn.train.optimizers import build as build_optimizer

TITLE = "Needle in a haystack (table 1, section 9.2)"
SETTING = "all tasks"  # one model answers all of them
WITHOUT_DATA = "all tasks, in the standard library's sources"
# A needle is to last: heads that forget start with half-lives of 70 to 7,000 symbols, not the usual 35 to 350.
LASTING = {"retained": [0.99, 0.9999]}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "transformer": ("transformer", {}),
    "transformer+conv": ("transformer+conv", {}),
    "deltanet": ("deltanet", {}),
    "gated-deltanet": ("gated-deltanet", LASTING),
    "titans": ("titans", LASTING),
    "hope-attention": ("hope-attention", {}),
    "hope": ("hope", LASTING),
    "hope, no decay": ("hope", {"decay": False}),
    **WRITES_COST,
}
GROWING = ("transformer", "transformer+conv", "hope-attention")  # their memory and time grow with the text
RECIPES: dict[str, dict[str, Any]] = {
    "smoke": dict(
        size={"dim": 16, "layers": 1, "heads": 2, "intermediate": 24}, form=dict(digits=2, groups=[2], many=2)
    )
    | dict(words=64, steps=4, tokens=512, shortest=128, longest=256, samples=2, device="cpu"),
    "cpu": dict(
        size={"dim": 64, "layers": 2, "heads": 2, "intermediate": 192}, form=dict(digits=4, groups=[4, 4], many=4)
    )
    | dict(words=512, steps=4000, tokens=2048, shortest=64, longest=1024, samples=20, device="cpu"),
    "gpu": dict(size={"dim": 512, "layers": 8, "heads": 8, "intermediate": 1536}, form={}, words=4096, steps=30_000)
    | dict(tokens=65_536, shortest=128, longest=4096, samples=200, device="cuda"),
}
# Context lengths of the test, in symbols of the prompt: of all models, and further ones of those of constant size.
LENGTHS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "smoke": ((256, 512), (1024,)),
    "cpu": ((1024, 2048, 4096, 8192, 16_384), (32_768,)),
    "gpu": ((1024, 2048, 4096, 8192, 16_384, 32_768), (65_536, 131_072)),
}
RATES = {"smoke": (3e-3,), "cpu": (3e-3,), "gpu": (3e-4, 1e-3, 3e-3)}
SEEDS = {"smoke": (0,), "cpu": (0, 1), "gpu": (0, 1, 2)}
CRITERION = ("validation_error", "validation_loss")

# Of the steps, at the beginning, are dense. Width 64, 3e-3: with values of two digits DeltaNet begins to find the right
# one after 300 such steps, Hope after 500, transformer+conv after 600; with values of four digits, or with
# chunks of 16, Hope takes twice as long.
DENSE = 0.3
WEIGHT_DECAY = 0.01  # decoupled, in units of the learning rate, on matrices
POINTS = 20  # of the curve
PIECE = 512  # symbols that go through the model at a time when it reads
READ = 32_768  # symbols of all rows that are read side by side
IGNORE = -100
VALIDATION_SEED, TEST_SEED = 1, 2  # training draws from seeds of its own


def plan(scale: str, data: str | None) -> Plan:
    """Every model of `ROWS`, trained on all tasks, at the lengths that it can read."""
    usual, further = LENGTHS[scale]
    rows = []
    for name, (model, options) in ROWS.items():
        lengths = list(usual if model in GROWING else usual + further)
        arguments = {"model": model, "lengths": lengths, "options": options, **cost_of(name)}
        rows.append(Row(SETTING if data is not None else WITHOUT_DATA, name, arguments, missing_text(data)))
    return Plan("niah", train_one, RECIPES[scale], rows, RATES[scale], SEEDS[scale], CRITERION, data)


def section(found: Mapping[str, Mapping[str, Any]], folder: Path) -> str:
    """Table 1 by task, what differs in order, and accuracy against length."""
    outcomes = next(iter(found.values()), {})  # of one text
    keys = {key for outcome in outcomes.values() for key in outcome["mean"]}
    lengths = sorted({int(key.split()[1]) for key in keys if key.split()[0] in TASKS} | set(TABLE_1_LENGTHS))
    parts, sentences = [], []
    for task in TASKS:
        rows = []
        for model in ROWS:
            papers = dict(zip(TABLE_1_LENGTHS, TABLE_1[task].get(base(model), ()), strict=False))
            given = {n: [papers[n]] if n in papers else None for n in lengths}
            rows.append([model, *(measured(outcomes.get(model), [score_name(task, n)], given[n]) for n in lengths)])
        parts += [f"### {task}\n", table(["model", *(f"{length:,}" for length in lengths)], rows)]
        for place, length in enumerate(TABLE_1_LENGTHS):
            paper = {model: values[place] for model, values in TABLE_1[task].items()}
            sentences.append(differences(outcomes, score_name(task, length), paper, f"{task} at {length:,}"))
    figure = draw_figure(outcomes, lengths, folder / "niah.png")
    return "\n".join(
        [
            "Values that the model wrote out whole, in percent of those asked, by the length of the context in "
            "symbols. One model was trained on all six tasks. hope and titans compare with transformer+conv, which has "
            "their short convolution. Models whose memory grows with the text are not run at the greatest lengths.\n",
            f"![Accuracy against length by task and model]({figure.name})\n",
            *parts,
            order_section(sentences),
        ]
    )


def draw_figure(outcomes: Mapping[str, Any], lengths: Sequence[int], path: Path) -> Path:
    """A panel a task, a line a model through the means over the seeds; where training ended is dotted."""
    figure = new_figure(11, 6.5)
    panels = figure.subplots(2, 3, sharex=True, sharey=True)
    trained = [run["trained_to"] for outcome in outcomes.values() for run in outcome.get("runs", [])]
    styles = lines(ROWS, (GREY, *PALETTE[1:], PALETTE[0]))
    for axes, task in zip(panels.flat, TASKS, strict=True):
        for model, (colour, line) in styles.items():
            mean = outcomes.get(model, {}).get("mean", {})
            points = [(n, mean[score_name(task, n)]) for n in lengths if score_name(task, n) in mean]
            xs, ys = zip(*points, strict=True) if points else ((), ())
            width = 2.4 if base(model) == "hope" else 1.2
            axes.plot(xs, ys, line, color=colour, markersize=4, linewidth=width, label=model)
        for length in set(trained):
            axes.axvline(length, color=GREY, linestyle=":")
        axes.set_title(task, fontsize=11)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths, [f"{n // 1024}K" if n >= 1024 else str(n) for n in lengths], fontsize=9)
        axes.set_ylim(-4, 104)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[-1]:
        axes.set_xlabel("context (symbols); dotted: the longest in training", fontsize=9)
    figure.supylabel("right values (percent)", fontsize=10)
    legend_below(figure, panels.flat[0])
    return save_figure(figure, path)


def score_name(task: str, length: int) -> str:
    """The name of an accuracy in a result."""
    return f"{task} {length}"


def train_one(
    model: str,
    lr: float,
    seed: int,
    *,
    lengths: Sequence[int] = (1024, 2048),
    options: Mapping[str, Any] | None = None,
    size: Mapping[str, int] | None = None,
    form: Mapping[str, Any] | None = None,
    words: int = 512,
    steps: int = 4000,
    tokens: int = 2048,
    shortest: int = 64,
    longest: int = 1024,
    samples: int = 20,
    cost: float = 0.0,
    data: str | None = None,
    device: str = "cpu",
    log: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """A cell: train a model on all tasks and let it answer at every length.

    Args:
        model: a name of `nestlearn.tasks.core.models.BLOCKS`.
        lr: of AdamW, per step, at its peak.
        seed: of the weights and the training samples.
        lengths: of the test, in symbols of the prompt.
        options: fields of `HopeConfig`, as ``{"chunk_size": 16}``.
        size: fields of `Size`.
        form: fields of `Form`.
        words: of real text in the vocabulary.
        steps, tokens: optimizer steps, symbols of each (their rows' prompts together).
        shortest, longest: of training, in symbols of the prompt; between them all doublings of the shortest.
        samples: of each task and length in the test, and of each task in validation.
        cost: of writing, added to the loss after the dense steps: nats for a mean step size of 1.
        data: the folder that has wikitext2, or ``None`` for the standard library's sources.
        device: a torch device.
        log: gets a line at every point of the curve and for every length of the test.

    Returns the accuracy of every task and length, by `score_name` (percent of the values that are asked),
    ``validation_error`` (wrong values at ``longest``, percent), ``validation_loss`` (nats per symbol of the answers),
    ``trained_to``, ``parameters``, ``steps`` made, ``seconds`` of all of it, ``curve`` (``[step, mean training loss
    since the last point]``) and ``diverged``: a loss or a gradient was not finite, and there are no scores.

    Raises `UserError` for unknown names, data without text, options that the model refuses and lengths that are too
    short for the needles.

    >>> tiny = dict(size={"dim": 8, "layers": 1, "heads": 2, "intermediate": 12}, steps=1, tokens=128, longest=128)
    >>> result = train_one("hope", 1e-3, 0, lengths=[256], form={"digits": 2}, words=8, samples=1, **tiny)
    >>> 0 <= result["S-NIAH-1 256"] <= 100
    True
    """
    began = time.perf_counter()
    if shortest > longest or tokens < longest:
        raise UserError(f"shortest {shortest}, longest {longest}, tokens {tokens}: each must reach the one before")
    library, needle = read_library(data, words), Form(**(form or {}))
    torch.manual_seed(seed)
    network = language_model(model, len(library.number), Size(**(size or {})), options)
    network.to(device)  # type: ignore[arg-type]  # transformers hides the signature
    optimizer = build_optimizer("adamw", network, lr, WEIGHT_DECAY)
    generator = np.random.default_rng([seed, 0])
    doublings = [shortest << n for n in range(int(math.log2(longest / shortest)) + 1)]
    result: dict[str, Any] = {"parameters": count_parameters(network), "trained_to": longest}
    result |= {"curve": [], "diverged": False}
    every, losses = math.ceil(steps / POINTS), []

    network.train()
    for step in range(1, steps + 1):
        dense = step <= DENSE * steps
        some = training_samples(dense, doublings, tokens, library, needle, generator)
        loss, paid = with_cost(network, 0.0 if dense else cost, partial(loss_of, network, some, library))
        if not descend(network, optimizer, paid, lr * schedule(step, steps)):
            return result | {"diverged": True, "steps": step}
        losses.append(loss.item())
        if step % every == 0 or step == steps:
            result["curve"].append([step, float(np.mean(losses))])
            losses = []
            if log is not None:
                log(f"step {step} loss {result['curve'][-1][1]:.5f}")

    network.eval()
    generator = np.random.default_rng(VALIDATION_SEED)
    held = {
        task: [draw(task, longest, library.validation, needle, generator) for _ in range(samples)] for task in TASKS
    }
    found = [accuracy(network, some, library) for some in held.values()]
    result |= {"validation_error": 100 - float(np.mean(found)), "steps": steps}
    with torch.no_grad():
        losses = [loss_of(network, some, library).item() for some in held.values()]
    result["validation_loss"] = float(np.mean(losses))
    for length in lengths:
        generator = np.random.default_rng([TEST_SEED, length])
        for task in TASKS:
            some = [draw(task, length, library.test, needle, generator) for _ in range(samples)]
            result[score_name(task, length)] = accuracy(network, some, library)
        if log is not None:
            log(f"length {length}: " + ", ".join(f"{task} {result[score_name(task, length)]:.0f}%" for task in TASKS))
    return result | {"seconds": time.perf_counter() - began}


def training_samples(
    dense: bool, lengths: Sequence[int], tokens: int, library: Library, form: Form, generator: np.random.Generator
) -> list[Sample]:
    """The rows of a step, of one of ``lengths`` and together of ``tokens`` symbols; if they are to be ``dense``, all of
    MQ at the shortest, of values of two digits and from one needle up to as many as fit: some are easy from the start.
    """
    length = lengths[0] if dense else int(generator.choice(lengths))
    rows = tokens // length
    if dense:
        full = fullest("MQ-NIAH", length, dataclasses.replace(form, digits=min(form.digits, 2)))
        some = (dataclasses.replace(full, many=int(generator.integers(1, full.many + 1))) for _ in range(rows))
        return [draw("MQ-NIAH", length, library.train, row, generator) for row in some]
    return [draw(task, length, library.train, form, generator) for task in generator.choice(list(TASKS), rows)]


def loss_of(network: HopeForCausalLM, samples: Sequence[Sample], library: Library) -> Tensor:
    """The mean cross entropy of the symbols of all answers, in nats, each after the right ones before it."""
    longest = max(len(sample.prompt) + len(sample.answer) for sample in samples)
    ids = torch.zeros(len(samples), longest, dtype=torch.long)  # filler stands behind, where no answer sees it
    targets = torch.full_like(ids, IGNORE)
    for row, sample in enumerate(samples):
        numbers = torch.tensor([library.number[symbol] for symbol in (*sample.prompt, *sample.answer)])
        ids[row, : len(numbers)] = numbers
        targets[row, len(sample.prompt) : len(numbers)] = numbers[len(sample.prompt) :]
    ids, targets = ids[:, :-1].to(network.device), targets[:, 1:].to(network.device)
    hidden = network.model(input_ids=ids, use_cache=False).last_hidden_state
    asked = targets != IGNORE
    return F.cross_entropy(network.lm_head(hidden[asked]), targets[asked])


def accuracy(network: HopeForCausalLM, samples: Sequence[Sample], library: Library) -> float:
    """The mean of `share_found` over samples of equal length, in percent."""
    rows = max(1, READ // len(samples[0].prompt))
    shares: list[float] = []
    for begin in range(0, len(samples), rows):
        some = samples[begin : begin + rows]
        said = answers(network, some, library)
        shares += [share_found(words, sample.values) for words, sample in zip(said, some, strict=True)]
    return 100 * float(np.mean(shares))


def answers(network: HopeForCausalLM, samples: Sequence[Sample], library: Library) -> list[list[str]]:
    """What the model writes behind prompts of equal length, in as many symbols as the longest right answer has."""
    symbols = list(library.number)
    prompts = torch.tensor([[library.number[symbol] for symbol in sample.prompt] for sample in samples])
    generated = network.generate(  # type: ignore[bad-argument-type]
        prompts.to(network.device),
        attention_mask=torch.ones_like(prompts).to(network.device),
        max_new_tokens=max(len(sample.answer) for sample in samples),
        do_sample=False,
        use_cache=True,
        prefill_chunk_size=PIECE,
        eos_token_id=library.number[END],
        pad_token_id=library.number[END],
    )
    return [[symbols[number] for number in row] for row in generated[:, prompts.shape[1] :].tolist()]

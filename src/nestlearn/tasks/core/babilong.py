"""BABILong (figure 9, section 9.2): answers from facts that are hidden in a stream of 1 K to 10 M tokens.

Small models are trained from scratch, first on stories by themselves with all their questions, then, as the benchmark
fine-tunes, on the answer to a hidden story over a curriculum of growing lengths: half of the batches have the length of
the stage, the others one of any stage so far. At test the stream is read through the model's cache in pieces, so that
nothing but the state grows with its length, and the answer is generated greedily; it is right if it is the whole
answer. Training and test share neither stories nor background.

A state that outgrows ``bound`` ends a model's ladder of lengths: attention keeps all it read, Hope's state is constant.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from nestlearn.models.hope import HopeForCausalLM
from nestlearn.tasks.core.babi import (
    END,
    NAMES,
    Background,
    Example,
    Sample,
    Teller,
    Vocabulary,
    read_questions,
    task_file,
)
from nestlearn.tasks.core.models import Size, language_model
from nestlearn.tasks.core.reading import MemoryMeter, advance, answer, tensor_bytes
from nestlearn.tasks.core.step import descend
from nestlearn.tasks.core.writing import ROWS as WRITES_COST
from nestlearn.tasks.core.writing import cost_of, lines, with_cost
from nestlearn.tasks.datasets import lacking
from nestlearn.tasks.layout import PALETTE, legend_below, panel_grid, save_figure, table
from nestlearn.tasks.plan import Plan, Row
from nestlearn.tasks.report import base, measured
from nestlearn.train.model import count_parameters
from nestlearn.train.optimizers import build as build_optimizer

TITLE = "BABILong (figure 9, section 9.2)"
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "transformer": ("transformer", {}),
    "transformer+conv": ("transformer+conv", {}),
    "titans": ("titans", {}),
    "deltanet": ("deltanet", {}),
    "hope": ("hope", {}),
    "hope, no decay": ("hope", {"decay": False}),
    **WRITES_COST,
}
TEXTS = ("wikitext2/train.txt", "wikitext2/valid.txt", "wikitext2/test.txt")  # the first to train, the others to test
MIB = 2**20

SIZE = {"dim": 64, "layers": 2, "heads": 4, "intermediate": 192}
TINY = {"dim": 16, "layers": 1, "heads": 2, "intermediate": 24}
# A stage is [tokens of a stream, steps, whether only answers count]; a stream of 0 tokens is a story by itself with all
# its questions. A rung is [tokens, samples].
RECIPES: dict[str, dict[str, Any]] = {
    "smoke": dict(
        size=TINY,
        vocabulary=512,
        stages=[[0, 2, False], [0, 2, True], [256, 2, True]],
        batch=4,
        most=512,
        ladder=[[256, 4], [1024, 2], [8192, 1]],
        bound=0.25,
        piece=512,
        device="cpu",
    ),
    "cpu": dict(
        size=SIZE,
        vocabulary=4096,
        stages=[
            *([0, 700, True], [128, 300, True], [256, 150, True], [512, 100, True]),
            *([1024, 150, True], [2048, 100, True], [4096, 100, True]),
        ],
        batch=16,
        most=16_384,
        ladder=[[1024, 200], [4096, 80], [16_384, 40], [65_536, 16], [262_144, 8], [1_048_576, 8]],
        bound=32,
        piece=2048,
        device="cpu",
    ),
    "gpu": dict(
        size=SIZE | {"dim": 256, "layers": 4, "intermediate": 768},
        vocabulary=8192,
        stages=[[0, 4000, True], [128, 2000, True], *([128 * 2**n, 1000, True] for n in range(1, 7))],
        batch=64,
        most=524_288,
        ladder=[[1024, 500], [4096, 500], [16_384, 250], [65_536, 100], [262_144, 50], [1_048_576, 25]],
        bound=1024,
        piece=8192,
        device="cuda",
    ),
}
LONGEST = {"smoke": [], "cpu": [[10_000_000, 4]], "gpu": [[10_000_000, 10]]}  # for Hope, on the first task
RATES = {"smoke": (3e-3,), "cpu": (3e-3,), "gpu": (3e-4, 1e-3)}
SEEDS = {"smoke": (0,), "cpu": (0, 1), "gpu": (0, 1, 2)}
CRITERION = ("validation_error", "validation_loss")

WARMUP = 50  # steps
FALL = 0.2  # of all steps, over which the learning rate falls to zero
WEIGHT_DECAY = 0.01  # decoupled, in units of the learning rate, on matrices
VALIDATION = 10  # every so many stories of the training file are for validation
VALIDATION_SAMPLES = 200
ROWS = 8  # streams that are read side by side
ANSWER_TOKENS = 4  # that are generated at most
TEST_SEED, VALIDATION_SEED = 1, 2


def plan(scale: str, data: str | None) -> Plan:
    """Every model on every task, the longest stream for Hope on the first."""
    rows = []
    recipe = {key: value for key, value in RECIPES[scale].items() if key != "ladder"}
    for task in NAMES:
        absent = lacking(data, [*TEXTS, "babi"])
        for name, (model, options) in MODELS.items():
            longest = LONGEST[scale] if model == "hope" and task == next(iter(NAMES)) else []
            ladder = [*RECIPES[scale]["ladder"], *longest]
            arguments = {"task": task, "model": model, "options": options, "ladder": ladder}
            rows.append(Row(task, name, arguments | cost_of(name), absent))
    return Plan("babilong", train_one, recipe, rows, RATES[scale], SEEDS[scale], CRITERION, data)


def train_one(
    task: str,
    model: str,
    lr: float,
    seed: int,
    *,
    data: str,
    stages: Sequence[Sequence[int]],
    ladder: Sequence[Sequence[int]],
    batch: int = 16,
    most: int = 16_384,
    vocabulary: int = 4096,
    bound: float = 32,
    piece: int = 2048,
    size: Mapping[str, int] | None = None,
    options: Mapping[str, Any] | None = None,
    cost: float = 0.0,
    device: str = "cpu",
    log: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """A cell: train a model on a task of bAbI in background text and climb the ladder of lengths.

    Args:
        task: a name of `nestlearn.tasks.core.babi.NAMES`.
        model: a name of `nestlearn.tasks.core.models.BLOCKS`.
        lr: of AdamW; it rises over `WARMUP` steps and falls to zero over the last part.
        seed: of the weights and the training samples; test samples are the same for all.
        data: the folder of real data.
        stages: ``[tokens of a stream, steps, whether only answers count]`` of the curriculum, see `Teller.example`;
            the last one has a length, at which is validated.
        ladder: ``[tokens of a stream, samples]`` to test, in rising order.
        batch, most: streams of a training step, and tokens of one: long streams are fewer.
        vocabulary: most words.
        bound: MiB that the state of one stream may take.
        piece: tokens that are read at a time.
        size, options: fields of `Size` and of `HopeConfig`.
        cost: of writing, added to the loss of streams with background: nats for a mean step size of 1.
        device: a torch device.
        log: gets a line every 50 steps.

    Returns by length ``accuracy N`` (percent), ``samples N``, ``state N`` (MiB of one stream's state at its end),
    ``memory N`` (MiB, the most that the process held while it read, or the device), ``tokens_per_second N``; and
    ``validation_error`` (percent, at the last stage's length), ``validation_loss`` (nats per answer token),
    ``outgrown`` (tokens read when the state passed ``bound``, or null), ``parameters``, ``vocabulary``, ``curve`` and
    ``diverged``.

    Raises `UserError` for unknown names and data that is not there.
    """
    began = time.perf_counter()
    text = _read(data, task, vocabulary)
    torch.manual_seed(seed)
    network = language_model(model, len(text.vocabulary), Size(**(size or {})), options).to(device)  # type: ignore[arg-type]
    result: dict[str, Any] = {"parameters": count_parameters(network), "vocabulary": len(text.vocabulary)}
    result |= {"diverged": False, "curve": [], "outgrown": None}
    if not train(network, text.training, stages, batch, most, lr, seed, device, result["curve"], log, cost):
        return result | {"diverged": True}
    length = stages[-1][0]
    samples = fixed_samples(text.validation, length, VALIDATION_SAMPLES, VALIDATION_SEED)
    found = climb(network, text.validation, samples, piece, math.inf, device)
    result["validation_error"] = 100 - found["accuracy"]
    result["validation_loss"] = answer_loss(network, text.validation, samples, device)
    for length, count in ladder:
        found = climb(network, text.test, fixed_samples(text.test, length, count, TEST_SEED), piece, bound, device)
        if "outgrown" in found:
            result["outgrown"] = found["outgrown"]
            break
        result |= {f"{key} {length}": value for key, value in found.items()}
    return result | {"seconds": time.perf_counter() - began}


@dataclasses.dataclass(frozen=True)
class _Text:
    """The samples of a task: to train, to choose the learning rate, to test."""

    vocabulary: Vocabulary
    training: Teller
    validation: Teller
    test: Teller


@functools.lru_cache(maxsize=1)
def _background(data: str) -> tuple[str, str]:
    texts = [(Path(data) / name).read_text(encoding="utf-8") for name in TEXTS]
    return texts[0], "\n".join(texts[1:])


@functools.lru_cache(maxsize=1)
def _read(data: str, task: str, size: int) -> _Text:
    questions, asked = (read_questions(task_file(data, task, split)) for split in ("train", "test"))
    seen, unseen = _background(data)
    needed = [line for q in questions for line in (*q.facts, q.text, q.answer)]
    vocabulary = Vocabulary(needed, seen, size)
    train_text, test_text = Background(seen, vocabulary), Background(unseen, vocabulary)
    held = [q.story % VALIDATION == VALIDATION - 1 for q in questions]
    return _Text(
        vocabulary,
        Teller([q for q, out in zip(questions, held, strict=True) if not out], train_text, vocabulary),
        Teller([q for q, out in zip(questions, held, strict=True) if out], train_text, vocabulary),
        Teller(asked, test_text, vocabulary),
    )


def fixed_samples(teller: Teller, length: int, count: int, seed: int) -> list[Sample]:
    """The same samples for every model."""
    generator = np.random.default_rng([seed, length])
    return [teller.draw(length, generator) for _ in range(count)]


def train(
    network: HopeForCausalLM,
    teller: Teller,
    stages: Sequence[Sequence[int]],
    batch: int,
    most: int,
    lr: float,
    seed: int,
    device: str,
    curve: list[list[float]],
    log: Callable[[str], None] | None = None,
    cost: float = 0.0,
) -> bool:
    """Train over the curriculum; whether all stayed finite. ``curve`` gets ``[step, tokens, loss]``."""
    optimizer = build_optimizer("adamw", network, lr, WEIGHT_DECAY)
    generator = np.random.default_rng([seed, 0])
    total, done = sum(stage[1] for stage in stages), 0
    network.train()
    for number, (longest, steps, only_answer) in enumerate(stages):
        lengths = sorted({stage[0] for stage in stages[: number + 1]})
        for step in range(steps):
            done += 1
            length = longest if generator.random() < 0.5 else int(generator.choice(lengths))
            rows = max(1, min(batch, most // max(length, 1)))
            examples = [teller.example(length, bool(only_answer), generator) for _ in range(rows)]
            forward = functools.partial(loss_of, network, examples, device)
            loss, paid = with_cost(network, cost if length else 0.0, forward)
            rate = lr * min(done / WARMUP, (total - done + 1) / (FALL * total), 1)
            if not descend(network, optimizer, paid, rate):
                return False
            if step % 50 == 0 or step == steps - 1:
                curve.append([done, length, loss.item()])
                if log is not None:
                    log(f"step {done} of {total}, {length} tokens: loss {loss.item():.4f}")
    return True


def loss_of(network: HopeForCausalLM, examples: Sequence[Example], device: str) -> Tensor:
    """Mean loss in nats per token that counts."""
    shape = len(examples), max(len(example.tokens) for example in examples)
    tokens, counts = np.zeros(shape, np.int64), np.zeros(shape, dtype=bool)
    for row, example in enumerate(examples):
        tokens[row, : len(example.tokens)] = example.tokens
        counts[row, : len(example.tokens)] = example.counts
    read, chosen = torch.from_numpy(tokens).to(device), torch.from_numpy(counts).to(device)
    # Filler stands at the end, so that nothing sees it. The head reads only what counts: it is most of the work.
    hidden = network.model(input_ids=read[:, :-1], use_cache=False).last_hidden_state
    return nn.functional.cross_entropy(network.lm_head(hidden[chosen[:, 1:]]).float(), read[chosen])


@torch.no_grad()
def answer_loss(network: HopeForCausalLM, teller: Teller, samples: list[Sample], device: str) -> float:
    """Mean loss of the answers in nats per token; all answers of a task are of one length."""
    network.eval()
    groups = [samples[start : start + ROWS] for start in range(0, len(samples), ROWS)]
    losses = [float(loss_of(network, [teller.told(s, True) for s in group], device)) * len(group) for group in groups]
    return sum(losses) / len(samples)


def climb(
    network: HopeForCausalLM, teller: Teller, samples: list[Sample], piece: int, bound: float, device: str
) -> dict[str, Any]:
    """Read streams of one length and answer: what `train_one` returns of a rung, or ``outgrown`` alone."""
    network.eval()
    meter = MemoryMeter(device)
    began, right, state = time.perf_counter(), 0, 0.0
    for start in range(0, len(samples), ROWS):
        group = samples[start : start + ROWS]
        cache = DynamicCache(config=network.config)
        read = 0
        for tokens in teller.batches(group, piece):
            advance(network, torch.from_numpy(tokens).long().to(device), cache)
            read += tokens.shape[1]
            state = tensor_bytes(cache.layers) / len(group) / MIB
            meter.note()
            if state > bound:
                return {"outgrown": read}
        answers = answer(network, cache, [sample.question for sample in group], END, ANSWER_TOKENS)
        right += sum(given == s.answer.tolist() for given, s in zip(answers, group, strict=True))
    tokens = samples[0].length * len(samples)
    return {
        "accuracy": 100 * right / len(samples),
        "samples": len(samples),
        "state": state,
        "memory": meter.most / MIB,
        "tokens_per_second": tokens / (time.perf_counter() - began),
    }


def section(found: Mapping[str, Mapping[str, Any]], folder: Path) -> str:
    """Accuracy by length of every task, then state, memory and speed, and all as curves."""
    lengths = sorted(
        {length for models in found.values() for outcome in models.values() for length in _lengths(outcome)}
    )
    parts = [
        "Right answers in percent, generated greedily, by the length of the stream in tokens; the paper shows figure 9 "
        "without numbers. Beyond the longest text that is held out (0.5 M tokens) the background repeats. A stream "
        "whose state outgrows the bound of the recipe is not read on.\n"
    ]
    for task, models in found.items():
        rows = [[name, *(_rung(outcome, length) for length in lengths)] for name, outcome in models.items()]
        parts.append(table([f"{task}, {NAMES[task]}", *(_short(length) for length in lengths)], rows))
    parts += _costs(found, lengths)
    figure = draw(found, lengths, folder / "babilong.png")
    return "\n".join([*parts, f"![Accuracy, state and speed against the length of the stream]({figure.name})\n"])


def _costs(found: Mapping[str, Mapping[str, Any]], lengths: Sequence[int]) -> Iterator[str]:
    """State, memory and speed: those of the first task that a model has numbers of."""
    for key, what, form in (
        ("state", "MiB of one stream's state", ".3g"),
        ("memory", "most MiB in use", ".4g"),
        ("tokens_per_second", "tokens read in a second", ",.0f"),
    ):
        rows = []
        for name in MODELS:
            outcome = next((models[name] for models in found.values() if _lengths(models.get(name))), None)
            means = {} if outcome is None else outcome["mean"]
            cells = [f"{means[f'{key} {n}']:{form}}" if f"{key} {n}" in means else "-" for n in lengths]
            rows.append([name, *cells])
        yield table([what, *(_short(length) for length in lengths)], rows)


def _rung(outcome: Mapping[str, Any] | None, length: int) -> str:
    if outcome is not None and outcome["runs"] and f"accuracy {length}" not in outcome["mean"]:
        stops = [run.get("outgrown") for run in outcome["runs"]]
        if None not in stops and max(stops) <= length:
            return f"state too large after {_short(max(stops))}"
    text = measured(outcome, [f"accuracy {length}"])
    samples = {} if outcome is None else outcome["mean"]
    count = samples.get(f"samples {length}")
    return text if count is None else f"{text} (of {count:.0f})"


def _lengths(outcome: Mapping[str, Any] | None) -> list[int]:
    means = {} if outcome is None else outcome["mean"]
    return sorted(int(key.split()[1]) for key in means if key.startswith("accuracy "))


def _short(length: int) -> str:
    """A number of tokens in K and M.

    >>> _short(4096), _short(10_000_000), _short(300)
    ('4K', '10M', '300')
    """
    if length >= 10**6:
        return f"{length / (2**20 if length % 2**20 == 0 else 10**6):g}M"
    return f"{length // 1024}K" if length >= 1024 else str(length)


def draw(found: Mapping[str, Mapping[str, Any]], lengths: Sequence[int], path: Path) -> Path:
    """Against the length: accuracy in each task that was run, a panel each, then the state and the memory."""
    styles = lines(MODELS, PALETTE)
    run = [task for task, models in found.items() if any(map(_lengths, models.values()))]
    keys = [(task, "accuracy", f"{task}: right answers (percent)") for task in run]
    keys += [(None, "state", "state of a stream (MiB)"), (None, "memory", "memory in use (MiB)")]
    figure, panels = panel_grid(len(keys), 4, 3.3, 3.5)
    for axes, (task, key, title) in zip(panels, keys, strict=True):
        for name in MODELS:
            outcomes = [models[name] for t, models in found.items() if name in models and task in (None, t)]
            outcome = next((o for o in outcomes if _lengths(o)), None)
            if outcome is not None:
                points = [(n, outcome["mean"][f"{key} {n}"]) for n in _lengths(outcome)]
                width = 2.5 if base(name) == "hope" else 1.4
                colour, line = styles[name]
                axes.plot(*zip(*points, strict=True), line, color=colour, label=name, linewidth=width)
        axes.set_title(title, fontsize=10)
        axes.set_xscale("log")
        if key == "accuracy":
            axes.set_ylim(-4, 104)
        elif key == "state":
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        if lengths:
            axes.set_xlim(lengths[0] / 1.5, lengths[-1] * 1.5)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[-4:]:
        axes.set_xlabel("tokens of the stream")
    legend_below(figure, panels[0])
    return save_figure(figure, path)

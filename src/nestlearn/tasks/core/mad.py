"""MAD (table 4, section 9.4): five small problems of one ability each (Poli et al. 2024).

A model is trained on a fixed set of sequences, `nestlearn.tasks.core.mad_data`, and its score is the share of asked
symbols that it finds in new ones, averaged over settings: a baseline, and what makes it harder, one change at a time.
Scale ``gpu`` has the benchmark's own settings, 12,800 sequences (memorisation 256), 200 epochs of batches of 128, width
128 and two blocks; ``cpu`` the baselines alone, at about half the length, a tenth of the steps, of a quarter of the
batch, and one learning rate for all: what two cores do in two hours. As in the benchmark, compression is told from the
last state by an MLP that gets that state and the position, for each position alone.

Choices of ours: the learning rate is chosen on validation sequences, where the benchmark takes the best on the test
sequences; it rises over the first `WARMUP` of the steps and falls to zero as a cosine, and gradients are clipped;
weight decay is `WEIGHT_DECAY`, where the benchmark tries 0 and 0.1; all is in float32. A score counts every asked
symbol alike, where the benchmark's code averages over the symbols of the vocabulary: they are drawn evenly. Its sixth
problem, noisy recall, is not in the paper's table.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.errors import UserError
from nestlearn.tasks.core.mad_data import IGNORE, Examples, Problem, draw
from nestlearn.tasks.core.models import Size, build
from nestlearn.tasks.core.paper import TABLE_4, TABLE_4_TASKS
from nestlearn.tasks.core.step import descend
from nestlearn.tasks.layout import PALETTE, new_figure, save_figure, table
from nestlearn.tasks.plan import Plan, Row, summarise
from nestlearn.tasks.report import base, differences, measured, order_section
from nestlearn.train.model import count_parameters
from nestlearn.train.optimizers import build as build_optimizer

TITLE = "MAD (table 4, section 9.4)"
# Chunks of 16 as for the formal languages: at the usual 64 a short sequence would have no self-modification at all.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "transformer": ("transformer", {}),
    "transformer+conv": ("transformer+conv", {}),
    "linear": ("linear", {}),
    "deltanet": ("deltanet", {}),
    "gated-deltanet": ("gated-deltanet", {}),
    "titans, chunk 16": ("titans", {"chunk_size": 16}),
    "hope-attention": ("hope-attention", {}),
    "hope, chunk 16": ("hope", {"chunk_size": 16}),
}
BASELINE = "baseline"
FEWER = (6400, 3200, 1600, 800)
# Of a task: its easiest problem, and values of single fields in its place.
Grid = tuple[dict[str, int], dict[str, Sequence[int]]]
GRIDS: dict[str, dict[str, Grid]] = {
    "smoke": {task: (dict(vocabulary=16, length=24, examples=16, copied=4), {}) for task in TABLE_4_TASKS},
    "cpu": {
        "compression": (dict(vocabulary=16, length=32, examples=12_800), {}),
        "in-context recall": (dict(vocabulary=16, length=64, examples=12_800), {}),
        "fuzzy recall": (dict(vocabulary=16, length=64, examples=12_800), {}),
        "selective copying": (dict(vocabulary=16, length=64, examples=12_800, copied=8), {}),
        "memorisation": (dict(vocabulary=256, length=32, examples=256), {}),
    },
    "gpu": {
        "compression": (
            dict(vocabulary=16, length=32, examples=12_800),
            {"vocabulary": (32, 64, 128), "length": (64, 128, 256), "examples": FEWER},
        ),
        "in-context recall": (
            dict(vocabulary=16, length=128, examples=12_800),
            {"vocabulary": (32, 64, 128), "length": (256, 512, 1024), "examples": FEWER},
        ),
        "fuzzy recall": (
            dict(vocabulary=16, length=128, examples=12_800, motif=3),
            {"vocabulary": (32, 64, 128), "length": (256, 512, 1024), "examples": FEWER},
        ),
        "selective copying": (
            dict(vocabulary=16, length=256, examples=12_800, copied=16),
            {"vocabulary": (32, 64, 128), "length": (512, 1024), "examples": FEWER, "copied": (32, 64, 96)},
        ),
        "memorisation": (
            dict(vocabulary=256, length=32, examples=256),
            {"vocabulary": (512, 1024, 2048, 4096, 8192)},
        ),
    },
}
# Fewer examples are fewer steps, as in the benchmark; of memorisation's 256 an epoch has only a few.
EPOCHS = {"smoke": (1, 1), "cpu": (5, 50), "gpu": (200, 200)}  # of most tasks, and of memorisation
RECIPES: dict[str, dict[str, Any]] = {
    "smoke": dict(size={"dim": 16, "layers": 1, "heads": 2, "intermediate": 24}, batch=8, held_out=16, device="cpu"),
    "cpu": dict(size={"dim": 64, "layers": 2, "heads": 4, "intermediate": 192}, batch=32, held_out=640, device="cpu"),
    "gpu": dict(size={"dim": 128, "layers": 2, "heads": 8, "intermediate": 384}, batch=128, held_out=1280)
    | {"device": "cuda"},
}
RATES = {"smoke": (3e-3,), "cpu": (3e-3,), "gpu": (1e-4, 5e-4, 1e-3)}
SEEDS = {"smoke": (0,), "cpu": (0, 1), "gpu": (0, 1, 2)}
CRITERION = ("validation_error", "validation_loss")

WARMUP = 0.05  # of all steps
WEIGHT_DECAY = 0.1  # decoupled, in units of the learning rate, on matrices
GREY = "#888888"  # the plain transformer: there are more rows than colours
POINTS = 10  # validations of a run
VALIDATION_SEED, TEST_SEED = 1, 2  # training draws from seeds of its own
EVALUATED = 128  # sequences at a time


def problems(scale: str, task: str) -> dict[str, Problem]:
    """The settings of a task by name, the baseline first.

    >>> list(problems("cpu", "memorisation"))
    ['baseline']
    """
    easiest, changes = GRIDS[scale][task]
    harder = {f"{field} {value}": {field: value} for field, values in changes.items() for value in values}
    return {name: Problem(**(easiest | change)) for name, change in ({BASELINE: {}} | harder).items()}


def plan(scale: str, data: str | None) -> Plan:
    """Every model of `ROWS` on every problem of the scale; no data is needed."""
    rows = []
    for task in TABLE_4_TASKS:
        epochs = EPOCHS[scale][task == "memorisation"]
        for name, problem in problems(scale, task).items():
            for row, (model, options) in ROWS.items():
                arguments = {"task": task, "problem": dataclasses.asdict(problem), "epochs": epochs, "model": model}
                rows.append(Row(f"{task}, {name}", row, arguments | {"options": options}))
    return Plan("mad", train_one, RECIPES[scale], rows, RATES[scale], SEEDS[scale], CRITERION)


def section(found: Mapping[str, Mapping[str, Any]], folder: Path) -> str:
    """Table 4 from the averages over the settings, what differs in order, and the score in every setting."""
    settings = {task: [name for name in found if name.split(", ")[0] == task] for task in TABLE_4_TASKS}
    scores = {
        task: {row: average([found[name].get(row) for name in names]) for row in ROWS}
        for task, names in settings.items()
    }
    papers = {task: {model: values[n] for model, values in TABLE_4.items()} for n, task in enumerate(TABLE_4_TASKS)}
    rows = []
    for row in ROWS:
        given = {task: [paper[base(row)]] if base(row) in paper else None for task, paper in papers.items()}
        rows.append([row, *(measured(scores[task][row], ["accuracy"], given[task]) for task in TABLE_4_TASKS)])
    names = [name for task in TABLE_4_TASKS for name in settings[task]]
    single = [[name, *(measured(found[name].get(row), ["accuracy"]) for row in ROWS)] for name in names]
    figure = draw_figure(found, names, folder / "mad.png")
    return "\n".join(
        [
            "Symbols that are right in new sequences, in percent, averaged over the settings below: the MAD score of a "
            "task. All but transformer read through Hope's short convolution, so that transformer+conv is the baseline "
            "with which hope and hope-attention compare.\n",
            table(["model", *TABLE_4_TASKS], rows),
            order_section([differences(scores[task], "accuracy", papers[task], task) for task in TABLE_4_TASKS]),
            "In each setting:\n",
            table(["setting", *ROWS], single),
            f"![Right symbols by setting and model]({figure.name})\n",
        ]
    )


def average(outcomes: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """The outcome of one model over all settings of a task: of each seed the mean accuracy.

    It is partial if a seed is missing anywhere, and not run if a setting is. A seed that diverged anywhere diverged.

    >>> runs = [{"state": "finished", "diverged": 0, "runs": [{"accuracy": a}]} for a in (50.0, 100.0)]
    >>> average(runs)["mean"]
    {'accuracy': 75.0}
    """
    for outcome in outcomes:
        if outcome is not None and outcome["state"] == "finished" and not outcome["runs"]:
            return {"state": "finished", "reason": outcome["reason"], **summarise([], "accuracy")}
    there = [outcome for outcome in outcomes if outcome is not None and outcome.get("runs")]
    if not there or len(there) < len(outcomes):
        reason = f"{len(there)} of {len(outcomes)} settings" if there else None
        return {"state": "not run", "reason": reason, **summarise([], "accuracy")}
    seeds = [len(outcome["runs"]) for outcome in there]
    runs = [[outcome["runs"][seed].get("accuracy") for outcome in there] for seed in range(min(seeds))]
    means = [{"accuracy": None if None in values else float(np.mean(values))} for values in runs]
    partial = len(set(seeds)) > 1 or any(outcome["state"] == "partial" for outcome in there)
    reason = f"{min(seeds)} seeds in every setting" if partial else None
    return {"state": "partial" if partial else "finished", "reason": reason, **summarise(means, "accuracy")}


def draw_figure(found: Mapping[str, Mapping[str, Any]], settings: Sequence[str], path: Path) -> Path:
    """A row a setting, a colour a model, a point a seed."""
    figure = new_figure(9, 1.6 + 0.36 * len(settings))
    axes = figure.subplots()
    for number, (row, colour) in enumerate(zip(ROWS, (GREY, *PALETTE[1:], PALETTE[0]), strict=True)):
        points = [
            (run["accuracy"], place + 0.3 - 0.6 * number / (len(ROWS) - 1))
            for place, setting in enumerate(settings[::-1])
            for run in found[setting].get(row, {}).get("runs", [])
            if run.get("accuracy") is not None
        ]
        axes.plot(*zip(*points, strict=True) if points else ([], []), "o", color=colour, markersize=4, label=row)
    axes.set_yticks(range(len(settings)), settings[::-1], fontsize=9)
    axes.set_xlim(-3, 103)
    axes.set_xlabel("right symbols (percent); a point a seed", fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return save_figure(figure, path)


class Decoder(nn.Module):
    """Any model of one output a position as a compressor: the state after the last symbol tells them all.

    Every position alone gets that state and a sinusoidal code of where it is, (B, T) -> (B, T, vocabulary).

    Args:
        encoder: tokens (B, T) -> (B, T, width).
        width, vocabulary: of the encoder's output, number of symbols.
    """

    def __init__(self, encoder: nn.Module, width: int, vocabulary: int) -> None:
        super().__init__()
        self.encoder = encoder
        layers = [nn.RMSNorm(width), nn.Linear(width, width), nn.GELU()]
        layers += [nn.RMSNorm(width), nn.Linear(width, width), nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.RMSNorm(width), nn.Linear(width, vocabulary))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of every symbol."""
        states = self.encoder(tokens)
        T, width = states.shape[1:]
        angles = torch.arange(T, device=states.device)[:, None] * 1e4 ** -torch.linspace(
            0, 1, width // 2, device=states.device
        )
        places = F.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, width % 2))
        return self.layers(states[:, -1:] + places)


def train_one(
    task: str,
    model: str,
    lr: float,
    seed: int,
    *,
    problem: Mapping[str, int] | None = None,
    options: Mapping[str, Any] | None = None,
    size: Mapping[str, int] | None = None,
    epochs: int = 10,
    batch: int = 32,
    held_out: int = 640,
    device: str = "cpu",
    log: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """A cell: train a model on a problem and test it on new sequences.

    Args:
        task: a name of `nestlearn.tasks.core.mad_data.TASKS`.
        model: a name of `nestlearn.tasks.core.models.MODELS`.
        lr: of AdamW, per step, at its peak.
        seed: of the weights and the training sequences. What is to be memorised is the same for all seeds.
        problem: fields of `Problem`.
        options: fields of `HopeConfig`, as ``{"chunk_size": 1}``.
        size: fields of `Size`.
        epochs, batch: passes over the training sequences, sequences of a step.
        held_out: sequences of validation, and of the test.
        device: a torch device.
        log: gets a line at every validation.

    Returns ``accuracy`` (right symbols of the test, percent), ``validation_error`` (wrong symbols, percent),
    ``validation_loss`` (nats per asked symbol), ``parameters``, ``steps`` made, ``seconds`` of all of it, ``curve``
    (``[step, validation loss, right symbols in percent]``) and ``diverged``: a loss or a gradient was not finite, and
    there are no scores.

    Raises `UserError` for unknown names, options that the model refuses and a problem that is too small.

    >>> tiny = dict(size={"dim": 8, "layers": 1, "heads": 2, "intermediate": 12}, held_out=4, epochs=1)
    >>> train_one("compression", "hope", lr=1e-3, seed=0, problem={"length": 8, "examples": 64}, **tiny)["steps"]
    2
    """
    began = time.perf_counter()
    given = Problem(**(problem or {}))
    training = draw(task, given, given.examples, np.random.default_rng([seed, 0]), training=True)
    validation, test = (
        draw(task, given, held_out, np.random.default_rng(number), training=False)
        for number in (VALIDATION_SEED, TEST_SEED)
    )
    torch.manual_seed(seed)
    network = make_network(task, model, given.vocabulary, Size(**(size or {})), options).to(device)
    optimizer = build_optimizer("adamw", network, lr, WEIGHT_DECAY)
    result: dict[str, Any] = {"parameters": count_parameters(network), "curve": [], "diverged": False}
    order = np.random.default_rng([seed, 1])
    steps = epochs * math.ceil(given.examples / batch)
    every = math.ceil(steps / POINTS)
    found, step = {}, 0

    for _ in range(epochs):
        for rows in np.array_split(order.permutation(given.examples), range(batch, given.examples, batch)):
            step += 1
            network.train()
            logits, targets = _read(network, Examples(*(part[rows] for part in training)), device)
            loss = F.cross_entropy(logits, targets)
            if not descend(network, optimizer, loss, lr * schedule(step, steps)):
                return result | {"diverged": True, "steps": step}
            if step % every == 0 or step == steps:
                found = evaluate(network, validation, device)
                result["curve"].append([step, found["loss"], found["accuracy"]])
                if log is not None:
                    log(f"step {step} train {loss.item():.5f} validation {found['loss']:.5f} {found['accuracy']:.1f}%")
    result |= {"validation_error": 100 - found["accuracy"], "validation_loss": found["loss"], "steps": step}
    result["accuracy"] = evaluate(network, test, device)["accuracy"]
    return result | {"seconds": time.perf_counter() - began}


def make_network(
    task: str, model: str, vocabulary: int, size: Size, options: Mapping[str, Any] | None = None
) -> nn.Module:
    """A fresh model with a logit for every symbol at every position, behind `Decoder` for compression."""
    if task != "compression":
        return build(model, vocabulary, vocabulary, size, options)
    return Decoder(build(model, vocabulary, size.dim, size, options), size.dim, vocabulary)


def schedule(step: int, steps: int) -> float:
    """The share of the peak learning rate at ``step`` of ``steps``, from 1.

    >>> [round(schedule(step, 100), 3) for step in (1, 5, 53, 100)]
    [0.2, 1.0, 0.492, 0.0]
    """
    warm = max(1, round(WARMUP * steps))
    if step <= warm:
        return step / warm
    return (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2


@torch.no_grad()
def evaluate(network: nn.Module, examples: Examples, device: str = "cpu") -> dict[str, float]:
    """``accuracy``: asked symbols that are right, in percent; ``loss``: nats per asked symbol."""
    network.eval()
    right = asked = 0
    total = 0.0
    for begin in range(0, len(examples.tokens), EVALUATED):
        some = Examples(*(part[begin : begin + EVALUATED] for part in examples))
        logits, targets = _read(network, some, device)
        right += (logits.argmax(-1) == targets).sum().item()
        asked += len(targets)
        total += F.cross_entropy(logits, targets, reduction="sum").item()
    if asked == 0:
        raise UserError("nothing is asked in these sequences: give more of them")
    return {"accuracy": 100 * right / asked, "loss": total / asked}


def _read(network: nn.Module, examples: Examples, device: str) -> tuple[Tensor, Tensor]:
    """The logits (N, vocabulary) and targets (N) of all that is asked."""
    tokens, targets = (torch.from_numpy(part).to(device) for part in examples)
    asked = targets != IGNORE
    return network(tokens)[asked], targets[asked]

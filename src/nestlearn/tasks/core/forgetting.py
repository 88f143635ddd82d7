"""Section 7.1's argument on real text: do levels that rest forget less, and come back sooner?

A small language model reads domain A (code), then B (English prose), then A again. It is trained on A as language
models are; then it is deployed: text comes in order, every step is one forward and backward pass over the newest
text, and only the MLPs of its continuum memories learn, the rest of the model is fixed. Each block has a chain of
four MLPs. The rows differ in the frequencies of these four alone, so all have the same weights, the same parameters and
the same start:

    1 level     updated every 1, 1, 1, 1 steps: an ordinary online learner with one learning rate
    2 levels                  1, 1, 4, 4
    3 levels                  1, 1, 4, 16
    4 levels                  1, 4, 16, 64
    4 levels, slow first      64, 16, 4, 1    (data meets the slowest MLP first)

A level is updated from the mean gradient of its chunk (Eq. 71) by AdamW. "all weights" fine-tunes the whole model at
every step. The learning rate is the best by the mean loss over the whole stream, of each text before it is
learned from: what a learner that is deployed is there for, and nothing that rewards standing still.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nestlearn.data import load_corpus, load_tokenizer
from nestlearn.data.packing import pack
from nestlearn.models.hope import HopeConfig, HopeForCausalLM
from nestlearn.optim import LevelwiseOptimizer, periods_of
from nestlearn.tasks.core.step import descend
from nestlearn.tasks.layout import PALETTE, legend_below, new_figure, save_figure, table
from nestlearn.tasks.plan import Plan, Row
from nestlearn.tasks.report import measured
from nestlearn.train.model import count_parameters

TITLE = "Forgetting and recovery by levels (section 7.1)"
SETTING = "code, prose, code"
ROWS: dict[str, tuple[int, ...] | None] = {
    "all weights": None,
    "1 level": (1, 1, 1, 1),
    "2 levels": (1, 1, 4, 4),
    "3 levels": (1, 1, 4, 16),
    "4 levels": (1, 4, 16, 64),
    "4 levels, slow first": (64, 16, 4, 1),
}
MODEL = dict(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=384)
TINY = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
RECIPES: dict[str, dict[str, Any]] = {
    "smoke": dict(model=TINY, length=32, base_steps=4, base_batch=2, steps=12, batch=1, held_out=2),
    "cpu": dict(model=MODEL, length=256, base_steps=400, base_batch=16, steps=100, batch=4, held_out=48),
    "gpu": dict(model=MODEL | {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 2048}, length=1024)
    | dict(base_steps=4000, base_batch=32, steps=1000, batch=4, held_out=64),
}
RATES = {"smoke": (1e-3,), "cpu": (1e-4, 3e-4, 1e-3, 3e-3), "gpu": (3e-5, 1e-4, 3e-4, 1e-3)}
SEEDS = {"smoke": (0,), "cpu": (0, 1, 2), "gpu": (0, 1, 2)}
CRITERION = ("stream_loss",)
BASE_RATE, WARMUP, WEIGHT_DECAY = 1e-3, 0.1, 0.1
BETAS = (0.9, 0.95)
CHARACTERS = 8_000_000  # of a domain, at most
RECOVERED = 0.2  # of what was forgotten may still be missing
EARLY = (1, 2, 4, 8, 16)  # steps after a change of domain at which the loss is taken too
COLUMNS = {
    "gain": "learned of prose",
    "forgotten": "forgotten of code",
    "after_8": "still missing, 8 steps",
    "at_end": "at the end",
    "recovery": "steps to recover 80 %",
    "both": "both domains at the end",
    "stream_loss": "loss over the stream",
}


def plan(scale: str, data: str | None) -> Plan:
    """Every row of `ROWS`; prose is WikiText-2 of the data folder."""
    prose = None if data is None else Path(data) / "wikitext2"
    reason = None if prose is not None and prose.is_dir() else "no data: give --data DIR with wikitext2/"
    rows = [Row(SETTING, name, {"periods": None if p is None else list(p)}, reason) for name, p in ROWS.items()]
    return Plan("forgetting", stream, RECIPES[scale], rows, RATES[scale], SEEDS[scale], CRITERION, data)


def section(found: Mapping[str, Mapping[str, Any]], folder: Path) -> str:
    """A row for each number of levels, and the loss of code along the stream."""
    outcomes = found.get(SETTING, {})
    rows = [[name, *(measured(outcomes.get(name), [key]) for key in COLUMNS)] for name in ROWS]
    figure = draw(outcomes, folder / "forgetting.png")
    return "\n".join(
        [
            "Losses on held-out text in nats a byte. A model trained on code reads prose, then code again; forgotten "
            "is what the loss of code has risen when the prose ends, then what of that is still missing. Rows differ "
            "in the update periods of each block's four MLPs; all weights is the whole model fine-tuned at every step. "
            "The last column chose the learning rate.\n",
            table(["learner", *COLUMNS.values()], rows),
            f"![Loss of code and of prose along the stream]({figure.name})\n",
        ]
    )


def draw(outcomes: Mapping[str, Any], path: Path) -> Path:
    """The held-out loss of either domain along the stream, a line a row, the mean over the seeds."""
    figure = new_figure(11, 4.6)
    panels = figure.subplots(1, 2)
    for place, name in enumerate(ROWS):
        runs = [run for run in outcomes.get(name, {}).get("runs", []) if run.get("curve")]
        if not runs:
            continue
        curves = np.array([run["curve"] for run in runs])  # (seeds, points, [step, code, prose])
        mean, spread = curves.mean(0), curves.std(0)
        for axes, column in zip(panels, (1, 2), strict=True):
            axes.plot(mean[:, 0], mean[:, column], color=PALETTE[place], label=name, linewidth=1.6)
            low, high = mean[:, column] - spread[:, column], mean[:, column] + spread[:, column]
            axes.fill_between(mean[:, 0], low, high, color=PALETTE[place], alpha=0.12, linewidth=0)
        panels[0].axvline(mean[-1, 0] / 2, color="#888888", linewidth=0.8, linestyle="--")
        panels[1].axvline(mean[-1, 0] / 2, color="#888888", linewidth=0.8, linestyle="--")
    for axes, name in zip(panels, ("code", "prose"), strict=True):
        axes.set_title(f"held-out {name}: reads prose, then code", fontsize=11)
        axes.set_xlabel("steps of the stream")
        axes.set_ylabel("nats a byte")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    legend_below(figure, panels[0])
    return save_figure(figure, path)


def stream(
    periods: list[int] | None,
    lr: float,
    seed: int,
    data: str,
    model: Mapping[str, int],
    length: int,
    base_steps: int,
    base_batch: int,
    steps: int,
    batch: int,
    held_out: int,
    log: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """A cell: the model of ``seed``, trained on code, reads ``steps`` batches of prose and as many of code.

    Args:
        periods: steps between two updates of each of the four MLPs of a block; ``None`` trains all weights every step.
        lr: of AdamW in the stream.
        seed: of the weights, the order of the first training, and the place in the texts where the stream begins.
        data: folder with ``wikitext2/``.
        model: fields of `HopeConfig`.
        length: of a sequence, in bytes.
        base_steps, base_batch: of the first training, steps and sequences of each.
        steps, batch: of each half of the stream, steps and sequences of each.
        held_out: sequences of each domain that the loss is taken on.
        log: gets a line whenever the loss is taken.

    Returns losses in nats a byte: ``code`` and ``prose`` of the start, ``gain`` of prose at the end of prose,
    ``forgotten`` of code there, ``after_8`` and ``at_end`` (what is still missing of code after 8 and after all steps
    of code), ``recovery`` (steps until no more than a fifth of it is missing, of those at which the loss is taken;
    ``steps`` if never), ``both`` (mean loss of code and prose at the end), ``stream_loss`` and ``curve`` (``[step,
    code, prose]``); and ``updated`` (share of the parameters that a step updates, on average), ``parameters`` and
    ``diverged``.
    """
    texts = domains(data, length)
    learner = HopeForCausalLM(_config(model))
    learner.load_state_dict(dict(_base(data, tuple(model.items()), length, base_steps, base_batch, seed)))
    optimizer, updated = _optimizer(learner, periods, lr)
    curve: list[list[float]] = []
    read: list[float] = []

    def measure(step: int) -> None:
        curve.append([step, *(mean_loss(learner, texts[name][1][:held_out]) for name in ("code", "prose"))])
        if log is not None:
            log(f"step {step}: code {curve[-1][1]:.3f}, prose {curve[-1][2]:.3f}")

    measure(0)
    for half, name in enumerate(("prose", "code")):
        sequences = texts[name][0]
        # The first half of the code is what the base may have seen.
        begin = len(sequences) // 2 + seed * steps * batch
        for step in range(1, steps + 1):
            ids = sequences[begin + (step - 1) * batch : begin + step * batch]
            loss = learner(input_ids=ids, labels=ids, use_cache=False).loss
            if not descend(learner, optimizer, loss, lr):
                return {"curve": curve, "updated": updated, "diverged": True}
            read.append(loss.item())
            if step % max(1, steps // 8) == 0 or step in EARLY or step == steps:
                measure(half * steps + step)
    result = {"stream_loss": float(np.mean(read)), "curve": curve, "updated": updated}
    if not math.isfinite(sum(read) + sum(map(sum, curve))):
        return result | {"diverged": True}
    at = {int(step): (code, prose) for step, code, prose in curve}
    (code, prose), (worst, learned) = at[0], at[steps]
    missing = {step - steps: loss - code for step, (loss, _) in at.items() if step > steps}
    recovered = [step for step, loss in missing.items() if loss <= RECOVERED * (worst - code)]
    return result | {
        "code": code,
        "prose": prose,
        "gain": prose - learned,
        "forgotten": worst - code,
        "after_8": missing[8],
        "at_end": missing[steps],
        "recovery": min(recovered, default=steps),
        "both": sum(at[2 * steps]) / 2,
        "parameters": count_parameters(learner),
        "diverged": False,
    }


def _config(model: Mapping[str, int]) -> HopeConfig:
    """Attention behind the short convolution, and a chain of four MLPs in every block."""
    levels = len(next(periods for periods in ROWS.values() if periods is not None))
    fields: dict[str, Any] = dict(
        model,
        vocab_size=257,
        block_types=["hope-attention"] * model["num_hidden_layers"],
        cms_chunk_sizes=[1] * levels,  # the outer optimizer sets the frequencies
        tie_word_embeddings=True,
    )
    return HopeConfig(**fields)


def _optimizer(learner: HopeForCausalLM, periods: list[int] | None, lr: float) -> tuple[torch.optim.Optimizer, float]:
    """What learns in the stream, and the share of the learner's parameters that it updates in a mean step."""
    every = count_parameters(learner)
    if periods is None:
        return torch.optim.AdamW(learner.parameters(), lr=lr, betas=BETAS, weight_decay=0.0, fused=True), 1.0
    period_of = periods_of(learner, {f"model.layers.*.memory.levels.{i}": p for i, p in enumerate(periods)})
    for p in learner.parameters():
        p.requires_grad_(p in period_of)
    inner = torch.optim.AdamW(list(period_of), lr=lr, betas=BETAS, weight_decay=0.0, fused=True)
    updated = sum(p.numel() / period for p, period in period_of.items()) / every
    return LevelwiseOptimizer(inner, period_of, error="mean"), updated


@functools.lru_cache(maxsize=1)
def domains(data: str, length: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Training and held-out sequences of bytes, (N, length) int64 each, of ``code`` and ``prose``."""
    found = {}
    for name, source in (("code", "stdlib"), ("prose", str(Path(data) / "wikitext2"))):
        corpus = load_corpus(source)
        order = np.random.default_rng(0).permutation(len(corpus.train))
        documents = [corpus.train[i] for i in order] if name == "code" else list(corpus.train)  # files mixed
        parts = [_few(documents), _few(list(corpus.validation))]
        packed = [pack(part, load_tokenizer("bytes"), length).ids for part in parts]
        found[name] = tuple(torch.from_numpy(ids.astype(np.int64)) for ids in packed)
    return found  # type: ignore[return-value]


def _few(documents: list[str]) -> list[str]:
    """The first documents, with `CHARACTERS` in all."""
    kept, left = [], CHARACTERS
    for document in documents:
        kept.append(document[:left])
        left -= len(kept[-1])
        if not left:
            break
    return kept


@functools.lru_cache(maxsize=1)
def _base(
    data: str, model: tuple[tuple[str, int], ...], length: int, steps: int, batch: int, seed: int
) -> tuple[tuple[str, Tensor], ...]:
    """The weights of the model of ``seed`` after its training on code."""
    sequences = domains(data, length)["code"][0]
    torch.manual_seed(seed)
    learner = HopeForCausalLM(_config(dict(model)))
    optimizer = torch.optim.AdamW(
        learner.parameters(), lr=BASE_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    generator = torch.Generator().manual_seed(seed)
    rising = max(1, round(WARMUP * steps))
    for step in range(1, steps + 1):
        ids = sequences[torch.randint(len(sequences) // 2, (batch,), generator=generator)]
        loss = learner(input_ids=ids, labels=ids, use_cache=False).loss
        finite = descend(
            learner, optimizer, loss, BASE_RATE * min(step / rising, (1 + math.cos(math.pi * step / steps)) / 2)
        )
        assert finite
    return tuple((name, value.clone()) for name, value in learner.state_dict().items())


@torch.no_grad()
def mean_loss(learner: HopeForCausalLM, sequences: Tensor) -> float:
    """Mean loss in nats a byte over sequences (N, T)."""
    losses = [learner(input_ids=ids, labels=ids, use_cache=False).loss.item() * len(ids) for ids in sequences.split(16)]
    return sum(losses) / len(sequences)

"""Figure 6: classes that arrive in groups, and a pretrained language model that has to tell all of them apart.

A group's examples are there while it is learned, and never again but to methods that keep examples as their memory.
After each group the model names the class of held-out texts, among all classes so far: the label whose words and line
end are likeliest behind ``Text: ... / Label:`` (the exact log-probability of each, `nestlearn.tasks.continual.choice`).

All that learn by gradients read the same batches in the same order, and have the loss of the language model on the
label's tokens; about as many parameters may change in each (but in "all weights"). Hope's levels descend the gradient
as Eq. 71 is printed, so that a step lies in the span of the inputs that it comes from, and consolidate each group at
its end (`nestlearn.convert.kept`), but for the row that says so; else its rows differ in their levels alone. All others
use AdamW. Joint training has all groups at once: a ceiling, not a continual learner.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestlearn.tasks.continual.classes import FILES, Example, Groups, load_groups
from nestlearn.tasks.continual.late import LateModel
from nestlearn.tasks.continual.learners import (
    ClassGaussians,
    ClassLearner,
    Demonstrations,
    Embedder,
    GradientLearner,
    Reader,
)
from nestlearn.tasks.continual.metrics import average_accuracy, backward_transfer, forgetting
from nestlearn.tasks.continual.pretrained import lacking_model, load_model
from nestlearn.tasks.continual.rules import make_rule
from nestlearn.tasks.datasets import lacking
from nestlearn.tasks.layout import PALETTE, legend_below, new_figure, save_figure, table
from nestlearn.tasks.plan import Plan, Row
from nestlearn.tasks.report import differences, measured, order_section

TITLE = "Class-incremental learning (figure 6)"
# Tokens, the first less than a step reads, the last some times a group; a row of n levels has the first n.
PERIODS = (64, 128, 256, 512)
LEVEL = {"rule": "sgd", "consolidation": 3.0}  # of Hope; chosen together (docs/log.md)
HOPE = {n: {"method": "hope", "levels": n, "level": LEVEL} for n in range(1, 5)}
GRADIENT: dict[str, dict[str, Any]] = {
    **{f"hope, {n} level{'s' * (n > 1)}": given for n, given in HOPE.items()},
    "hope, 4 levels, nothing consolidated": {**HOPE[4], "level": {**LEVEL, "consolidation": 0.0}},
    "fine-tuning, same blocks": {"method": "mlp"},
    "fine-tuning, all weights": {"method": "all"},
    "ewc": {"method": "ewc"},
    "lora": {"method": "lora"},
    "joint training": {"method": "mlp", "joint": True},
}
IN_CONTEXT = {"icl": {"method": "icl"}, "inca": {"method": "inca"}}
CHOSEN = {"icl": "demonstrations", "inca": "candidates"}  # what is searched in place of a learning rate
ORDER = {"hope": 4.0, "inca": 3.0, "ewc": 2.0, "icl": 1.0}  # figure 6: only the order is known, 4 is the best
RECIPES: dict[str, dict[str, Any]] = {
    "smoke": dict(model="tiny", classes=4, groups=2, train=2, validation=1, test=1, epochs=1, batch=2, rank=2),
    "cpu": dict(model="smollm2", classes=20, groups=5, train=10, validation=5, test=5, epochs=3, batch=4, rank=64),
    "gpu": dict(model="smollm2", classes=150, groups=10, train=80, validation=15, test=30, epochs=3, batch=8, rank=64),
}
SETTINGS = {
    "smoke": {"clinc150": {}},
    "cpu": {"clinc150": {}, "banking77": {}, "dbpedia": {}},
    # Where a class has too few examples for the recipe.
    "gpu": {"clinc150": {}, "banking77": dict(classes=77, groups=7, train=30), "dbpedia": dict(classes=60, train=20)},
}
RATES = {"smoke": (1e-3,), "cpu": (1e-4, 3e-4), "gpu": (1e-5, 3e-5, 1e-4, 3e-4)}
HOPE_RATES = {"smoke": (1.0,), "cpu": (1.0, 3.0), "gpu": (0.3, 1.0, 3.0, 10.0)}  # of gradient descent
COUNTS = {
    "icl": {"smoke": (2,), "cpu": (4, 8), "gpu": (4, 8, 16, 32)},
    "inca": {"smoke": (2,), "cpu": (1, 4), "gpu": (1, 2, 4, 8)},
}
SEEDS = {"smoke": (0,), "cpu": (0, 1, 2), "gpu": (0, 1, 2)}
CRITERION = ("validation_error", "validation_loss")
STRENGTH = 0.3  # of EWC; with 0.1, 1 and 10 it was worse (docs/log.md)
SHOWN = 2  # examples of a candidate class of InCA
LATE = 4  # the last quarter of the layers learns
COLUMNS = {"average": "accuracy at the end", "incremental": "mean over groups", "forgetting": "forgetting"} | {
    "backward": "backward transfer"
}


def plan(scale: str, data: str | None) -> Plan:
    """Every method on every data set."""
    recipe = RECIPES[scale]
    rows = []
    for setting, sizes in SETTINGS[scale].items():
        missing = lacking(data, FILES[setting]) or lacking_model(recipe["model"])
        for name, given in (GRADIENT | IN_CONTEXT).items():
            method = given["method"]
            reason = missing
            if method == "lora" and importlib.util.find_spec("peft") is None:
                reason = missing or "peft is not installed: pip install 'nestlearn[peft]'"
            rates = {**COUNTS, "hope": HOPE_RATES}.get(method, RATES)[scale]
            rows.append(Row(setting, name, {"name": setting, **given, **sizes}, reason, rates))
    return Plan("class-incremental", learn_classes, recipe, rows, RATES[scale], SEEDS[scale], CRITERION, data)


def section(found: Mapping[str, Mapping[str, Any]], folder: Path) -> str:
    """A table for each data set, the accuracy after every group, and how the order differs from the paper's."""
    parts = [
        "Accuracy in percent among all classes so far, on held-out texts. Forgetting is the fall of earlier groups "
        "from their best, backward transfer the change since each was learned; joint training sees all groups at once. "
        "For ICL the number of demonstrations was searched in place of a learning rate, for InCA the number of "
        "candidate classes (with 1 its Gaussians decide alone). Hope's levels learn by plain gradient descent, and "
        "consolidate each group at its end, if nothing else is said.\n"
    ]
    sentences = []
    for setting, outcomes in found.items():
        rows = [
            [name, *(measured(outcome, [key], form=".1f") for key in COLUMNS)] for name, outcome in outcomes.items()
        ]
        sizes = next(iter(outcomes.values()))["arguments"] if outcomes else {}
        shown = {key: sizes[key] for key in ("classes", "groups", "train") if key in sizes}
        parts += [f"### {setting}{f' ({shown})' if shown else ''}\n", table(["method", *COLUMNS.values()], rows)]
        sentences.append(differences(outcomes, "average", ORDER, setting))
    figure = draw(found, folder / "class-incremental.png")
    parts.append(f"![Accuracy over all classes so far, after each group]({figure.name})\n")
    return "\n".join([*parts, order_section(sentences)])


def draw(found: Mapping[str, Mapping[str, Any]], path: Path) -> Path:
    """Accuracy over the groups, a panel for each data set, a line for each method, the mean over the seeds."""
    figure = new_figure(4.6 * max(1, len(found)), 4.4)
    panels = figure.subplots(1, max(1, len(found)), squeeze=False)[0]
    for axes, (setting, outcomes) in zip(panels, found.items(), strict=False):
        for place, (name, outcome) in enumerate(outcomes.items()):
            curves = [run["curve"] for run in outcome.get("runs", []) if run.get("curve")]
            if not curves:
                continue
            mean = np.mean(curves, axis=0)
            style = dict(color=PALETTE[place % len(PALETTE)], linestyle="-" if place < len(PALETTE) else ":")
            if name == "joint training":
                axes.axhline(mean[-1], label=name, linewidth=1, **(style | {"linestyle": "--"}))
            else:
                axes.plot(range(1, len(mean) + 1), mean, label=name, marker="o", markersize=3, linewidth=1.5, **style)
        axes.set_title(setting, fontsize=11)
        axes.set_xlabel("groups learned")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy, %")
    legend_below(figure, panels[0])
    return save_figure(figure, path)


def learn_classes(
    name: str,
    method: str,
    lr: float,
    seed: int,
    data: str,
    model: str,
    classes: int,
    groups: int,
    train: int,
    validation: int,
    test: int,
    epochs: int,
    batch: int,
    rank: int,
    levels: int = 0,
    level: Mapping[str, Any] | None = None,
    joint: bool = False,
) -> dict[str, Any]:
    """A cell: one method learns the groups of a data set.

    Args:
        name: of the data set.
        method: of `make_rule`, "icl" or "inca".
        lr: of the rule, and of the fastest level of Hope, see `make_learner`; for "icl" the demonstrations, for "inca"
            the candidate classes.
        seed: draws classes, examples and batches.
        data: the folder of real data.
        model: "tiny", or what `nestlearn.convert.pretrained.model_folder` takes.
        classes, groups, train, validation, test: of `load_groups`.
        epochs, batch: how often a group is read, and examples of a step.
        rank: of LoRA.
        levels: of Hope.
        level: fields of each of them, see `Level`; a group is what it calls a text.
        joint: learn all groups as one.

    Returns in percent ``average``, ``incremental`` (mean of the averages after each group), ``forgetting``,
    ``backward``, ``curve`` (average after each group) and ``accuracies``; ``validation_error`` and
    ``validation_loss`` (nats, among the labels) of all classes at the end; ``parameters`` that may change.
    """
    problem = load_groups(data, name, classes, groups, train, validation, test, seed)
    torch.manual_seed(seed)
    learner = make_learner(*load_model(model), problem, method, lr, seed, epochs, batch, rank, levels, level or {})
    counts = np.cumsum([len(group) for group in problem.groups]).tolist()
    rows: list[list[float]] = []
    try:
        if joint:
            learner.learn([example for group in problem.train for example in group])
            rows.append([100 * accuracy(learner, part, counts[-1]) for part in problem.test])
        else:
            for now, examples in enumerate(problem.train):
                learner.learn(examples)
                rows.append([100 * accuracy(learner, part, counts[now]) for part in problem.test[: now + 1]])
        held = [example for group in problem.validation for example in group]
        scores = learner.scores(held, counts[-1]).float()
    except FloatingPointError:
        return {"diverged": True}
    targets = torch.tensor([example.label for example in held])
    loss = torch.nn.functional.cross_entropy(scores.clamp_min(-1e3), targets).item()
    averages = average_accuracy(rows)
    return {
        "average": averages[-1],
        "incremental": sum(averages) / len(averages),
        "forgetting": None if joint else forgetting(rows)[-1],
        "backward": None if joint else backward_transfer(rows)[-1],
        "curve": averages,
        "accuracies": rows,
        "validation_error": 100 - 100 * (scores.argmax(1) == targets).double().mean().item(),
        "validation_loss": loss,
        "parameters": learner.parameters,
    }


def make_learner(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problem: Groups,
    method: str,
    lr: float,
    seed: int,
    epochs: int,
    batch: int,
    rank: int,
    levels: int,
    level: Mapping[str, Any],
) -> ClassLearner:
    """The learner of a cell, see `learn_classes`."""
    reader = Reader(tokenizer, problem.labels)
    if method in CHOSEN:
        model.requires_grad_(False)
        embed = Embedder(model, reader)
        if method == "icl":
            return Demonstrations(model, reader, embed, shown=int(lr))
        return ClassGaussians(model, reader, embed, candidates=int(lr), shown=SHOWN)
    count = model.config.num_hidden_layers
    first = 0 if method in ("all", "lora") else count - max(-(-count // LATE), levels)
    late = LateModel(model, first)
    # A slower level makes fewer updates, from means over more tokens: its rate grows with the root of its period.
    rates = {period: lr * math.sqrt(period / PERIODS[0]) for period in PERIODS[:levels]}
    config = {"layers": "all", "levels": [{"period": period, "lr": lr, **level} for period, lr in rates.items()]}
    rule = make_rule(method, late.top, lr, levels=config, strength=STRENGTH, rank=rank)
    generator = np.random.default_rng(seed)
    return GradientLearner(late, rule, reader, epochs=epochs, batch=batch, generator=generator)


def accuracy(learner: ClassLearner, examples: list[Example], labels: int) -> float:
    """Share of the examples whose label has the highest score among the first ``labels``."""
    best = learner.scores(examples, labels).argmax(1)
    return (best == torch.tensor([example.label for example in examples])).double().mean().item()

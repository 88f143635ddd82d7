"""New knowledge without forgetting: a stream of conflicting domains, and what the model could do before.

The model reads a grammar in LaTeX, Python, requests with their intents, and sentences of another language with their
translations, once, one after the other. Then, with no document in the context: the loss on passages that stood between
those that were read (the gain), questions about what was read, and the abilities of before.

Every method runs at every learning rate, which makes a curve of what it loses against what it gains; methods are
compared at a gain that all of them reach, by interpolation along their curves. Hope reads by `ContinualLearner`; the
others take the same windows of the same length, and one step each.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestlearn.convert import ContinualModel, LevelsConfig, convert
from nestlearn.learner.learner import ContinualLearner
from nestlearn.learner.stream import Windows
from nestlearn.tasks.continual import abilities, streams
from nestlearn.tasks.continual.abilities import Abilities, answer, continuations, detokenise
from nestlearn.tasks.continual.choice import lay_out
from nestlearn.tasks.continual.curves import curves, draw, matched
from nestlearn.tasks.continual.late import LateModel
from nestlearn.tasks.continual.pretrained import lacking_model, load_model
from nestlearn.tasks.continual.rules import CLIP, Rule, make_rule
from nestlearn.tasks.continual.streams import Domain, load_domains
from nestlearn.tasks.datasets import lacking
from nestlearn.tasks.layout import table
from nestlearn.tasks.plan import Plan, Row
from nestlearn.tasks.report import measured

TITLE = "New knowledge without forgetting"
BEFORE = "before"  # the setting of the model that has read nothing
PERIODS = (1, 2, 4, 8)  # windows; a row of n levels has the first n
METHODS: dict[str, dict[str, Any]] = {
    "hope, 1 level": {"method": "hope", "levels": 1, "keep": True},
    "hope, 4 levels": {"method": "hope", "levels": 4, "keep": True},
    "hope, 1 level, domains consolidated": {"method": "hope", "levels": 1, "keep": True, "consolidation": 0.3},
    "hope, 4 levels, nothing kept": {"method": "hope", "levels": 4},
    "fine-tuning, same blocks": {"method": "mlp"},
    "fine-tuning, all weights": {"method": "all"},
    "ewc": {"method": "ewc"},
    "lora": {"method": "lora"},
}
RECIPES: dict[str, dict[str, Any]] = {
    "smoke": dict(model="tiny", window=64, tokens=256, held_out=64, questions=2, items=2, chats=1, windows=1, rank=2),
    "cpu": dict(model="smollm2", window=512, tokens=4096, held_out=768, questions=15, items=60, chats=40, windows=6)
    | dict(rank=64),
    "gpu": dict(model="smollm2", window=512, tokens=131072, held_out=8192, questions=200, items=1000, chats=200)
    | dict(windows=64, rank=64),
}
RATES = {"smoke": (1e-3, 3e-3), "cpu": (3e-5, 1e-4, 3e-4), "gpu": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)}
SEEDS = {"smoke": (0,), "cpu": (0, 1), "gpu": (0, 1, 2)}
LONGER = 4  # Hope's rates where it keeps something, in units of the others': its steps are shortened by what is kept
STRENGTH = 0.1  # of EWC; with 1 its gain stays below half of the others'
PROSE = 8  # windows of WikiText-2's training text: EWC takes the importance of weights from them, Hope what it keeps
OLD = {  # what may be lost: how it is called, and the sign that makes a rise bad
    "prose_nats": ("WikiText-2, nats a token", 1),
    "chat_nats": ("its own chat replies, nats a token", 1),
    "lambada_nats": ("LAMBADA, nats a token", 1),
    "lambada": ("LAMBADA, % right", -1),
    "questions": ("ARC-easy, % right", -1),
}


def plan(scale: str, data: str | None) -> Plan:
    """Every method at every learning rate, each a row of one run a seed, and the model that has read nothing."""
    recipe = RECIPES[scale]
    missing = lacking(data, [*streams.FILES, *abilities.FILES, "wikitext2/train.txt"]) or lacking_model(recipe["model"])
    rows = [Row(BEFORE, "-", {"method": "none"}, missing, (0.0,))]
    for name, given in METHODS.items():
        reason = missing
        if given["method"] == "lora" and importlib.util.find_spec("peft") is None:
            reason = missing or "peft is not installed: pip install 'nestlearn[peft]'"
        rates = [lr * LONGER if given.get("keep") else lr for lr in RATES[scale]]
        rows += [Row(name, f"lr {lr:g}", given, reason, (lr,)) for lr in rates]
    return Plan("knowledge", read_stream, recipe, rows, RATES[scale][:1], SEEDS[scale], ("held_out",), data)


def section(found: Mapping[str, Mapping[str, Any]], folder: Path) -> str:
    """What was measured at every rate, what is lost at equal gain, and the curves."""
    before = found.get(BEFORE, {}).get("-")
    keys = ["held_out", "asked", *OLD]
    names = {"held_out": "held-out passages, nats a token", "asked": "questions about what was read, % right"}
    header = ["method", *(names.get(key) or OLD[key][0] for key in keys)]
    rows = [["before", *(measured(before, [key]) for key in keys)]]
    for method, outcomes in found.items():
        if method != BEFORE:
            rows += [[f"{method}, {lr}", *(measured(o, [key]) for key in keys)] for lr, o in outcomes.items()]
    lines = curves(found, BEFORE, "held_out", {key: sign for key, (_, sign) in OLD.items()})
    gain, losses = matched(lines)
    parts = [
        "The model reads four domains one after the other, each window once, at every learning rate that the last "
        "table names; nothing was chosen among them. Hope leaves alone what the model answers to the prose that EWC is "
        "given too, if nothing else is said. The gain is the fall of the loss on held-"
        "out passages, a mean over the domains at the end of the stream; a loss of what it could do is the rise of its "
        "nats or the fall of its accuracy.\n"
    ]
    if losses:
        parts.append(f"Lost at a gain of {gain:.3f} nats a token, by interpolation along each method's curve:\n")
        body = [[name, *(f"{lost[key]:.3g}" for key in OLD)] for name, lost in losses.items()]
        parts.append(table(["method", *(label for label, _ in OLD.values())], body))
    parts += ["Everything that was measured:\n", table(header, rows)]
    figure = draw(lines, {key: label for key, (label, _) in OLD.items()}, folder / "knowledge.png")
    return "\n".join([*parts, f"![What is lost against what is gained]({figure.name})\n"])


def read_stream(
    method: str,
    lr: float,
    seed: int,
    data: str,
    model: str,
    window: int,
    tokens: int,
    held_out: int,
    questions: int,
    items: int,
    chats: int,
    windows: int,
    rank: int,
    levels: int = 0,
    keep: bool = False,
    consolidation: float = 0.0,
) -> dict[str, Any]:
    """A cell: one method reads the stream at one learning rate.

    Args:
        method: of `make_rule`, or "none".
        lr: of the fastest level of Hope (the others' grow with the root of the period, as by default), or of the
            optimizer.
        seed: draws the texts and the questions.
        data: the folder of real data.
        model: "tiny", or what `nestlearn.convert.pretrained.model_folder` takes.
        window: tokens of a step.
        tokens, held_out, questions: of each domain.
        items, chats, windows: of `Abilities`.
        rank: of LoRA.
        levels: of Hope.
        keep: whether Hope leaves alone what the model answers to the prose that EWC is given, too.
        consolidation: of the levels of Hope, at the end of each domain.

    Returns ``held_out`` (nats per token, the mean over the domains) and ``held_out_NAME`` of each domain, ``asked``
    (percent of the questions right), what `Abilities.measure` gives, ``refused`` windows, and ``parameters``.
    """
    torch.manual_seed(seed)
    network, tokenizer = load_model(model)
    late = LateModel(network, 0)
    known = Abilities(late, tokenizer, data, items, chats, windows)
    domains = load_domains(data, tokenizer, tokens, held_out, questions, seed)
    parameters, refused = 0, 0
    if method == "hope":
        converted = _convert(network, levels, window, lr, consolidation)
        if keep:
            converted.keep(tokenizer, _prose(data))
        parameters = sum(level.parameters for level in converted.levels)
        learner = ContinualLearner(converted, tokenizer, window=window)
        refused = sum(len(learner.read(domain.read).skipped) for domain in domains)
        reading: AbstractContextManager[Any] = converted.using(learner.weights)
    else:
        rule = _rule(network, method, lr, rank)
        if method == "ewc":
            rule.end_group(_losses(late, tokenizer, _prose(data), window)[:PROSE])
        if method != "none":
            parameters = rule.parameters
            for domain in domains:
                _read(late, tokenizer, domain, window, rule)
        reading = rule.reading()
    with reading:
        result = _measure(late, tokenizer, domains, known, window)
    return result | {"refused": refused, "parameters": parameters}


def _prose(data: str) -> str:
    """What EWC and what Hope is given of what the model knew."""
    return detokenise((Path(data) / "wikitext2/train.txt").read_text(encoding="utf-8")[: 3000 * PROSE])


def _convert(network: PreTrainedModel, levels: int, window: int, lr: float, consolidation: float) -> ContinualModel:
    each = {"clip": CLIP, "consolidation": consolidation}
    given = [{"period": window * n, "lr": lr * math.sqrt(n), **each} for n in PERIODS[:levels]]
    return convert(network, LevelsConfig.from_dict({"levels": given, "layers": "all"}))


def _rule(network: PreTrainedModel, method: str, lr: float, rank: int) -> Rule:
    """A rule on all weights, on LoRA's, or on the MLPs of all layers, as Hope."""
    if method in ("all", "lora"):
        return make_rule(method, network, lr, rank=rank)
    return make_rule("mlp" if method == "none" else method, LateModel(network, 0).top, lr, strength=STRENGTH)


def _losses(late: LateModel, tokenizer: PreTrainedTokenizerBase, text: str, window: int) -> list[Callable[[], Tensor]]:
    """The summed loss of every window."""
    sheets = [lay_out([ids.tolist()], None, 0) for ids in Windows(text, tokenizer, window) if len(ids) > 1]

    def loss(n: int) -> Tensor:
        hidden = late.hidden(sheets[n])[0, :-1]
        targets = sheets[n].ids[0, 1:].to(hidden.device)
        return torch.nn.functional.cross_entropy(late.logits(hidden).float(), targets, reduction="sum")

    return [lambda n=n: loss(n) for n in range(len(sheets))]


def _read(late: LateModel, tokenizer: PreTrainedTokenizerBase, domain: Domain, window: int, rule: Rule) -> None:
    """One step for every window of a domain."""
    losses = _losses(late, tokenizer, domain.read, window)
    for loss in losses:
        with rule.reading():
            value = loss()
        rule.step(value, window, window)
    rule.end_group(losses)


def _measure(
    late: LateModel, tokenizer: PreTrainedTokenizerBase, domains: list[Domain], known: Abilities, window: int
) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for domain in domains:
        parts = [ids.tolist() for ids in Windows(domain.held_out, tokenizer, window) if len(ids) > 1]
        losses, _ = continuations(late, [(ids[:1], ids[1:]) for ids in parts], 0)
        result[f"held_out_{domain.name}"] = losses.sum().item() / sum(len(ids) - 1 for ids in parts)
    result["held_out"] = sum(result.values()) / len(domains)
    asked = answer(late, tokenizer, [question for domain in domains for question in domain.questions])
    return result | {"asked": asked["right"], "asked_nats": asked["nats"]} | known.measure()

"""What keeping learning costs: learning beside plain fine-tuning, generation beside the unconverted model, snapshots.

Both of a pair run in turn in the same process, on the same text, and the median over the turns counts. Fine-tuning is
a loop of one step of AdamW on the MLPs of the same layers for every window, with the same clipping; it computes no
gradient below them either.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestlearn.convert import LevelsConfig, convert
from nestlearn.data.stdlib_corpus import stdlib_documents
from nestlearn.learner.learner import ContinualLearner
from nestlearn.learner.stream import Windows
from nestlearn.tasks.continual.pretrained import lacking_model, load_model
from nestlearn.tasks.continual.rules import FineTuning
from nestlearn.tasks.layout import table
from nestlearn.tasks.plan import Plan, Row
from nestlearn.tasks.report import measured

TITLE = "Speed of learning, of generation and of a snapshot"
SETTING = "speed"
ROWS = {f"hope, {n} level{'s' * (n > 1)}": {"levels": n} for n in range(1, 5)}
PERIODS = (1, 2, 4, 8)  # windows; a row of n levels has the first n
RECIPES: dict[str, dict[str, Any]] = {
    "smoke": dict(model="tiny", window=32, windows=2, new_tokens=8, turns=2),
    "cpu": dict(model="smollm2", window=512, windows=4, new_tokens=64, turns=3),
    "gpu": dict(model="smollm2", window=512, windows=32, new_tokens=256, turns=5),
}
PROMPT = "def read(path):\n"
COLUMNS = {
    "learning": "learning, tokens/s",
    "tuning": "fine-tuning the same blocks, tokens/s",
    "learning_ratio": "ratio",
    "generation": "generation, tokens/s",
    "plain_generation": "unconverted, tokens/s",
    "generation_ratio": "ratio",
    "snapshot_megabytes": "snapshot, MB",
    "snapshot_seconds": "saving, s",
    "opening_seconds": "opening, s",
}


def plan(scale: str, data: str | None) -> Plan:
    """Hope in one to four levels; the text is the standard library, so no data is needed."""
    recipe = RECIPES[scale]
    rows = [Row(SETTING, name, given, lacking_model(recipe["model"])) for name, given in ROWS.items()]
    return Plan("speed", time_levels, recipe, rows, (1e-4,), (0,), ("seconds_per_token",))


def section(found: Mapping[str, Mapping[str, Any]], folder: Path) -> str:
    """One table."""
    outcomes = found.get(SETTING, {})
    rows = [[name, *(measured(outcomes.get(name), [key], form=".3g") for key in COLUMNS)] for name in ROWS]
    return (
        "Each pair in turn in one process; run with one worker on an idle machine. A snapshot holds the learned "
        "weights, what the rule remembers and what the levels have gathered.\n\n"
        + table(["learner", *COLUMNS.values()], rows)
    )


def time_levels(
    levels: int, lr: float, seed: int, model: str, window: int, windows: int, new_tokens: int, turns: int
) -> dict[str, Any]:
    """A cell: one converted model against its original.

    Args:
        levels: of Hope, on the last quarter of the layers.
        lr: of the levels and of fine-tuning.
        seed: of nothing.
        model: "tiny", or what `nestlearn.convert.pretrained.model_folder` takes.
        window: tokens of a step, and period of the fastest level.
        windows: read in a turn.
        new_tokens: generated in a turn.
        turns: how often each of a pair is timed.

    Returns tokens per second, ratios (above 1 the converted model is faster), and the snapshot's bytes and times.
    """
    network, tokenizer = load_model(model)
    plain, _ = load_model(model)
    given = [{"period": window * period, "lr": lr} for period in PERIODS[:levels]]
    converted = convert(network, LevelsConfig.from_dict({"levels": given}))
    first = min(index for level in converted.levels for index in level.layers)
    text = _text(tokenizer, window * windows)
    with tempfile.TemporaryDirectory() as folder:
        learner = ContinualLearner(converted, tokenizer, Path(folder) / "store", window=window)
        tune = _tuning(plain, first, lr, tokenizer, text, window)
        learning = _in_turn({"learning": lambda: learner.read(text), "tuning": tune}, turns)
        saving = time.perf_counter()
        snapshot = learner.save()
        saved = time.perf_counter()
        learner.rollback(snapshot.id)
        opened = time.perf_counter()
        prompt = torch.tensor([tokenizer(PROMPT, add_special_tokens=False)["input_ids"]], device=plain.device)
        with converted.using(learner.weights):
            pair = {
                "generation": lambda: _generate(converted.base, prompt, new_tokens),
                "plain_generation": lambda: _generate(plain, prompt, new_tokens),
            }
            generation = _in_turn(pair, turns)
    tokens = window * windows
    return {
        "learning": tokens / learning["learning"],
        "tuning": tokens / learning["tuning"],
        "learning_ratio": learning["tuning"] / learning["learning"],
        "seconds_per_token": learning["learning"] / tokens,
        "generation": new_tokens / generation["generation"],
        "plain_generation": new_tokens / generation["plain_generation"],
        "generation_ratio": generation["plain_generation"] / generation["generation"],
        "snapshot_megabytes": snapshot.bytes / 1e6,
        "snapshot_seconds": saved - saving,
        "opening_seconds": opened - saved,
        "parameters": sum(level.parameters for level in converted.levels),
        "threads": torch.get_num_threads(),
    }


def _text(tokenizer: PreTrainedTokenizerBase, tokens: int) -> str:
    """The beginning of the standard library that has so many tokens."""
    text = "\n".join(source for _, source in stdlib_documents()[:20])[: 8 * tokens]
    return str(tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"][:tokens]))


def _tuning(
    model: PreTrainedModel, first: int, lr: float, tokenizer: PreTrainedTokenizerBase, text: str, window: int
) -> Callable[[], None]:
    for p in model.parameters():
        p.requires_grad_(False)
    chosen = [p for layer in model.model.layers[first:] for p in layer.mlp.parameters()]
    for p in chosen:
        p.requires_grad_(True)
    rule = FineTuning(chosen, lr)

    def tune() -> None:
        for ids in Windows(text, tokenizer, window):
            given = ids[None].to(model.device)
            rule.step(model(given, labels=given, use_cache=False).loss, 1, len(ids))

    return tune


@torch.no_grad()
def _generate(model: Any, prompt: torch.Tensor, tokens: int) -> None:
    options: dict[str, Any] = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **options)


def _in_turn(runs: Mapping[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """Median seconds of each, after one turn that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in seconds.items()}

"""Ablation (table 6, section 9.6): Hope trained like language.py's, but for one switch.

The paper's Hope has a momentum and a memory that generates q, which the package leaves off (`docs/core.md`). So
"hope" is here Hope with both, the first rows take away one thing each, as in table 6, and "as shipped" is the package's
default. The rows below turn back one of this project's departures from the print, and the last all of them.

Every row has the parameters of Hope as shipped. Where the search would cost too much (scale cpu), all rows have one
learning rate, Hope's best on this text so far (`docs/results.md`), and the recipe says so.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nestlearn.tasks.core import accuracy, language
from nestlearn.tasks.core.models import Size, configure
from nestlearn.tasks.core.paper import TABLE_2_COLUMNS, TABLE_6
from nestlearn.tasks.datasets import lacking
from nestlearn.tasks.layout import PALETTE, new_figure, save_figure, table
from nestlearn.tasks.plan import Plan, Row
from nestlearn.tasks.report import differences, measured, order_section
from nestlearn.train.model import parameter_count

TITLE = "Ablation (table 6, section 9.6)"
SETTING = language.WORDS
PAPERS: dict[str, Any] = {"momentum": True, "inner_q": True}  # what table 6 takes away again
ROWS: dict[str, dict[str, Any]] = {
    "hope": {},
    "without DGD": {"delta": False},
    "without momentum": {"momentum": False},
    "without weight decay": {"decay": False},
    "without CMS": {"cms_chunk_sizes": [1]},  # one MLP, static in context as all levels are here
    "without inner-projection k": {"inner_k": False},
    "without inner-projection v": {"inner_v": False},
    "without inner-projection q": {"inner_q": False},
}
PRINT: dict[str, dict[str, Any]] = {
    "retention toward zero": {"retention": "zero"},
    "writes in full": {"write_scale": None},  # and the momentum is a sum
    "values as they are": {"normalize_v": False},
    "values not clipped": {"clip_values": False},
    "steps not bounded": {"bounded": False, "eta_max": 1.0},
    "no norm limit": {"norm_limit": None},
    "read at the anchor": {"read": "anchor"},
    "one input for k, v, q": {"shared_input": True},
    "L2 objective": {"objective": "l2", "eta_max": 1.0},  # with steps up to 2 its gradient overshoots in a chunk
}
LETTER = {key: value for options in PRINT.values() for key, value in options.items()}
OWN: dict[str, dict[str, Any]] = {
    "as shipped": dict.fromkeys(PAPERS, False),
    **PRINT,
    "the letter, chunk 16": {**LETTER, "chunk_size": 16},
    "half of the heads accumulate": {"accumulators": 2},
    "static projections": {"inner_k": False, "inner_v": False, "inner_q": False, "inner_gates": False},
}
UNIT = 3  # channels, by which widths differ: the levels of Hope's continuum memory
RATES = {"smoke": (2e-3,), "cpu": (4e-3,), "gpu": (5e-4, 1e-3, 2e-3)}
SEEDS = {"smoke": (0,), "cpu": (0, 1), "gpu": (0, 1, 2)}
# Of 22 rows a run as long as language.py's takes five hours; `RATES` was searched with these.
SHORTER: dict[str, dict[str, Any]] = {"smoke": {}, "cpu": {"tokens": 600_000, "step": 2048}, "gpu": {}}
PERPLEXITY, ACCURACY = "wikitext ppl", [name for name in TABLE_2_COLUMNS if not name.endswith("ppl")]


def plan(scale: str, data: str | None) -> Plan:
    """Every row of table 6 and every departure, as options of Hope."""
    absent = lacking(data, [language.CORPUS])
    shared = language.shared(scale) | language.TEXTS[scale][SETTING]
    examples = 0 if scale == "smoke" else language.shared_examples(scale, SETTING)
    shared |= {"model": "hope", "contexts": [], "examples": examples} | SHORTER[scale]
    rows = [Row(SETTING, name, arguments(options, shared["size"]), absent) for name, options in (ROWS | OWN).items()]
    return Plan("ablation", language.train_one, shared, rows, RATES[scale], SEEDS[scale], language.CRITERION, data)


def arguments(options: Mapping[str, Any], size: Mapping[str, int]) -> dict[str, Any]:
    """What makes a row of Hope's options, with the MLP width that gives it the parameters of Hope as shipped.

    >>> size = {"dim": 16, "layers": 1, "heads": 2, "intermediate": 24}
    >>> arguments({}, size)["size"]["intermediate"]
    21
    """
    given = {**PAPERS, **options}
    one, two = (_count({**size, "intermediate": width}, given) for width in (UNIT, 2 * UNIT))
    width = UNIT * max(1, round(1 + (_shipped(**size) - one) / (two - one)))  # the count is linear in it
    return {"options": given, "size": {**size, "intermediate": width}}


def _count(size: Mapping[str, int], options: Mapping[str, Any] | None = None) -> int:
    return parameter_count(configure("hope", 1, Size(**size), options))


@functools.cache
def _shipped(**size: int) -> int:
    return _count(size)


def section(found: Mapping[str, Mapping[str, Any]], folder: Path) -> str:
    """Table 6 and below it the departures, what differs in order, and all as bars."""
    models = {name: with_averages(outcome) for name, outcome in found.get(SETTING, {}).items()}
    header = ["row", "wikitext ppl", "change", "lambada ppl", "average ppl", "average accuracy"]
    parts = []
    for title, names in (("table 6", ROWS), ("departures from the print", OWN)):
        rows = []
        for name in names:
            paper = TABLE_6.get(name) if title == "table 6" else None
            outcome = models.get(name)
            cells = [
                measured(outcome, [PERPLEXITY]),
                change(models, name),
                measured(outcome, [accuracy.LAMBADA_PERPLEXITY]),
                measured(outcome, ["average ppl"], None if paper is None else paper[:1]),
                measured(outcome, ["average accuracy"], None if paper is None else paper[1:]),
            ]
            rows.append([name, *cells])
        parts.append(table([f"{title}: {header[0]}", *header[1:]], rows))
    papers = [{name: values[place] for name, values in TABLE_6.items()} for place in (0, 1)]
    sentences = [
        differences({key: models[key] for key in ("hope", name) if key in models}, number, paper, what, higher)
        for number, paper, what, higher in (
            (PERPLEXITY, papers[0], "perplexity of WikiText-2, beside the paper's average", False),
            ("average accuracy", papers[1], "average accuracy", True),
        )
        for name in ROWS
    ]
    figure = draw(models, folder / "ablation.png")
    return "\n".join(
        [
            "Each row is hope but for one thing; hope has the paper's momentum and inner q. The change is of the test "
            "perplexity of WikiText-2, in percent of hope's. The paper's perplexity is the average of WikiText and "
            "LAMBADA, its accuracy that of the tasks of table 2.\n",
            *parts,
            order_section(sentences),
            f"![Change of perplexity by row]({figure.name})\n",
        ]
    )


def with_averages(outcome: Mapping[str, Any]) -> dict[str, Any]:
    """An outcome with ``average ppl`` (WikiText and LAMBADA) and ``average accuracy`` of every run that has them.

    >>> runs = [{"wikitext ppl": 10.0, "lambada ppl": 30.0}]
    >>> with_averages({"runs": runs, "mean": {}, "spread": {}})["mean"]["average ppl"]
    20.0
    """
    mean, spread = dict(outcome["mean"]), dict(outcome["spread"])
    for name, keys in (
        ("average ppl", [PERPLEXITY, accuracy.LAMBADA_PERPLEXITY]),
        ("average accuracy", ACCURACY),
    ):
        values = [[run.get(key) for key in keys] for run in outcome.get("runs", [])]
        if values and all(value is not None for run in values for value in run):
            averages = [statistics.fmean(run) for run in values]
            mean[name] = statistics.fmean(averages)
            spread[name] = statistics.stdev(averages) if len(averages) > 1 else None
    return {**outcome, "mean": mean, "spread": spread}


def change(models: Mapping[str, Mapping[str, Any]], name: str) -> str:
    """The perplexity of a row against Hope's, in percent."""
    values = [models.get(row, {}).get("mean", {}).get(PERPLEXITY) for row in (name, "hope")]
    if name == "hope" or None in values:
        return ""
    return f"{100 * (values[0] / values[1] - 1):+.1f} %"


def draw(models: Mapping[str, Mapping[str, Any]], path: Path) -> Path:
    """A line a row, a point a seed: perplexity, the paper's rows in one colour and our departures in another."""
    figure = new_figure(9, 6.5)
    axes = figure.subplots()
    names = [*ROWS, *OWN][::-1]
    drawn = []
    for place, name in enumerate(names):
        runs = [run[PERPLEXITY] for run in models.get(name, {}).get("runs", []) if run.get(PERPLEXITY) is not None]
        drawn += runs
        colour = PALETTE[0] if name in ROWS else PALETTE[1]
        axes.plot(runs, [place] * len(runs), "o", color=colour, markersize=6)
        if not runs:
            axes.text(0.01, place, "diverged or not run", transform=axes.get_yaxis_transform(), fontsize=8, va="center")
    hope = models.get("hope", {}).get("mean", {}).get(PERPLEXITY)
    if hope is not None:
        axes.axvline(hope, color="#999999", linewidth=1)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.set_xlabel("test perplexity of WikiText-2, a point a seed (blue: table 6, orange: departures; line: hope)")
    axes.grid(alpha=0.3, axis="x")
    if drawn and max(drawn) > 3 * min(drawn):
        axes.set_xscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    return save_figure(figure, path)

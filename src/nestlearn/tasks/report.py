"""``report/``: what a run folder of a suite holds, as Markdown and HTML, each number beside the paper's."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from nestlearn.files import read_json, write_atomic
from nestlearn.tasks.layout import table
from nestlearn.tasks.suite import Suite

Found = Mapping[str, Mapping[str, Mapping[str, Any]]]  # of `nestlearn.tasks.plan.outcomes`

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0; font-size: .9rem; display: block; overflow-x: auto }}
th, td {{ border-bottom: 1px solid #ddd; padding: .3rem .7rem; text-align: right; vertical-align: top }}
th:first-child, td:first-child {{ text-align: left }}
td em {{ color: #777 }} img {{ max-width: 100% }} pre, code {{ background: #f4f4f4; overflow-x: auto }}
</style></head><body>
{body}</body></html>
"""


def write(suite: Suite, out: Path) -> dict[str, str]:
    """Write ``out/report`` from ``out/tasks``; the paths ``report`` and ``html``. Raises `UserError` for damage."""
    from markdown_it import MarkdownIt

    folder = out / "report"
    folder.mkdir(parents=True, exist_ok=True)
    scale = read_json(out / "suite.json", "give another folder")["scale"]
    title = f"{suite.title}, scale {scale}"
    parts = [f"# {title}\n", suite.head + "\n"]
    for name, module_name in suite.tasks.items():
        path = out / "tasks" / f"{name}.json"
        module = import_module(module_name)
        parts.append(f"## {module.TITLE}\n")
        if not path.exists():
            parts.append("Not run.\n")
            continue
        kept = read_json(path, f"delete it and run nestlearn eval --suite {suite.name} --only {name} again")
        found = {setting: {m: kept["found"][setting][m] for m in models} for setting, models in kept["order"]}
        parts += [f"    {kept['command']}\n", f"{kept['machine']}\n", recipe(kept["recipe"])]
        parts += [module.section(found, folder), *not_run(found), runs(found, kept["recipe"])]
    text = "\n".join(parts)
    # The page's own Markdown is trusted: it holds <br> and <details>.
    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    pages = {"report": ("report.md", text), "html": ("report.html", PAGE.format(title=title, body=body))}
    for file, content in pages.values():
        write_atomic(folder / file, lambda beside, content=content: beside.write_text(content, encoding="utf-8"))
    return {key: str(folder / file) for key, (file, _) in pages.items()}


def provenance(suite: Suite, name: str, scale: str, data: str | None) -> dict[str, str]:
    """``command`` and ``machine`` of a task's numbers."""
    import torch

    device = torch.cuda.get_device_name() if scale == "gpu" and torch.cuda.is_available() else platform.machine()
    given = ["--data", "DIR"] if data is not None else []
    words = ["nestlearn", "eval", "--suite", suite.name, "--only", name, "--scale", scale, *given]
    return {"command": shlex.join(words), "machine": f"{device}, torch {torch.__version__}"}


def recipe(plan: Mapping[str, Any]) -> str:
    """A paragraph from `Plan.recipe`."""
    shared = ", ".join(f"{key}={value}" for key, value in plan["shared"].items())
    rates, seeds = (", ".join(f"{value:g}" for value in plan[key]) for key in ("rates", "seeds"))
    return (
        f"Recipe: `{plan['function']}` with {shared or 'no arguments'}; learning rates {rates}, the best by "
        f"{', then '.join(plan['criterion'])}; seeds {seeds}. That is {plan['runs_per_row']} runs for every row.\n"
    )


def measured(
    outcome: Mapping[str, Any] | None,
    keys: Sequence[str],
    paper: Sequence[float] | None = None,
    form: str = ".4g",
    joint: str = " / ",
) -> str:
    """A cell of a table: the means and spreads of ``keys``, and the paper's values below; "-" for a model that was run
    without being asked for them.

    >>> outcome = {"state": "finished", "mean": {"loss": 0.5}, "spread": {"loss": 0.01}, "reason": None, "diverged": 0}
    >>> measured(outcome, ["loss"], [0.4])
    '0.5 ± 0.01<br>*0.4*'
    >>> measured(None, ["loss"])
    'not run'
    """
    below = "" if paper is None else f"<br>*{joint.join(f'{value:{form}}' for value in paper)}*"
    if outcome is None or outcome["state"] == "not run":
        return "not run" + below
    runs, failed, lacking = outcome.get("runs", []), outcome["diverged"], outcome["state"] == "partial"
    texts = [_with_spread(outcome["mean"][key], outcome["spread"][key], form) for key in keys if key in outcome["mean"]]
    if failed:
        text = f"{failed} of {len(runs)} seeds diverged"
    elif len(texts) == len(keys):
        text = joint.join(texts) + (f" ({outcome['reason']})" if lacking else "")
    else:  # "-": it was run, and this number is not among what was asked of it
        text = "-" if outcome["mean"] else outcome["reason"] or "not run"
    return text + below


def differences(
    found: Mapping[str, Mapping[str, Any]], key: str, paper: Mapping[str, float], what: str, higher: bool = True
) -> str | None:
    """One sentence on every way in which the order of the models is not the paper's; empty if there is none, None if no
    two of the paper's models have the number.

    Two models are equal here if they differ by no more than the larger spread of the two.

    Args:
        found: outcomes of one setting by model; the part of a name before a comma is the paper's.
        key: the number to compare.
        paper: the paper's numbers by model.
        what: the beginning of the sentence.
        higher: whether a higher number is better.

    >>> found = {n: {"mean": {"acc": v}, "spread": {"acc": 0.0}} for n, v in (("hope, chunk 1", 9.0), ("lstm", 10.0))}
    >>> differences(found, "acc", {"hope": 10.0, "lstm": 10.0}, "Parity")
    'Parity: lstm (10) is ahead of hope, chunk 1 (9), in the paper they are equal.'
    """
    here = {
        name: outcome["mean"][key] for name, outcome in found.items() if key in outcome["mean"] and base(name) in paper
    }
    if len({base(name) for name in here}) < 2:
        return None
    groups: dict[tuple[str, int, int], list[str]] = {}
    for name in here:
        for other in here:
            ours = _order(here[name], here[other], higher, max(found[n]["spread"][key] or 0 for n in (name, other)))
            papers = _order(paper[base(name)], paper[base(other)], higher)
            if base(name) != base(other) and ours != papers and (ours == 1 or (ours == 0 and papers == 1)):
                groups.setdefault((name, ours, papers), []).append(other)
    verbs = {1: "is ahead of", 0: "is equal to"}
    theirs = {1: "in the paper it is ahead", 0: "in the paper they are equal", -1: "in the paper it is behind"}
    clauses = [
        f"{name} ({here[name]:.4g}) {verbs[ours]} {', '.join(f'{o} ({here[o]:.4g})' for o in others)}, {theirs[papers]}"
        for (name, ours, papers), others in groups.items()
    ]
    return f"{what}: {'; '.join(clauses)}." if clauses else ""


def order_section(sentences: Sequence[str | None]) -> str:
    """The list of all `differences` of a task, or that there are none."""
    some = [sentence for sentence in sentences if sentence]
    if all(sentence is None for sentence in sentences):
        return "No two models that the paper has are there to compare.\n"
    if not some:
        return "Wherever both have a number, the order of the models is the paper's.\n"
    return "Where the order of the models differs from the paper's:\n\n" + "\n".join(f"- {s}" for s in some) + "\n"


def not_run(found: Found) -> Iterator[str]:
    """A sentence for every reason why rows have no number."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for setting, models in found.items():
        for model, outcome in models.items():
            if outcome["state"] == "not run":
                rows = reasons.setdefault(outcome["reason"] or "not started", {})
                rows.setdefault(model, []).append(setting)
    for reason, rows in reasons.items():
        names = [
            model if len(settings) == len(found) else f"{model} on {', '.join(settings)}"
            for model, settings in rows.items()
        ]
        yield f"Not run, {reason}: {'; '.join(names)}.\n"


def runs(found: Found, plan: Mapping[str, Any]) -> str:
    """What stands behind every number, folded away."""
    header = [
        "setting",
        "model",
        "arguments",
        "learning rates tried",
        "chosen",
        "seeds",
        "parameters",
        "minutes",
        "commit",
    ]
    rows = []
    for setting, models in found.items():
        for model, outcome in models.items():
            if outcome["grid"]:
                rows.append([setting, *_run(model, outcome)])
    text = table([*header[:3], f"rate: {plan['criterion'][0]}", *header[4:]], rows) if rows else "nothing yet\n"
    return f"<details><summary>runs behind the numbers</summary>\n\n{text}\n</details>\n"


def base(name: str) -> str:
    """The paper's name of a row.

    >>> base("hope, chunk 16")
    'hope'
    """
    return name.split(",")[0]


def _run(model: str, outcome: Mapping[str, Any]) -> list[str]:
    tried = ", ".join(f"{lr:g}: {'diverged' if value is None else f'{value:.4g}'}" for lr, value in outcome["grid"])
    arguments = ", ".join(f"{key}={value}" for key, value in outcome["arguments"].items())
    chosen = "-" if outcome["lr"] is None else f"{outcome['lr']:g}{', at the edge' if outcome['at_edge'] else ''}"
    size = outcome["mean"].get("parameters")
    commits = ", ".join(f"{name} ({count})" for name, count in sorted(outcome["commits"].items()))
    count = "-" if size is None else f"{size:,.0f}"
    return [
        model,
        arguments,
        tried,
        chosen,
        str(len(outcome["runs"])),
        count,
        f"{outcome['seconds'] / 60:.1f}",
        commits,
    ]


def _with_spread(mean: float, spread: float | None, form: str) -> str:
    return f"{mean:{form}}" if spread is None else f"{mean:{form}} ± {spread:.2g}"


def _order(a: float, b: float, higher: bool, tolerance: float = 0.0) -> int:
    """1 if ``a`` is better, -1 if worse, 0 if they differ by no more than ``tolerance``."""
    if abs(a - b) <= tolerance:
        return 0
    return 1 if (a > b) == higher else -1

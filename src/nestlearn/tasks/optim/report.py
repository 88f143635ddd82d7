"""``report.md``: what a run folder of the optimizer experiments holds, as tables beside the command that made them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nestlearn.files import read_json, write_atomic
from nestlearn.tasks.layout import table
from nestlearn.tasks.optim import DATASETS, EXPERIMENTS, MODEL_OPTIMIZERS, curvature, figures, orthogonal_tasks
from nestlearn.tasks.optim.figures import in_order

TITLES = {
    "curvature": "Quickly changing curvature (Figure 4, Eq. 53)",
    "orthogonal": "Orthogonal tasks in sequence (section 4.3, Eq. 45)",
    "vision": "Image classification (section 9.7)",
    "language": "Language modelling (section 9.7)",
    "step-time": "Time and memory of a step",
}
SEARCH = (
    "Every optimizer had the same search: learning rates half a decade apart at seed 0, the best by {criterion}, which "
    "then runs with all seeds ({seeds}). `±` is their standard deviation; `*` marks a rate at the edge of its grid."
)
SETTINGS = {
    "aligned": "linear model, subspaces are coordinates",
    "rotated": "linear model, subspaces turned at random",
    "overlap": "linear model, any two subspaces at cosine 0.3",
    "mlp": "one hidden layer, nonlinear teachers, orthogonal subspaces",
}


def write(folder: Path) -> Path:
    """Write ``report.md`` and its figures from the ``NAME.json`` in ``folder``; give the report's path.

    Raises `UserError` for a damaged file.
    """
    parts = ["# Optimizer experiments\n"]
    for name in EXPERIMENTS:
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        kept = read_json(path, f"delete it and run nestlearn bench optim --only {name} again")
        drawn = figures.DRAW[name](folder, kept["result"])
        parts.append(f"## {TITLES[name]}\n")
        parts.append(f"    {kept['command']}\n\n{kept['machine']}\n")
        parts += WRITE[name](kept["result"])
        parts += [f"![{figure.stem}]({figure.name})\n" for figure in drawn]
    text = "\n".join(parts)
    write_atomic(folder / "report.md", lambda beside: beside.write_text(text, encoding="utf-8"))
    return folder / "report.md"


def with_spread(summary: Mapping[str, Any], key: str, form: str = ".3g") -> str:
    """Mean and spread over the seeds of one number of a search's summary.

    >>> with_spread({"mean": {"loss": 0.5}, "spread": {"loss": 0.01}}, "loss")
    '0.5 ± 0.01'
    """
    mean, spread = summary["mean"].get(key), summary["spread"].get(key)
    if mean is None:
        return "-"
    return f"{mean:{form}}" if spread is None else f"{mean:{form}} ± {spread:.1g}"


def rate(summary: Mapping[str, Any]) -> str:
    """The learning rate that was found, with a star at the edge of its grid."""
    if summary["lr"] is None:
        return "diverged at every rate"
    failed = f", {summary['diverged']} seeds diverged" if summary["diverged"] else ""
    return f"{summary['lr']:g}{'*' if summary['at_edge'] else ''}{failed}"


def _curvature(result: Mapping[str, Any]) -> Iterator[str]:
    rates, budget = result["rates"], result["budget"]
    yield (
        f"Steps from {curvature.START} to the optimum (0, 0): distance and last update both below "
        f"{curvature.TOLERANCE:g}, at most {budget} steps. Every method tried {len(rates)} learning rates from "
        f"{min(rates):g} to {max(rates):g} times {len(result['momenta'])} momenta from {min(result['momenta'])} to "
        f"{max(result['momenta'])} on each landscape; in brackets how many of these arrive. The paper gives no "
        "constants; these landscapes are ours.\n"
    )
    rows = []
    for landscape, methods in in_order(result["landscapes"], curvature.LANDSCAPES):
        constants = curvature.LANDSCAPES[landscape]
        cells = [_steps(methods[method], budget) for method in curvature.METHODS]
        rows.append([f"k={constants.k:g}, a={constants.a:g}, omega={constants.omega:g}", *cells])
    yield table(["landscape", *curvature.METHODS.values()], rows)


def _steps(found: Mapping[str, Any], budget: int) -> str:
    share = f"({found['arrived']}/{found['tried']})"
    if found["steps"] is None:
        return f"> {budget} {share}"
    edge = "*" if found["at_edge"] else ""
    return f"{found['steps']}{edge} {share}, lr {found['lr']:g}, momentum {found['momentum']:g}"


def _orthogonal(result: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{result['tasks']} tasks of {result['steps']} batches, one optimizer state for all. Losses are relative: "
        "1 is knowing nothing, 0 is solved. Forgetting: loss at the end minus loss right after the task, mean over all "
        "tasks but the last. The learning rate is constant, so AdamW, Muon and M3, whose steps do not shrink with the "
        "gradient, end at a loss that it sets. Deep momentum has no momentum of the weight's shape: its cosine is not "
        "drawn.\n"
    )
    yield SEARCH.format(criterion="the mean loss of all tasks at the end", seeds=result["seeds"]) + "\n"
    for setting, optimizers in in_order(result["settings"], SETTINGS):
        yield f"### {setting}: {SETTINGS[setting]}\n"
        rows = []
        for name, found in in_order(optimizers, orthogonal_tasks.OPTIMIZERS):
            keys = ("validation_loss", "first_task", "forgetting", "last_task")
            rows.append([name, rate(found), *(with_spread(found, key, ".2g") for key in keys)])
        yield table(["optimizer", "lr", "all tasks", "first task", "forgetting", "last task"], rows)


def _models(result: Mapping[str, Any]) -> Iterator[str]:
    if result["settings"]:
        yield SEARCH.format(criterion="validation loss", seeds=result["seeds"]) + " Losses in nats.\n"
    columns = {"train_loss": "train loss", "validation_loss": "validation loss", "test_loss": "test loss"}
    columns |= {
        "accuracy": "test accuracy",
        "seconds_per_step": "s/step",
        "optimizer_seconds_per_step": "optimizer s/step",
    }
    for setting, optimizers in in_order(result["settings"], DATASETS):
        every = [found["mean"] for found in optimizers.values() if found["mean"]]
        shown = {key: title for key, title in columns.items() if any(key in mean for mean in every)}
        first = every[0] if every else {}
        size = f": {first['parameters']:,.0f} parameters, {first['steps']:,.0f} steps" if "steps" in first else ""
        yield f"### {setting}{size}\n"
        form = {key: ".2g" if "seconds" in key else ".4f" for key in shown}
        rows = [
            [n, rate(f), *(with_spread(f, key, form[key]) for key in shown)]
            for n, f in in_order(optimizers, MODEL_OPTIMIZERS["vision"])
        ]
        yield table(["optimizer", "lr", *shown.values()], rows)
    for name, reason in result["not_run"].items():
        yield f"{name} was not run: {reason}\n"


def _step_time(result: Mapping[str, Any]) -> Iterator[str]:
    yield (
        "Seconds of one step with random gradients, without a model's forward and backward pass. The candidates took "
        "turns in one process; median of the rounds (for M3 the mean over a whole chunk, its slow step included), in "
        "brackets the fastest and slowest round. The candidate timed once more shows the noise.\n"
    )
    titles = {"hidden": "hidden matrices", "all": "all parameters"}
    for part, measured in in_order(result, titles):
        count = f"{measured['parameters'] / 1e6:.4g} M parameters, {measured['threads']} threads"
        yield f"### {titles[part]}: {count}, {measured['rounds']} rounds\n"
        rows = []
        for found in measured["candidates"]:
            seconds = f"{found['seconds']:.3g} ({found['low']:.3g} to {found['high']:.3g})"
            ratio = "-" if found["ratio"] is None else f"{found['ratio']:.2f} of {found['peer']}"
            rows.append([found["name"], seconds, ratio, f"{found['bytes_per_parameter']:.1f}"])
        yield table(["optimizer", "s/step", "ratio to its peer", "state, bytes/parameter"], rows)


WRITE = {
    "curvature": _curvature,
    "orthogonal": _orthogonal,
    "vision": _models,
    "language": _models,
    "step-time": _step_time,
}

"""The report and its figures, from smoke runs and from results made by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from nestlearn.errors import UserError
from nestlearn.tasks.optim import run
from nestlearn.tasks.optim.report import rate, table, with_spread, write


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


def keep(folder: Path, name: str, result: dict[str, Any]) -> None:
    kept = {"command": f"nestlearn bench optim --only {name}", "machine": "a machine", "result": result}
    (folder / f"{name}.json").write_text(json.dumps(kept, sort_keys=True))


def summary(lr: float | None, loss: float, at_edge: bool = False) -> dict[str, Any]:
    runs = [
        {
            "diverged": False,
            "train_loss": loss - 0.1,
            "validation_loss": loss,
            "test_loss": loss + 0.1 * seed,
            "accuracy": 0.5,
            "seconds_per_step": 0.25,
            "steps": 4,
            "parameters": 1234,
            "curve": [[step, loss + 1 / step] for step in (1, 2, 3, 4)],
        }
        for seed in range(2)
    ]
    keys = [key for key, value in runs[0].items() if isinstance(value, float | int) and key != "diverged"]
    mean = {key: (runs[0][key] + runs[1][key]) / 2 for key in keys}
    if lr is None:
        return {"lr": None, "at_edge": True, "runs": [], "diverged": 0, "mean": {}, "spread": {}, "grid": [[1.0, None]]}
    spread = dict.fromkeys(keys, 0.07)
    return dict(lr=lr, at_edge=at_edge, runs=runs, diverged=0, mean=mean, spread=spread, grid=[[lr, loss]])


def test_smoke_runs_are_reported_and_kept(tmp_path: Path) -> None:
    result = run(["step-time", "curvature", "orthogonal", "vision"], "smoke", None, tmp_path, workers=1)
    assert list(result["experiments"]) == ["curvature", "orthogonal", "vision", "step-time"]
    assert "path" not in json.dumps(result)
    text = (tmp_path / "report.md").read_text()
    for words in (
        "nestlearn bench optim --only curvature --scale smoke",
        "| k=1, a=1, omega=4 | 281* (1/2), lr 0.032, momentum 0.9 |",
        "### rotated: linear model",
        "mnist was not run: no data: give --data DIR with mnist/ and cifar10/",
        "cifar10 was not run: no data",
        "### hidden matrices",
        "of torch Muon + AdamW",
    ):
        assert words in text
    orthogonal = text[text.index("### rotated") : text.index("## Image")]
    order = [orthogonal.index(f"| {name} |") for name in ("sgd-momentum", "adamw", "delta-momentum", "muon", "m3")]
    assert order == sorted(order)
    for name in ("curvature", "orthogonal", "orthogonal-memory", "step-time"):
        assert f"![{name}]({name}.png)" in text
        assert is_png(tmp_path / f"{name}.png")

    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    assert len(times) == 4 + 14 + 2
    again = run(["curvature"], "smoke", None, tmp_path, workers=1)
    assert again["experiments"]["curvature"] == result["experiments"]["curvature"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()} == times
    assert (tmp_path / "report.md").read_text() == text  # of all that the folder holds
    with pytest.raises(UserError, match=r"was made with rates=.*: give another folder"):
        run(["curvature"], "cpu", None, tmp_path, workers=1)


def test_models_are_reported_with_mean_spread_edge_and_what_is_missing(tmp_path: Path) -> None:
    optimizers = {"m3": summary(0.01, 2.0), "adamw": summary(0.001, 3.0, at_edge=True), "m3-paper": summary(None, 0.0)}
    not_run = {"cifar10": "no data", "adamuon": "adamuon needs a package"}
    keep(tmp_path, "vision", {"settings": {"mnist": optimizers}, "not_run": not_run, "seeds": 2})
    text = write(tmp_path).read_text()
    assert "### mnist: 1,234 parameters, 4 steps" in text
    rows = [line for line in text.split("\n") if line.startswith("| ")]
    assert rows[1] == "| adamw | 0.001* | 2.9000 ± 0.07 | 3.0000 ± 0.07 | 3.0500 ± 0.07 | 0.5000 ± 0.07 | 0.25 ± 0.07 |"
    assert rows[2].startswith("| m3 | 0.01 | 1.9000 ± 0.07 |")
    assert rows[3] == "| m3-paper | diverged at every rate | - | - | - | - | - |"
    assert "adamuon was not run: adamuon needs a package" in text
    assert is_png(tmp_path / "models-mnist.png")


def test_a_method_that_never_arrives_and_an_optimizer_that_always_diverges(tmp_path: Path) -> None:
    lost = {"steps": None, "arrived": 0, "tried": 4, "diverged": True}
    there = {"steps": 7, "lr": 0.1, "momentum": 0.9, "arrived": 1, "tried": 4, "at_edge": False, "path": [[-3.5, 2.0]]}
    methods = {"momentum": lost, "clipped": there, "delta": there, "delta-inf": lost}
    result = {"landscapes": {"k1-a1-w4": methods}, "rates": [0.1, 0.2], "momenta": [0.5, 0.9], "budget": 50}
    keep(tmp_path, "curvature", result)
    dead = summary(None, 0.0)
    keep(tmp_path, "orthogonal", {"settings": {"mlp": {"adamw": dead}}, "tasks": 2, "steps": 5, "seeds": 1})
    text = write(tmp_path).read_text()
    assert "| k=1, a=1, omega=4 | > 50 (0/4) | 7 (1/4), lr 0.1, momentum 0.9 |" in text
    assert "| adamw | diverged at every rate | - | - | - | - |" in text


def test_a_damaged_result_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "curvature.json").write_text("{")
    with pytest.raises(UserError, match="delete it and run nestlearn bench optim --only curvature again"):
        write(tmp_path)


def test_numbers() -> None:
    assert with_spread({"mean": {}, "spread": {}}, "loss") == "-"
    assert with_spread({"mean": {"loss": 0.5}, "spread": {"loss": None}}, "loss") == "0.5"
    assert rate({"lr": 0.1, "at_edge": True, "diverged": 1}) == "0.1*, 1 seeds diverged"
    assert table(["a", "b"], [["x", "1"], ["y", "2"]]).count("\n") == 4

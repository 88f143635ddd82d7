"""The core suite around its tasks: an equal search, resuming, and a report of what is there and what is not."""

import dataclasses
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nestlearn.errors import UserError
from nestlearn.tasks import core
from nestlearn.tasks.layout import table
from nestlearn.tasks.plan import Plan, Row, best, outcomes, summarise
from nestlearn.tasks.report import differences, measured, order_section

# This module is itself a task, see `nestlearn.tasks.core`.
TITLE = "A toy"
RAN: list[tuple[str, float, int]] = []
FAIL_AT = types.SimpleNamespace(count=10**9)


def score(model: str, lr: float, seed: int, steps: int, data: str | None = None) -> dict[str, Any]:
    if len(RAN) == FAIL_AT.count:
        raise KeyboardInterrupt
    RAN.append((model, lr, seed))
    if model == "wild" or (model == "shaky" and seed == 1):
        return {"diverged": True}
    good = {"good": 0.1, "shaky": 0.1, "plain": 0.3}[model]
    return {"error": abs(lr - good), "loss": lr, "accuracy": 90 - 100 * abs(lr - good) + seed, "parameters": 7}


def plan(scale: str, data: str | None) -> Plan:
    rows = [Row("toy", model, {"model": model}) for model in ("plain", "good", "shaky", "wild")]
    rows.append(Row("toy", "absent", {"model": "absent"}, "no such block"))
    return Plan("toy", score, {"steps": 3}, rows, (0.1, 0.2, 0.3), (0, 1, 2), ("error", "loss"), data)


def section(found: Mapping[str, Mapping[str, Any]], folder: Path) -> str:
    paper = {"good": 80.0, "plain": 85.0}
    rows = [[n, measured(o, ["accuracy"], [paper[n]] if n in paper else None)] for n, o in found["toy"].items()]
    return table(["model", "toy"], rows) + "\n" + order_section([differences(found["toy"], "accuracy", paper, "toy")])


@pytest.fixture(autouse=True)
def _only_the_toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nestlearn.tasks.core.TASKS", {"toy": __name__, "later": __name__})
    RAN.clear()
    FAIL_AT.count = 10**9


def test_a_search_that_is_equal_then_the_seeds_and_a_report(tmp_path: Path) -> None:
    result = core.run(["toy"], "cpu", "/somewhere", tmp_path, 1)
    assert len(RAN) == len(set(RAN)) == 4 * 3 + 3 * 2  # absent is never run, wild has no seeds after its search
    found = result["tasks"]["toy"]["toy"]
    assert (found["good"]["lr"], found["good"]["at_edge"]) == (0.1, True)
    assert found["good"]["mean"]["accuracy"] == 91
    assert found["good"]["spread"]["accuracy"] == 1
    assert "runs" not in found["good"]
    text = Path(result["report"]).read_text()
    for words in (
        "## A toy\n\n    nestlearn eval --suite core --only toy --scale cpu --data DIR\n",
        f"Recipe: `{__name__}.score` with steps=3; learning rates 0.1, 0.2, 0.3, ",
        "the best by error, then loss; seeds 0, 1, 2.",
        "That is 5 runs for every row.",
        "| plain | 91 ± 1<br>*85* |\n| good | 91 ± 1<br>*80* |\n| shaky | 1 of 3 seeds diverged |\n",
        "| wild | diverged at every learning rate |\n| absent | not run |",
        "- toy: plain (91) is equal to good (91), in the paper it is ahead.",
        "Not run, no such block: absent.",
        "| toy | good | model=good | 0.1: 0, 0.2: 0.1, 0.3: 0.2 | 0.1, at the edge | 3 | 7 |",
        "0.1: diverged",
    ):
        assert words in text
    assert text.endswith("## A toy\n\nNot run.\n")  # the task "later"
    assert "somewhere" not in text
    page = Path(result["html"]).read_text()
    assert "<td>91 ± 1<br><em>85</em></td>" in page.replace(' style="text-align:right"', "")
    assert page.count("<h2>") == 2


def test_killed_at_any_moment_it_goes_on_and_says_what_is_not_run(tmp_path: Path) -> None:
    FAIL_AT.count = 5
    with pytest.raises(KeyboardInterrupt, match="5 of 12 cells of toy, learning rates are finished"):
        core.run([], "cpu", None, tmp_path, 1)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| plain | 90<br>*85* |" not in text
    assert "not run" in text
    assert "Not run, 2 of 3 learning rates tried: good." in text
    assert "Not run, not started: shaky; wild." in text
    FAIL_AT.count = 14
    with pytest.raises(KeyboardInterrupt, match="14 of 18 cells of toy, seeds are finished"):
        core.run(["toy"], "cpu", None, tmp_path, 1)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| plain | 91 ± 1<br>*85* |" in text
    assert "| good | 90 (1 of 3 seeds)<br>*80* |" in text
    FAIL_AT.count = 10**9
    core.run(["toy"], "cpu", None, tmp_path, 1)
    assert len(RAN) == len(set(RAN)) == 18
    core.run(["toy"], "cpu", None, tmp_path, 1)
    assert len(RAN) == 18


def test_mistakes_are_one_line_and_leave_nothing(tmp_path: Path) -> None:
    for arguments, message in (
        ((["tyo"], "cpu", None, tmp_path / "out", 1), "unknown task 'tyo'; did you mean 'toy'"),
        (([], "tpu", None, tmp_path / "out", 1), "unknown scale 'tpu'"),
        (([], "cpu", None, tmp_path / "out", 0), "--workers is the number of processes"),
    ):
        with pytest.raises(UserError, match=message):
            core.run(*arguments)
    assert not (tmp_path / "out").exists()
    core.run(["toy"], "smoke", None, tmp_path / "out", 1)
    with pytest.raises(UserError, match="holds results of scale 'smoke', now 'cpu': give another folder"):
        core.run(["toy"], "cpu", None, tmp_path / "out", 1)


def test_data_may_lie_elsewhere_the_next_time(tmp_path: Path) -> None:
    core.run(["toy"], "smoke", "here", tmp_path, 1)
    before = len(RAN)
    core.run(["toy"], "smoke", "there", tmp_path, 1)
    assert len(RAN) == before
    assert not any("here" in path.read_text() for path in (tmp_path / "cells").iterdir())


def test_what_was_run_counts_where_its_data_is_gone(tmp_path: Path) -> None:
    core.run(["toy"], "smoke", "here", tmp_path, 1)
    gone = dataclasses.replace(plan("smoke", None), rows=[Row("toy", "good", {"model": "good"}, "no data was given")])
    outcome = outcomes(gone, tmp_path)["toy"]["good"]
    assert (outcome["state"], outcome["mean"]["accuracy"]) == ("finished", 91)
    assert not gone.search()


def test_outcomes_of_an_empty_folder(tmp_path: Path) -> None:
    found = outcomes(plan("cpu", None), tmp_path)["toy"]
    assert {outcome["state"] for outcome in found.values()} == {"not run"}
    assert found["absent"]["reason"] == "no such block"


def test_the_best_rate_is_of_validation_and_ties_go_to_the_next_number() -> None:
    found = {0.1: {"error": 1, "loss": 0.0}, 0.2: {"error": 0, "loss": 2.0}, 0.3: {"error": 0, "loss": 1.0}}
    assert best(found, ["error", "loss"]) == 0.3
    assert best({0.1: {"diverged": True}, 0.2: {"error": None, "loss": 1.0}}, ["error", "loss"]) is None


def test_a_number_that_one_seed_lacks_has_no_mean() -> None:
    summary = summarise([{"a": 1, "b": 2.0, "curve": [1], "ok": True}, {"a": 3, "b": None, "diverged": True}], "b")
    assert summary["mean"] == {"a": 2.0}
    assert summary["diverged"] == 1


def test_order_counts_only_beyond_the_spread_and_against_other_models() -> None:
    def row(mean: float, spread: float | None = 0.0) -> dict[str, Any]:
        return {"mean": {"x": mean}, "spread": {"x": spread}}

    paper = {"hope": 3.0, "titans": 2.0, "deltanet": 1.0}
    right = {"hope, chunk 1": row(9), "hope, chunk 4": row(8), "titans": row(7), "deltanet": row(6)}
    assert differences(right, "x", paper, "T") == ""
    within = {"hope": row(5, 2.0), "titans": row(6, None)}
    assert differences(within, "x", paper, "T") == "T: hope (5) is equal to titans (6), in the paper it is ahead."
    beyond = {"hope": row(5), "titans": row(6), "unknown": row(100)}
    assert differences(beyond, "x", paper, "T") == "T: titans (6) is ahead of hope (5), in the paper it is behind."
    assert differences({"hope": row(6), "titans": row(5)}, "x", paper, "T", higher=False) == ""
    assert differences({"hope": {"mean": {}, "spread": {}}, "titans": row(1)}, "x", paper, "T") is None
    assert order_section([None, None]) == "No two models that the paper has are there to compare.\n"
    assert order_section(["", ""]) == "Wherever both have a number, the order of the models is the paper's.\n"


def test_files_say_what_made_them(tmp_path: Path) -> None:
    core.run(["toy"], "cpu", None, tmp_path, 1)
    kept = json.loads((tmp_path / "cells" / "toy-toy-good-lr0.1-seed2.json").read_text())
    assert kept["arguments"] == {"model": "good", "lr": 0.1, "seed": 2, "steps": 3}
    assert "commit" in kept

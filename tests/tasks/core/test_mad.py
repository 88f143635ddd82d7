"""MAD as a task: the metric, a run, the average over settings, and the section of the report with missing numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nestlearn.errors import UserError
from nestlearn.tasks.core import SCALES
from nestlearn.tasks.core.mad import (
    EPOCHS,
    RECIPES,
    ROWS,
    Decoder,
    average,
    evaluate,
    make_network,
    plan,
    problems,
    section,
    train_one,
)
from nestlearn.tasks.core.mad_data import Examples, Problem, draw
from nestlearn.tasks.core.models import Size
from nestlearn.tasks.core.paper import TABLE_4, TABLE_4_TASKS

TINY: dict[str, Any] = dict(size={"dim": 16, "layers": 1, "heads": 2, "intermediate": 24}, batch=16, held_out=32)


class Says(nn.Module):
    """Gives the logit 3 to the same symbols for every sequence."""

    def __init__(self, symbols: list[int]) -> None:
        super().__init__()
        self.symbols = torch.tensor(symbols)

    def forward(self, tokens: Tensor) -> Tensor:
        return 3.0 * nn.functional.one_hot(self.symbols, 4).float().expand(len(tokens), -1, -1)


def test_the_metric_is_the_share_of_asked_symbols() -> None:
    targets = np.array([[-100, 1, 2], [0, -100, 3], [-100, -100, -100]])
    found = evaluate(Says([0, 1, 3]), Examples(np.zeros_like(targets), targets))
    assert found["accuracy"] == 75  # 1, 0 and 3 are right, 2 is not; the third sequence asks nothing
    right = np.log(np.exp(3) + 3) - 3
    assert found["loss"] == pytest.approx((3 * right + right + 3) / 4)
    with pytest.raises(UserError, match="nothing is asked"):
        evaluate(Says([0, 1, 3]), Examples(targets[2:], targets[2:]))


def test_many_batches_count_like_one(monkeypatch: pytest.MonkeyPatch) -> None:
    examples = draw("in-context recall", Problem(vocabulary=4, length=12), 10, np.random.default_rng(0), False)
    network = Says([0, 1, 2, 3] * 2 + [0, 1, 2])
    one = evaluate(network, examples)
    monkeypatch.setattr("nestlearn.tasks.core.mad.EVALUATED", 3)
    assert evaluate(network, examples) == pytest.approx(one)


def test_a_compressor_sees_the_last_state_and_the_place_only() -> None:
    torch.manual_seed(0)
    network = make_network("compression", "hope", 8, Size(dim=16, layers=1, heads=2, intermediate=24))
    assert isinstance(network, Decoder)
    states = torch.randn(2, 5, 16)
    network.encoder = nn.Identity()
    changed = states.clone()
    changed[:, :-1] += 1
    torch.testing.assert_close(network(states), network(changed))
    logits = network(states)
    assert logits.shape == (2, 5, 8)
    assert not torch.allclose(logits[:, 0], logits[:, 1])
    grown = network(torch.cat([torch.zeros(2, 3, 16), states], 1))
    torch.testing.assert_close(grown[:, :5], logits)  # a place is counted from the beginning


@pytest.mark.parametrize("task", TABLE_4_TASKS)
def test_a_run_is_repeatable_and_has_every_number(task: str) -> None:
    problem = dict(vocabulary=16, length=24, examples=40, copied=4, motif=2)
    runs = [train_one(task, "hope", 1e-2, seed, **TINY, problem=problem, epochs=2) for seed in (0, 0, 1)]
    for run in runs:
        assert run.pop("seconds") > 0
    assert runs[0] == runs[1] != runs[2]
    assert runs[0]["steps"] == 6  # 40 sequences are three batches of at most 16
    assert runs[0]["curve"][-1][0] == 6
    assert 0 <= runs[0]["accuracy"] <= 100
    assert runs[0]["validation_error"] == 100 - runs[0]["curve"][-1][2]
    assert runs[0]["validation_loss"] == runs[0]["curve"][-1][1]


def test_facts_are_memorised_and_the_training_set_is_finite() -> None:
    lines: list[str] = []
    problem = dict(vocabulary=16, length=16, examples=64)
    result = train_one("memorisation", "linear", 1e-2, 0, **TINY, problem=problem, epochs=30, log=lines.append)
    assert result["accuracy"] == 100
    assert len(lines) == 10
    assert lines[-1].endswith("100.0%")


def test_options_reach_the_model_and_mistakes_are_one_line() -> None:
    some: dict[str, Any] = dict(**TINY, problem={"length": 24, "examples": 16}, epochs=1)
    first, other = (
        train_one("in-context recall", "hope", 1e-2, 0, **some, options={"chunk_size": n})["validation_loss"]
        for n in (1, 16)
    )
    assert first != other
    with pytest.raises(UserError, match="unknown task 'recal'"):
        train_one("recal", "hope", 1e-2, 0)
    with pytest.raises(UserError, match="unknown model"):
        train_one("compression", "gpt", 1e-2, 0, **some)


def test_what_is_not_finite_has_no_scores() -> None:
    result = train_one("compression", "linear", 1e38, 0, **TINY, problem={"length": 24, "examples": 64}, epochs=5)
    assert result["diverged"] is True
    assert "accuracy" not in result


@pytest.mark.parametrize("scale", SCALES)
def test_every_model_gets_every_setting_and_the_same_search(scale: str) -> None:
    made = plan(scale, None)
    names = [f"{task}, {name}" for task in TABLE_4_TASKS for name in problems(scale, task)]
    assert [row.setting for row in made.rows[:: len(ROWS)]] == names
    assert len(made.rows) == len(names) * len(ROWS)
    assert {"transformer", "transformer+conv", "deltanet", "gated-deltanet", "hope-attention"} < set(ROWS)
    assert len({cell.name for cell in made.search().values()}) == len(made.search())
    assert made.shared == RECIPES[scale]
    by_setting = [
        {str({**row.arguments, "model": 0, "options": 0}) for row in made.rows if row.setting == n} for n in names
    ]
    assert all(len(arguments) == 1 for arguments in by_setting)  # nothing but the model differs
    for row in made.rows:
        draw(row.arguments["task"], Problem(**row.arguments["problem"]), 1, np.random.default_rng(0), True)


def test_the_gpu_scale_is_the_benchmark_s() -> None:
    assert {task: len(problems("gpu", task)) for task in TABLE_4_TASKS} == {
        "compression": 11,
        "in-context recall": 11,
        "fuzzy recall": 11,
        "selective copying": 13,
        "memorisation": 6,
    }
    assert problems("gpu", "selective copying")["copied 96"] == Problem(16, 256, 12_800, 96)
    assert problems("gpu", "in-context recall")["length 1024"] == Problem(16, 1024, 12_800)
    assert problems("gpu", "memorisation")["vocabulary 8192"] == Problem(8192, 32, 256)
    assert (EPOCHS["gpu"], RECIPES["gpu"]["batch"], RECIPES["gpu"]["held_out"]) == ((200, 200), 128, 1280)


def outcome(*scores: float, state: str = "finished", reason: str | None = None) -> dict[str, Any]:
    runs = [{"accuracy": score} for score in scores]
    mean = {"accuracy": float(np.mean(scores))} if scores else {}
    spread = {"accuracy": float(np.std(scores, ddof=1)) if len(scores) > 1 else None} if scores else {}
    return dict(state=state, reason=reason, diverged=0, runs=runs, mean=mean, spread=spread)


def test_a_score_is_the_mean_over_settings_of_each_seed() -> None:
    both = average([outcome(50, 60), outcome(90, 90)])
    assert both["mean"] == {"accuracy": 72.5}
    assert both["spread"]["accuracy"] == pytest.approx(np.std([70, 75], ddof=1))
    assert both["state"] == "finished"
    partial = average([outcome(50, 60), outcome(90, state="partial", reason="1 of 2 seeds")])
    assert (partial["state"], partial["mean"]) == ("partial", {"accuracy": 70.0})
    for missing in (None, outcome(state="not run")):
        lacking = average([outcome(50), missing])
        assert (lacking["state"], lacking["mean"], lacking["reason"]) == ("not run", {}, "1 of 2 settings")
    assert average([outcome(50), outcome(reason="diverged at every learning rate")])["reason"].startswith("diverged")
    assert average([])["state"] == "not run"
    ill = outcome(50, 60)
    ill["runs"][1] = {"diverged": True}
    assert average([ill, outcome(70, 80)])["diverged"] == 1


def test_the_section_puts_the_paper_beside_and_says_what_is_missing(tmp_path: Path) -> None:
    found = {
        "compression, baseline": {"hope, chunk 16": outcome(40, 50), "transformer": outcome(60, 60)},
        "compression, vocabulary 64": {"hope, chunk 16": outcome(20, 30), "transformer": outcome(state="not run")},
        "memorisation, baseline": {"hope, chunk 16": outcome(80, 80), "titans, chunk 16": outcome(90, 90)},
    }
    text = section(found, tmp_path)
    rows = {line.split("|")[1].strip(): line for line in text.split("\n") if line.startswith("| ")}
    hope, paper = rows["hope, chunk 16"], TABLE_4["hope"]
    assert hope.startswith(
        f"| hope, chunk 16 | 35 ± 7.1<br>*{paper[0]}* | not run<br>*100* | not run<br>*{paper[2]}* |"
    )
    assert hope.endswith(f"| 80 ± 0<br>*{paper[4]}* |")
    assert rows["transformer"].startswith("| transformer | not run<br>*49.4* |")
    assert rows["deltanet"].count("not run") == 5
    assert rows["compression, baseline"].startswith("| compression, baseline | 60 ± 0 | not run |")
    sentences = [line for line in text.split("\n") if line.startswith("- ")]
    assert sentences == [
        "- memorisation: titans, chunk 16 (90) is ahead of hope, chunk 16 (80), in the paper it is behind."
    ]
    assert (tmp_path / "mad.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert section({}, tmp_path).count("not run") == len(ROWS) * len(TABLE_4_TASKS)

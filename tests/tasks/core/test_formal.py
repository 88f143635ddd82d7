"""Formal languages as a task: the metric, training to a known end, and the section of the report."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from nestlearn.errors import UserError
from nestlearn.tasks.core import SCALES
from nestlearn.tasks.core.formal import (
    AVERAGED,
    NOISE,
    RECIPES,
    _average,
    _losses,
    add_noise,
    evaluate,
    plan,
    section,
    train_one,
    wholly_right,
)
from nestlearn.tasks.core.languages import LANGUAGES, collate, fixed_words
from nestlearn.tasks.core.paper import TABLE_5, TABLE_5_LANGUAGES

TINY: dict[str, Any] = dict(size={"dim": 16, "layers": 1, "heads": 2, "intermediate": 24}, batch=8, longest=6, every=5)


class Oracle(nn.Module):
    """Counts the symbols of a^n b^n; wrong after so many."""

    def __init__(self, until: int) -> None:
        super().__init__()
        self.until = until

    def forward(self, tokens: Tensor) -> Tensor:
        a, b = (tokens == 0).cumsum(1), (tokens == 1).cumsum(1)
        right = torch.stack([b == 0, (b < a) | (b == 0), (a == b)], -1).float() * 20 - 10
        place = torch.arange(tokens.shape[1])[None, :, None]
        return torch.where(place < self.until, right, -right)


def test_a_word_counts_only_if_it_is_right_at_every_position() -> None:
    language = LANGUAGES["a^n b^n"]
    words = fixed_words(language, 50, 0, 500, 0)
    perfect = evaluate(Oracle(1000), language, words)
    assert perfect["words"] == perfect["positions"] == 100
    assert perfect["loss"] == pytest.approx(np.log1p(np.exp(-10)), rel=1e-2)  # float32
    half = evaluate(Oracle(50), language, words)
    assert half["words"] == 50  # n to 25
    lengths = np.arange(2, 101, 2)
    assert half["positions"] == pytest.approx(100 * np.minimum(lengths, 50).sum() / lengths.sum())


def test_filler_does_not_count() -> None:
    correct = np.array([[True, True, False], [True, False, True]])
    real = np.array([[True, True, False], [True, True, True]])
    assert wholly_right(correct, real).tolist() == [True, False]


def test_embeddings_are_noisy_in_training_alone() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(3, 64))
    tokens = torch.zeros(1000, 1, dtype=torch.long)
    clean = network(tokens)
    add_noise(network)
    size = clean.square().mean().sqrt()
    assert (network(tokens) - clean).std().item() == pytest.approx(NOISE * size.item(), rel=0.02)
    assert torch.equal(network.eval()(tokens), clean)


def test_training_asks_for_a_finite_logit_and_testing_for_the_target() -> None:
    language, share = LANGUAGES["Parity"], 0.01
    batch = collate(language, fixed_words(language, 9, 0, 20, 0))
    logit = nn.Parameter(torch.tensor(0.0))
    sign = 2.0 * torch.from_numpy(batch.targets).float() - 1

    def slope(value: float, smoothed: float) -> float:
        logit.data.fill_(value)
        (gradient,) = torch.autograd.grad(_losses(lambda tokens: sign * logit, batch, "cpu", smoothed)[0].mean(), logit)
        return gradient.item()

    assert slope(np.log((1 - share) / share), share) == pytest.approx(0, abs=1e-7)
    assert slope(8.0, share) > 0 > slope(8.0, 0.0)


def test_the_mean_of_the_weights_is_that_of_all_and_later_forgets() -> None:
    network = nn.Linear(1, 1, bias=False)
    averaged = AveragedModel(network, multi_avg_fn=_average)
    expected = 0.0
    for step in range(1, 600):
        with torch.no_grad():
            network.weight.fill_(step)
        averaged.update_parameters(network)
        share = max(1 / step, 1 - AVERAGED)
        expected += share * (step - expected)
        if step == 100:
            assert averaged.module.weight.item() == pytest.approx(50.5)  # 1 to 100
    assert averaged.module.weight.item() == pytest.approx(expected, rel=1e-4)
    assert expected > 301  # of all 599 it would be 300


def test_an_lstm_learns_a_language() -> None:
    lines: list[str] = []
    result = train_one("(aa)*", "lstm", 1e-2, 0, **TINY, steps=600, log=lines.append)
    assert result["bin0"] == 100
    assert result["validation_error"] == 0
    assert result["curve"][-1][0] == 600
    assert "words 100.0%" in lines[-1]


def test_a_run_is_repeatable_and_follows_its_seed() -> None:
    runs = [train_one("Shuffle-2", "hope", 1e-2, seed, **TINY, steps=10) for seed in (0, 0, 1)]
    for run in runs:
        run.pop("seconds")
    assert runs[0] == runs[1] != runs[2]


def test_options_reach_the_model_and_mistakes_are_one_line() -> None:
    first, other = (
        train_one("Parity", "hope", 1e-2, 0, **TINY, steps=5, options={"chunk_size": size}) for size in (1, 16)
    )
    assert first["validation_loss"] != other["validation_loss"]
    with pytest.raises(UserError, match="unknown language 'parity'; did you mean 'Parity'"):
        train_one("parity", "hope", 1e-2, 0)
    with pytest.raises(UserError, match="unknown model"):
        train_one("Parity", "gpt", 1e-2, 0)


def test_what_is_not_finite_has_no_scores() -> None:
    result = train_one("Parity", "lstm", 1e38, 0, **TINY, steps=20)
    assert result["diverged"] is True
    assert "bin0" not in result


@pytest.mark.parametrize("scale", SCALES)
def test_every_model_gets_every_language_and_the_same_search(scale: str) -> None:
    made = plan(scale, None)
    assert {row.setting for row in made.rows} == set(TABLE_5_LANGUAGES) == set(LANGUAGES)
    models = {row.model for row in made.rows}
    assert len(made.rows) == len(models) * len(TABLE_5_LANGUAGES)
    assert models >= {
        "lstm",
        "transformer",
        "transformer+conv",
        "srwm",
        "hope, chunk 1",
        "hope, chunk 4",
        "hope, chunk 16",
    }
    assert set(TABLE_5) <= {model.split(",")[0] for model in models}
    assert len({cell.name for cell in made.search().values()}) == len(made.search())
    assert made.shared == RECIPES[scale]


def outcome(bin0: float, bin1: float) -> dict[str, Any]:
    runs = [{"bin0": bin0, "bin1": bin1}]
    return dict(state="finished", reason=None, diverged=0, runs=runs, mean=runs[0], spread={"bin0": None, "bin1": None})


def test_the_section_puts_the_paper_beside_and_tells_where_the_order_differs(tmp_path: Path) -> None:
    found = {"Parity": {"lstm": outcome(100, 100), "hope, chunk 4": outcome(100, 75), "transformer": outcome(50, 0)}}
    text = section(found, tmp_path)
    rows = {line.split("|")[1].strip(): line for line in text.split("\n") if line.startswith("| ")}
    assert rows["lstm"].startswith("| lstm | 100 / 100<br>*100 / 100* | not run<br>*100 / 100* |")
    assert rows["hope, chunk 4"].startswith("| hope, chunk 4 | 100 / 75<br>*100 / 100* |")
    assert rows["transformer"].startswith("| transformer | 50 / 0<br>*46.4 / 0* |")
    assert rows["titans, chunk 16"].count("not run") == 6
    sentences = [line for line in text.split("\n") if line.startswith("- ")]
    expected = "- Parity, longer words: lstm (100) is ahead of hope, chunk 4 (75), in the paper they are equal."
    assert sentences == [expected]
    assert (tmp_path / "formal.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"

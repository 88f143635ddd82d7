"""The ablation: one switch a row, equal parameters, and table 6."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from nestlearn.models.hope import HopeConfig
from nestlearn.models.hope.block import make_titans
from nestlearn.ops import WriteRule
from nestlearn.tasks.core import ablation, language
from nestlearn.tasks.core.ablation import LETTER, OWN, PAPERS, ROWS, plan, section, with_averages
from nestlearn.tasks.core.models import Size, language_model
from nestlearn.tasks.core.paper import TABLE_6
from nestlearn.tasks.plan import carry_out, outcomes
from nestlearn.train.model import count_parameters
from tests.tasks.core import small_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_data.write(tmp_path_factory.mktemp("data")))


def test_table_6_row_by_row() -> None:
    assert list(ROWS) == list(TABLE_6)
    default = HopeConfig()
    assert OWN["as shipped"] == {name: getattr(default, name) for name in PAPERS}
    for name, options in (ROWS | OWN).items():
        changed = {
            key for key, value in {**PAPERS, **options}.items() if value != PAPERS.get(key, getattr(default, key))
        }
        assert bool(changed) == (name != "hope"), name
        HopeConfig(**{**PAPERS, **options})  # names and types are right


def test_the_letter_is_the_rule_as_printed() -> None:
    printed, rule = WriteRule.printed(), make_titans(HopeConfig(**LETTER)).rule
    for key in {field.name for field in dataclasses.fields(WriteRule)} - {"chunk_size", "chunk_size_other"}:
        assert getattr(rule, key) == getattr(printed, key), key
    assert LETTER["write_scale"] is None
    assert LETTER["shared_input"] is True


def test_rows_have_the_parameters_of_hope_as_shipped(data: str) -> None:
    made = plan("cpu", data)
    assert [row.model for row in made.rows] == [*ROWS, *OWN]
    assert all(row.reason is None for row in made.rows)
    assert {row.reason for row in plan("cpu", None).rows} == {"no data was given: --data DIR with wikitext2"}
    assert made.function is language.train_one
    with torch.device("meta"):
        target = count_parameters(language_model("hope", 4096, Size(**made.shared["size"])))
        for row in made.rows:
            size, options = Size(**row.arguments["size"]), row.arguments["options"]
            count = count_parameters(language_model("hope", 4096, size, options))
            assert abs(count - target) < 0.002 * target, row.model


def test_a_row_reaches_the_model_and_the_section_has_what_is_there(data: str, tmp_path: Path) -> None:
    made = plan("smoke", data)
    kept = ("hope", "without DGD", "the letter, chunk 16")
    shared = {**made.shared, "tokens": 1024, "length": 64, "step": 128}
    made = dataclasses.replace(made, rows=[row for row in made.rows if row.model in kept], shared=shared)
    carry_out(made, tmp_path, 1)
    found = outcomes(made, tmp_path)
    losses = [found[ablation.SETTING][name]["mean"]["validation_loss"] for name in kept]
    assert len(set(losses)) == 3
    text = section(found, tmp_path)
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in text.split("\n") if line.startswith("| ")}
    mean = {name: found[ablation.SETTING][name]["mean"]["wikitext ppl"] for name in kept}
    assert rows["hope"][0].strip() == f"{mean['hope']:.4g}"
    assert rows["without DGD"][1].strip() == f"{100 * (mean['without DGD'] / mean['hope'] - 1):+.1f} %"
    assert rows["without DGD"][3].strip() == "-<br>*13.41*"
    assert rows["without CMS"][0].strip() == "not run"
    assert (tmp_path / "ablation.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "not run" in section({}, tmp_path)


def outcome(perplexity: float, last_words: float, right: float) -> dict[str, Any]:
    run = {"wikitext ppl": perplexity, "lambada ppl": last_words, **dict.fromkeys(ablation.ACCURACY, right)}
    spread = dict.fromkeys(run)
    return dict(state="finished", reason=None, diverged=0, runs=[run], mean=run, spread=spread)


def test_averages_are_the_papers(tmp_path: Path) -> None:
    found = with_averages(outcome(14.39, 10.08, 58.0))
    assert found["mean"]["average ppl"] == pytest.approx(12.235)
    assert found["mean"]["average accuracy"] == pytest.approx(58)
    lacking = outcome(14.39, 10.08, 58.0)
    del lacking["runs"][0]["piqa"]
    assert "average accuracy" not in with_averages(lacking)["mean"]
    models = {"hope": outcome(15, 15, 50), "without DGD": outcome(14, 20, 40), "without momentum": outcome(16, 16, 40)}
    text = section({ablation.SETTING: models}, tmp_path)
    assert "beside the paper's average: without DGD (14) is ahead of hope (15), in the paper it is behind." in text
    assert "without momentum" not in text.split("differs from the paper's:")[1]

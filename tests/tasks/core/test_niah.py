"""Needle in a haystack as a task: loss, answers by generation, a run, and the report with missing numbers."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from nestlearn.errors import UserError
from nestlearn.models.hope import HopeForCausalLM
from nestlearn.tasks.core import SCALES, niah
from nestlearn.tasks.core.models import Size, language_model
from nestlearn.tasks.core.needles import BASE, NOISE, TASKS, Form, Library, Sample, draw
from nestlearn.tasks.core.niah import (
    GROWING,
    LENGTHS,
    RECIPES,
    ROWS,
    SETTING,
    WITHOUT_DATA,
    accuracy,
    answers,
    loss_of,
    plan,
    score_name,
    section,
    train_one,
    training_samples,
)
from nestlearn.tasks.core.paper import TABLE_1_LENGTHS

TINY: dict[str, Any] = dict(size={"dim": 16, "layers": 1, "heads": 2, "intermediate": 24}, words=8, samples=2)
TINY |= dict(form={"digits": 2, "groups": [2], "many": 2}, tokens=256, longest=128)
FORM = Form(digits=2, groups=(2,), many=2)
LIBRARY = Library(NOISE, NOISE, NOISE, {symbol: n for n, symbol in enumerate(BASE)})


def samples(task: str, length: int, count: int) -> list[Sample]:
    generator = np.random.default_rng(0)
    return [draw(task, length, NOISE, FORM, generator) for _ in range(count)]


def network(name: str = "hope") -> HopeForCausalLM:
    torch.manual_seed(0)
    size = Size(dim=16, layers=2, heads=2, intermediate=24)
    return language_model(name, len(BASE), size, {"chunk_size": 16}).eval()


def test_the_loss_is_that_of_each_symbol_of_an_answer_after_the_right_ones() -> None:
    model = network()
    some = [*samples("MQ-NIAH", 64, 2), *samples("S-NIAH-1", 48, 1)]  # rows of several lengths
    losses = []
    for sample in some:
        ids = torch.tensor([[LIBRARY.number[s] for s in (*sample.prompt, *sample.answer)]])
        each = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        losses.append(each[len(sample.prompt) - 1 :])
    assert loss_of(model, some, LIBRARY).item() == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


@pytest.mark.parametrize("name", ["hope", "transformer+conv"])
def test_answers_in_pieces_are_those_of_choosing_the_likeliest_symbol(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, some = network(name), samples("MV-NIAH", 70, 3)
    monkeypatch.setattr(niah, "PIECE", 32)
    symbols = list(LIBRARY.number)
    with torch.no_grad():
        for sample, said in zip(some, answers(model, some, LIBRARY), strict=True):
            ids = [LIBRARY.number[s] for s in sample.prompt]
            for symbol in said:
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
                assert symbols[ids[-1]] == symbol
            assert len(said) == len(sample.answer)


def test_accuracy_is_the_mean_share_of_values_and_rows_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    some = samples("MV-NIAH", 60, 4)

    def half(model: Any, few: Sequence[Sample], library: Library) -> list[list[str]]:
        assert len(few) <= 2
        return [[*sample.values[0], ","] if sample is not some[0] else sample.answer for sample in few]

    monkeypatch.setattr(niah, "answers", half)
    monkeypatch.setattr(niah, "READ", 120)
    assert accuracy(network(), some, LIBRARY) == 100 * (1 + 3 * 0.5) / 4


def test_steps_have_one_length_and_their_symbols() -> None:
    generator = np.random.default_rng(0)
    seen, kinds = set(), set()
    for _ in range(60):
        some = training_samples(False, [64, 128], 256, LIBRARY, FORM, generator)
        (length,) = {len(sample.prompt) for sample in some}
        assert len(some) * length == 256
        seen.add(length)
        kinds |= {(s.prompt[s.question + 3], len(s.needles), len(s.values)) for s in some}
    assert seen == {64, 128}
    assert kinds == {("number", 1, 1), ("uuid", 1, 1), ("number", 2, 1), ("number", 2, 2)}
    dense = training_samples(True, [64, 128], 256, LIBRARY, FORM, generator)
    assert [len(s.prompt) for s in dense] == [64] * 4
    assert all(len(s.needles) == len(s.values) for s in dense)  # all are asked
    assert len({len(s.needles) for s in training_samples(True, [64], 2048, LIBRARY, FORM, generator)}) > 1


def test_a_run_is_repeatable_and_has_every_number() -> None:
    lines: list[str] = []
    runs = [train_one("hope", 1e-2, seed, lengths=[128, 300], steps=3, log=lines.append, **TINY) for seed in (0, 0, 1)]
    for run in runs:
        assert run.pop("seconds") > 0
    assert runs[0] == runs[1] != runs[2]
    assert set(runs[0]) > {score_name(task, n) for task, n in itertools.product(TASKS, (128, 300))}
    assert (runs[0]["steps"], runs[0]["trained_to"], len(runs[0]["curve"])) == (3, 128, 3)
    assert 0 <= runs[0]["validation_error"] <= 100
    assert lines[-1].startswith("length 300: S-NIAH-1 ")


def test_a_model_learns_to_answer_where_it_can_without_the_text() -> None:
    """One digit has ten values: a tiny model soon writes one digit and the end, and is right by chance at most."""
    result = train_one(
        "linear", 1e-2, 0, lengths=[64], steps=60, **(TINY | {"form": {"digits": 1, "many": 1, "groups": [1]}})
    )
    assert result["curve"][-1][1] < 0.6 * result["curve"][0][1]
    assert result["validation_loss"] < np.log(len(BASE))


def test_mistakes_are_one_line_and_what_is_not_finite_has_no_scores(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="shortest 64, longest 32, tokens 256"):
        train_one("hope", 1e-2, 0, **(TINY | {"longest": 32}))
    with pytest.raises(UserError, match="MQ-NIAH needs 20 symbols, got length 16"):
        train_one("hope", 1e-2, 0, **(TINY | {"shortest": 16, "form": {"digits": 40}}))
    with pytest.raises(UserError, match="has no folder wikitext2"):
        train_one("hope", 1e-2, 0, data=str(tmp_path), **TINY)
    with pytest.raises(UserError, match="unknown model 'hpe'"):
        train_one("hpe", 1e-2, 0, **TINY)
    result = train_one("linear", 1e38, 0, steps=5, **TINY)
    assert result["diverged"] is True
    assert not any(key.split()[0] in TASKS for key in result)


@pytest.mark.parametrize("scale", SCALES)
def test_every_model_gets_the_same_search_and_the_lengths_it_can_read(scale: str, tmp_path: Path) -> None:
    made = plan(scale, None)
    assert [row.model for row in made.rows] == list(ROWS)
    assert {row.setting for row in made.rows} == {WITHOUT_DATA}  # results of another text, so cells of other names
    assert {row.setting for row in plan(scale, str(tmp_path)).rows} == {SETTING}
    usual, further = LENGTHS[scale]
    for row in made.rows:
        assert row.reason is None
        assert tuple(row.arguments["lengths"]) == (usual if row.model in GROWING else usual + further)
    assert made.shared == RECIPES[scale]
    recipe = RECIPES[scale]
    for task in TASKS:  # whatever is trained on fits
        draw(task, recipe["shortest"], NOISE, Form(**recipe["form"]), np.random.default_rng(0))
    assert (recipe["longest"] / recipe["shortest"]).is_integer()
    if scale != "smoke":
        assert set(TABLE_1_LENGTHS) < set(usual)
    assert {row.reason for row in plan(scale, str(tmp_path)).rows} == {f"{tmp_path} has no folder wikitext2"}


def test_the_section_puts_the_paper_beside_and_says_what_is_missing(tmp_path: Path) -> None:
    hope = {score_name("S-NIAH-1", n): 100.0 for n in (1024, 4096)} | {score_name("MV-NIAH", 4096): 20.0}
    titans = {score_name("S-NIAH-1", 4096): 90.0, score_name("MV-NIAH", 4096): 30.0}
    found = {
        name: dict(state="finished", reason=None, diverged=0, mean=mean, spread=dict.fromkeys(mean))
        | {"runs": [mean | {"trained_to": 1024}]}
        for name, mean in (("hope", hope), ("titans", titans))
    }
    found["deltanet"] = dict(state="not run", reason=None, diverged=0, mean={}, spread={}, runs=[])
    text = section({SETTING: found}, tmp_path)
    tables = {part.split("\n")[0]: part for part in text.split("### ")[1:]}
    assert list(tables) == list(TASKS)
    assert "| model | 1,024 | 4,096 | 8,192 | 16,384 |" in tables["S-NIAH-1"]
    assert "| hope | 100 | 100<br>*100* | -<br>*100* | -<br>*100* |" in tables["S-NIAH-1"]
    assert "| titans | - | 30<br>*24.6* | -<br>*15.1* | -<br>*8.2* |" in tables["MV-NIAH"]
    assert "| deltanet | not run | not run | not run | not run |" in tables["S-NIAH-2"]
    sentences = [line for line in text.split("\n") if line.startswith("- ")]
    assert sentences == [
        "- S-NIAH-1 at 4,096: hope (100) is ahead of titans (90), in the paper they are equal.",
        "- MV-NIAH at 4,096: titans (30) is ahead of hope (20), in the paper it is behind.",
    ]
    assert (tmp_path / "niah.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    empty = section({}, tmp_path)
    assert empty.count("| not run") == len(ROWS) * len(TASKS) * len(TABLE_1_LENGTHS)

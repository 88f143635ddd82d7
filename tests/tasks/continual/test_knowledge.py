"""The stream of domains, the abilities, and what is compared at equal gain."""

from pathlib import Path

import pytest
import torch

from nestlearn.tasks.continual import knowledge, speed
from nestlearn.tasks.continual.abilities import Abilities, answer, continuations
from nestlearn.tasks.continual.curves import Point, curves, matched
from nestlearn.tasks.continual.knowledge import LONGER, METHODS, RECIPES, read_stream
from nestlearn.tasks.continual.late import LateModel
from nestlearn.tasks.continual.pretrained import load_model
from nestlearn.tasks.continual.streams import Domain, Question, load_domains
from nestlearn.tasks.plan import outcomes


@pytest.fixture(scope="module")
def domains(data: str) -> list[Domain]:
    return load_domains(data, load_model("tiny")[1], tokens=1500, held_out=300, questions=3, seed=0)


def test_what_is_held_out_is_not_read(domains: list[Domain]) -> None:
    assert [domain.name for domain in domains] == ["grammar", "code", "intents", "teanu"]
    for domain in domains:
        assert len(domain.read.encode()) >= 1500
        assert len(domain.held_out.encode()) >= 300
        lines = {line for line in domain.held_out.split("\n") if len(line) > 60}
        assert not lines & set(domain.read.split("\n")) or domain.name == "code"  # code repeats itself
    teanu = {line for line in domains[3].read.split("\n") if line.startswith("Teanu:")}
    assert not teanu & set(domains[3].held_out.split("\n"))


def test_questions_are_about_what_was_read(domains: list[Domain]) -> None:
    for domain in domains:
        assert 1 <= len(domain.questions) <= 3
        for question in domain.questions:
            right = question.choices[question.gold]
            assert len(set(question.choices)) == len(question.choices) == 4
            joined = question.prompt + ("" if right.startswith(" ") or question.prompt.endswith("(") else " ") + right
            assert joined.rstrip("\n") in domain.read or question.prompt + right in domain.read


def test_continuations_are_scored_as_in_a_pass_of_their_own() -> None:
    model, _ = load_model("tiny")
    texts = [([1, 2, 3], [4, 5]), ([6], [7]), ([8, 9], [1, 2, 3])]
    losses, right = continuations(LateModel(model, 0), texts, 0)
    for (before, after), loss in zip(texts, losses, strict=True):
        logp = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
        expected = -sum(logp[len(before) - 1 + n, token].item() for n, token in enumerate(after))
        assert loss.item() == pytest.approx(expected, rel=1e-4)
    likeliest = int(model(torch.tensor([[1, 2, 3]])).logits[0, -1].argmax())
    other = [([1, 2, 3], [likeliest]), ([1, 2, 3], [likeliest + 1])]
    assert continuations(LateModel(model, 0), other, 0)[1].tolist() == [True, False]
    assert not right.all()


def test_the_right_answer_is_told_by_its_likelihood() -> None:
    model, tokenizer = load_model("tiny")
    late = LateModel(model, 0)
    logits = model(torch.tensor([tokenizer("Q:")["input_ids"]])).logits[0, -1]
    best, worst = (chr(int(logits[97:122].argmax()) + 97), chr(int(logits[97:122].argmin()) + 97))
    assert answer(late, tokenizer, [Question("Q:", (worst, best), 1)])["right"] == 100
    found = answer(late, tokenizer, [Question("Q:", (worst, best), 0), Question("Q:", (worst, best), 1)])
    assert found["right"] == 50
    assert found["nats"] > 0.6


def test_abilities_see_what_has_changed(data: str) -> None:
    model, tokenizer = load_model("tiny")
    known = Abilities(LateModel(model, 0), tokenizer, data, items=2, chats=2, windows=1)
    before = known.measure()
    assert before == known.measure()
    assert before["chat_nats"] < before["prose_nats"]  # its own likeliest words
    model.model.layers[3].mlp.down_proj.weight.data.normal_(0, 1)
    after = known.measure()
    assert after["chat_nats"] > before["chat_nats"]
    assert after["prose_nats"] != before["prose_nats"]


@pytest.mark.parametrize("given", [{"method": "none"}, *METHODS.values()], ids=["none", *METHODS])
def test_a_cell_of_every_method(data: str, given: dict) -> None:
    if given["method"] == "lora":
        pytest.importorskip("peft")
    recipe = RECIPES["smoke"] | dict(tokens=128, held_out=64, questions=1)
    lr = 1e-2 * (LONGER if given.get("keep") else 1)
    result = read_stream(lr=lr, seed=0, data=data, **given, **recipe)
    assert result["held_out"] == pytest.approx(sum(result[f"held_out_{d}"] for d in DOMAINS) / 4)
    assert (result["parameters"] > 0) == (given["method"] != "none")
    if given["method"] not in ("none", "ewc"):
        assert result["held_out"] < 5.52  # 5.55 before


DOMAINS = ("grammar", "code", "intents", "teanu")


def test_one_level_of_hope_reads_as_fine_tuning_does(data: str) -> None:
    recipe = RECIPES["smoke"] | dict(tokens=128, held_out=64, questions=1, lr=1e-3, seed=0, data=data)
    hope = read_stream(method="hope", levels=1, **recipe)
    plain = read_stream(**METHODS["fine-tuning, same blocks"], **recipe)
    assert hope["held_out"] == pytest.approx(plain["held_out"], abs=2e-3)
    assert hope["parameters"] == plain["parameters"]


def test_curves_begin_before_and_know_which_way_is_worse() -> None:
    def row(held: float, nats: float, right: float) -> dict:
        return {"mean": {"held_out": held, "nats": nats, "right": right}}

    found = {
        "before": {"-": row(3.0, 1.0, 50.0)},
        "a": {"lr 1": row(2.5, 1.1, 40.0), "lr 2": row(2.0, 1.3, 60.0), "lr 3": {"mean": {}}},
        "b": {"lr 1": {"mean": {}}},
    }
    lines = curves(found, "before", "held_out", {"nats": 1, "right": -1})
    assert list(lines) == ["a"]
    assert [point.gain for point in lines["a"]] == [0.5, 1.0]
    assert lines["a"][0].lost == pytest.approx({"nats": 0.1, "right": 10.0})
    assert lines["a"][1].lost == pytest.approx({"nats": 0.3, "right": -10.0})
    assert curves({"a": found["a"]}, "before", "held_out", {"nats": 1}) == {}


def test_methods_are_compared_where_all_have_been() -> None:
    lines = {
        "steep": [Point(0.4, {"x": 0.0}), Point(0.6, {"x": 1.0}), Point(0.2, {"x": 9.0})],
        "flat": [Point(2.0, {"x": 1.0})],
        "useless": [Point(-0.1, {"x": 5.0})],
    }
    gain, lost = matched(lines)
    assert gain == pytest.approx(0.54)
    assert lost["steep"] == pytest.approx({"x": 0.7})
    assert lost["flat"] == pytest.approx({"x": 0.27})
    assert "useless" not in lost
    assert matched({}) == (0.0, {})


def test_sections_with_and_without_numbers(data: str, tmp_path: Path) -> None:
    for module in (knowledge, speed):
        text = module.section(outcomes(module.plan("smoke", None), tmp_path / "empty"), tmp_path)
        assert "| hope, 4 levels" in text
        assert "not run" in text
    means = {key: 1.0 for key in ("held_out", "asked", *knowledge.OLD)}
    found = {
        "before": {"-": {"state": "finished", "mean": means, "spread": dict.fromkeys(means), "diverged": 0}},
        "hope, 1 level": {
            "lr 1": {
                "state": "finished",
                "mean": means | {"held_out": 0.5, "prose_nats": 1.25},
                "spread": dict.fromkeys(means),
                "diverged": 0,
            }
        },
    }
    text = knowledge.section(found, tmp_path)
    assert "Lost at a gain of 0.450 nats a token" in text
    assert "| hope, 1 level | 0.225 | 0 |" in text
    assert (tmp_path / "knowledge.png").stat().st_size > 5000


def test_a_cell_of_speed_has_every_number() -> None:
    result = speed.time_levels(levels=2, lr=1e-4, seed=0, **speed.RECIPES["smoke"])
    assert set(speed.COLUMNS) <= set(result)
    assert min(result[key] for key in speed.COLUMNS) > 0
    assert result["learning_ratio"] == pytest.approx(result["learning"] / result["tuning"])
    # The weights and two moments of each, fp32, and a little beside.
    assert 3 * 4 * result["parameters"] <= 1e6 * result["snapshot_megabytes"] < 5 * 4 * result["parameters"]

"""BABILong as a task: reading through the cache, exact answers, memory that does not grow, and the report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from transformers import DynamicCache

from nestlearn.nn import step_sizes
from nestlearn.tasks.core import SCALES, babilong
from nestlearn.tasks.core.babi import END, NAMES, Background, Question, Teller, Vocabulary
from nestlearn.tasks.core.babilong import MODELS, RECIPES, climb, plan, section, train_one
from nestlearn.tasks.core.models import Size, language_model
from nestlearn.tasks.core.reading import MemoryMeter, advance, answer, tensor_bytes
from nestlearn.tasks.plan import carry_out, outcomes
from tests.tasks.core import small_data

TINY = Size(dim=16, layers=2, heads=2, intermediate=24)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_data.write(tmp_path_factory.mktemp("data")))


def teller() -> Teller:
    facts, text = ("ada went to the kitchen .", "ben went to the garden ."), small_data.prose(200, 0)
    questions = [Question(facts, f"where is {who} ?", where, 0) for who, where in (("ada", "kitchen"), ("ben", "x y"))]
    vocabulary = Vocabulary([*facts, "where is ada ? x y"], text, 200)
    return Teller(questions, Background(text, vocabulary), vocabulary)


def network(model: str, told: Teller) -> Any:
    torch.manual_seed(0)
    made = language_model(model, int(told.background.tokens.max()) + 20, TINY).eval()
    torch.nn.init.normal_(made.lm_head.weight)  # so that answers differ
    return made


@pytest.mark.parametrize("model", dict.fromkeys(model for model, _ in MODELS.values()))
def test_an_answer_through_the_cache_is_that_of_the_whole_text(model: str) -> None:
    told, generator = teller(), np.random.default_rng(0)
    made = network(model, told)
    samples = [told.hide(n, 150, generator) for n in (0, 1, 0)]
    questions = [samples[0].question, samples[1].question, samples[2].question[:3]]  # of different lengths
    cache = DynamicCache(config=made.config)
    for tokens in told.batches(samples, 64):
        advance(made, torch.from_numpy(tokens).long(), cache)
    for found, sample, question in zip(answer(made, cache, questions, END, 5), samples, questions, strict=True):
        tokens = np.concatenate([*told.pieces(sample, 150), question]).tolist()
        expected: list[int] = []
        while len(expected) < 5 and END not in expected:
            with torch.no_grad():
                logits = made(torch.tensor([tokens + expected])).logits
            expected.append(int(logits[0, -1].argmax()))
        assert found == expected


def test_an_answer_is_right_if_all_of_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    told, generator = teller(), np.random.default_rng(0)
    samples = [told.hide(n, 40, generator) for n in (0, 1, 1, 1)]
    right = [sample.answer.tolist() for sample in samples]
    said = [right[0], right[1], right[2][:-1], [*right[3][:1], END]]  # the last two: no end, half the answer

    def fixed(network: Any, cache: Any, questions: Sequence[np.ndarray], end: int, most: int) -> list[list[int]]:
        return said

    monkeypatch.setattr(babilong, "answer", fixed)
    found = climb(network("hope", told), told, samples, 16, 1.0, "cpu")
    assert (found["accuracy"], found["samples"]) == (50, 4)


def test_the_state_of_hope_is_constant_and_that_of_attention_is_its_keys_and_values() -> None:
    told, generator = teller(), np.random.default_rng(0)
    sizes: dict[str, list[int]] = {}
    for model in ("hope", "transformer"):
        for length in (64, 128, 1000):
            cache = DynamicCache(config=network(model, told).config)
            for tokens in told.batches([told.hide(0, length, generator)] * 2, 32):
                advance(network(model, told), torch.from_numpy(tokens).long(), cache)
            sizes.setdefault(model, []).append(tensor_bytes(cache.layers))
    assert len(set(sizes["hope"])) == 1
    per_token = 2 * TINY.layers * TINY.dim * 4  # keys and values in float32
    assert sizes["transformer"] == [2 * per_token * length for length in (64, 128, 1000)]


def test_a_state_that_outgrows_its_bound_ends_the_reading() -> None:
    told, generator = teller(), np.random.default_rng(0)
    samples = [told.hide(0, 5000, generator)]
    per_token = 2 * TINY.layers * TINY.dim * 4
    found = climb(network("transformer", told), told, samples, 100, 1000 * per_token / 2**20, "cpu")
    assert found == {"outgrown": 1100}
    assert climb(network("hope", told), told, samples, 100, 1000 * per_token / 2**20, "cpu")["samples"] == 1


def test_a_long_stream_is_read_at_flat_memory() -> None:
    told = teller()
    made = language_model("hope", len(told.background.tokens), Size(8, 1, 1, 6))
    sample = told.hide(0, 400_000, np.random.default_rng(0))
    cache, held = DynamicCache(config=made.config), []
    for tokens in told.batches([sample], 8192):
        hidden = advance(made, torch.from_numpy(tokens).long(), cache)
        held.append(psutil.Process().memory_info().rss)
    assert hidden.isfinite().all()
    assert cache.get_seq_length() == 400_000
    assert max(held) - max(held[:10]) < 8 * 2**20


def test_the_meter_keeps_the_most() -> None:
    meter = MemoryMeter("cpu")
    before = meter.most
    held = torch.ones(2**24)  # 64 MiB
    meter.note()
    del held
    meter.note()
    assert meter.most >= before + 2**25


CELL: dict[str, Any] = dict(
    stages=[[0, 3, False], [32, 3, True]],
    ladder=[[32, 10], [200, 3]],
    batch=4,
    vocabulary=100,
    size={"dim": 16, "layers": 1, "heads": 2, "intermediate": 24},
    piece=64,
)


def test_a_cell_from_end_to_end_is_repeatable(data: str) -> None:
    lines: list[str] = []
    first, same, other = (
        train_one("qa1", "hope", 1e-2, seed, data=data, **CELL, log=lines.append) for seed in (0, 0, 1)
    )
    numbers = ("accuracy 32", "accuracy 200", "state 200", "validation_error", "validation_loss", "curve")
    assert [first[key] for key in numbers] == [same[key] for key in numbers]
    assert first["curve"] != other["curve"]
    assert first["samples 200"] == 3
    assert first["vocabulary"] < 100
    assert 0 <= first["accuracy 32"] <= 100
    assert first["outgrown"] is None
    assert lines[0].startswith("step 1 of 6, 0 tokens: loss ")
    wild = train_one("qa1", "hope", 1e38, 0, data=data, **CELL)
    assert wild["diverged"] is True
    assert "accuracy 32" not in wild


def test_a_model_learns_to_find_the_last_fact(data: str) -> None:
    cell = CELL | {"stages": [[0, 150, True], [40, 50, True]], "ladder": [], "batch": 16}
    cell["size"] = {"dim": 32, "layers": 1, "heads": 2, "intermediate": 48}
    result = train_one("qa1", "hope", 1e-2, 0, data=data, **cell)
    assert result["curve"][0][2] > 3
    assert result["curve"][-1][2] < 0.6  # a guess among four places and a certain end: ln 4 / 2 is 0.69


def test_a_cost_teaches_to_write_less(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, build = [], babilong.language_model
    monkeypatch.setattr(babilong, "language_model", lambda *given: made.append(build(*given)) or made[-1])
    cell = CELL | {"stages": [[0, 5, True], [40, 30, True]], "ladder": [], "options": {"stretch": 0.1}}
    for cost in (0.0, 10.0):
        train_one("qa1", "hope", 1e-2, 0, data=data, **cell, cost=cost)
    means = []
    for network in made:
        with torch.no_grad(), step_sizes(network) as sizes:
            network(torch.arange(40)[None])
        means.append(float(torch.stack(sizes).mean()))
    assert means[1] < 0.5 * means[0]


@pytest.mark.parametrize("scale", SCALES)
def test_every_model_is_planned_on_every_task_and_data_is_asked_for(scale: str, data: str) -> None:
    made = plan(scale, None)
    assert {row.reason for row in made.rows} == {
        f"no data was given: --data DIR with {', '.join(babilong.TEXTS)}, babi",
    }
    assert len(made.rows) == len(MODELS) * len(NAMES)
    assert not made.search()
    here = plan(scale, data)
    assert all(row.reason is None for row in here.rows)
    assert len({cell.name for cell in here.search().values()}) == len(made.rows) * len(made.rates)
    ladders = {row.model: row.arguments["ladder"] for row in here.rows if row.setting == "qa1"}
    assert all(sorted(ladder) == ladder for ladder in ladders.values())
    if scale != "smoke":
        assert ladders["hope"][-1][0] == ladders["hope, no decay"][-1][0] == 10_000_000
        assert RECIPES[scale]["stages"][-1][0] >= 1024


def test_the_section_has_what_is_there(tmp_path: Path, data: str) -> None:
    made = plan("smoke", data)
    wanted = ("hope", "transformer")
    made = type(made)(
        **{**vars(made), "rows": [r for r in made.rows if r.model in wanted and r.setting == "qa1"]},
    )
    made = type(made)(**{**vars(made), "shared": {**made.shared, "bound": 0.05}})
    carry_out(made, tmp_path, 1)
    text = section(outcomes(made, tmp_path), tmp_path)
    rows = [line for line in text.split("\n") if line.startswith("| ")]
    assert rows[0] == "| qa1, single-supporting-fact | 256 | 1K | 8K |"
    found = {row.split("|")[1].strip(): row for row in rows[1:3]}
    assert found["transformer"].split("|")[3].strip() == "state too large after 512"
    assert found["hope"].count("(of ") == 3
    assert (tmp_path / "babilong.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    empty = section(outcomes(plan("smoke", None), tmp_path / "new"), tmp_path)
    assert "| qa5, three-arg-relations |" in empty

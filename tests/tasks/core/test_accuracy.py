"""lm-eval in process, against likelihoods that are summed here."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from nestlearn.data import load_tokenizer
from nestlearn.errors import UserError
from nestlearn.tasks.core import accuracy
from nestlearn.tasks.core.accuracy import INSTALL, TASKS, missing, score
from nestlearn.tasks.core.models import Size, language_model
from nestlearn.tasks.core.paper import TABLE_2_COLUMNS
from tests.tasks.core import small_data

installed = pytest.mark.skipif(missing() is not None, reason="lm-eval is not installed")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_data.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("bytes")


def model(tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    made = language_model("hope", len(tokenizer), Size(16, 1, 2, 24))
    torch.nn.init.normal_(made.lm_head.weight, std=0.5)  # so that likelihoods differ
    return made


def likelihood(made: Any, tokenizer: Any, text: str, continuation: str) -> tuple[float, bool]:
    """The log likelihood of a continuation, and whether each of its tokens is the most likely one."""
    before, after = (tokenizer(part)["input_ids"] for part in (text, continuation))
    with torch.no_grad():
        logits = made.eval()(torch.tensor([before + after])).logits[0, len(before) - 1 : -1].log_softmax(-1)
    targets = torch.tensor(after)
    total = logits.gather(1, targets[:, None]).sum().item()
    return total, bool((logits.argmax(-1) == targets).all())


def expected(made: Any, tokenizer: Any) -> dict[str, float]:
    """Each column by the definition of its task."""

    def choose(column: str, prompts: Any, by_character: bool = False, gold: str = "gold") -> float:
        rows = small_data.CHOICES[TASKS[column][0]]
        right = 0
        for row in rows:
            values = [
                likelihood(made, tokenizer, text, f" {end}")[0] / (len(end) if by_character else 1)
                for text, end in prompts(row)
            ]
            right += values.index(max(values)) == row[gold]
        return 100 * right / len(rows)

    def asked(row: Any) -> Any:
        return [(row["query"].rstrip() + "\nAnswer:", choice) for choice in row["choices"]]

    words = [
        likelihood(made, tokenizer, row["context"], " " + row["continuation"])
        for row in small_data.CHOICES[TASKS["lambada"][0]]
    ]
    return {
        "lambada ppl": math.exp(-sum(value for value, _ in words) / len(words)),
        "lambada": 100 * sum(right for _, right in words) / len(words),
        "piqa": choose("piqa", asked),
        "hellaswag": choose("hellaswag", lambda row: [(row["ctx"], end) for end in row["endings"]], True, "label"),
        "winogrande": choose("winogrande", lambda row: [(t, row["continuation"]) for t in row["context_options"]]),
        "arc-easy": choose("arc-easy", asked),
        "arc-challenge": choose("arc-challenge", asked, True),
        "siqa": choose("siqa", lambda row: [(row["query"], choice) for choice in row["choices"]]),
        "boolq": choose("boolq", asked),
    }


@installed
def test_every_column_of_table_2_is_scored_by_its_definition(data: Path, tokenizer: Any) -> None:
    different = set()
    for seed in range(2):
        made = model(tokenizer, seed).train()
        state = torch.random.get_rng_state()
        found = score(made, tokenizer, data)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert made.training
        assert list(found) == list(TABLE_2_COLUMNS[1:])
        assert found == pytest.approx(expected(made, tokenizer), rel=1e-3)
        different.add(tuple(found.values()))
    assert len(different) == 2


@installed
def test_a_certain_model_has_every_last_word(data: Path, tokenizer: Any) -> None:
    class Knows(torch.nn.Module):
        """Gives what the rows of LAMBADA go on with."""

        def __init__(self) -> None:
            super().__init__()
            rows = small_data.CHOICES[TASKS["lambada"][0]]
            self.texts = [tokenizer(row["context"] + " " + row["continuation"])["input_ids"] for row in rows]

    knows, made = Knows(), model(tokenizer)

    def forward(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        logits = torch.zeros(*input_ids.shape, len(tokenizer))
        for row, ids in enumerate(input_ids.tolist()):
            for text in knows.texts:
                for place in range(min(len(ids), len(text) - 1)):
                    if ids[: place + 1] == text[: place + 1]:
                        logits[row, place, text[place + 1]] = 50
        return type("Output", (), {"logits": logits})()

    made.forward = forward
    found = score(made, tokenizer, data, tasks=["lambada"])
    assert found["lambada"] == 100
    assert found["lambada ppl"] == pytest.approx(1)
    assert set(found) == {"lambada", "lambada ppl"}


@installed
def test_the_first_examples_and_files_that_are_not_there(data: Path, tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "commonsense").mkdir()
    (tmp_path / "commonsense" / "piqa.jsonl").write_text((data / "commonsense" / "piqa.jsonl").read_text())
    made = model(tokenizer)
    found = score(made, tokenizer, tmp_path, examples=1)
    assert set(found) == {"piqa"}
    assert found["piqa"] in (0, 100)
    with pytest.raises(UserError, match=r"holds none of lambada/lambada_openai\.jsonl: give the data folder"):
        score(made, tokenizer, tmp_path, tasks=["lambada"])


@installed
def test_real_files_have_the_fields(shared_data: Path, tokenizer: Any) -> None:
    found = score(model(tokenizer), tokenizer, shared_data, examples=1)
    assert list(found) == list(TABLE_2_COLUMNS[1:])


def test_without_lm_eval_there_is_a_line(monkeypatch: pytest.MonkeyPatch, data: Path, tokenizer: Any) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    assert missing() == INSTALL == "not run: pip install 'nestlearn[eval]'"
    with pytest.raises(UserError, match=r"accuracy tasks are not run: pip install 'nestlearn\[eval\]'"):
        accuracy.score(model(tokenizer), tokenizer, data)

"""Language modelling as a task: perplexity by context on the same tokens, one cell, and the report."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nestlearn.data import load_tokenizer
from nestlearn.tasks.core import SCALES, accuracy, language
from nestlearn.tasks.core.contexts import losses_by_context, span_ends, windows
from nestlearn.tasks.core.language import BYTES, CONTEXTS, MODELS, WORDS, plan, section, train_one
from nestlearn.tasks.core.models import Size, language_model
from nestlearn.tasks.core.paper import FIGURE_10, TABLE_2_COLUMNS
from nestlearn.tasks.plan import carry_out, outcomes
from nestlearn.train.evaluate import evaluate_text
from nestlearn.train.model import count_parameters
from tests.tasks.core import small_data

CELL: dict[str, Any] = dict(
    tokenizer="bytes",
    length=32,
    tokens=512,
    step=64,
    contexts=[4, 16, 64, 2**20],
    spans=2,
    span=16,
    scored=500,
    examples=0,
    size={"dim": 16, "layers": 1, "heads": 2, "intermediate": 24},
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_data.write(tmp_path_factory.mktemp("data")))


@pytest.mark.parametrize("context", [1, 2, 4, 16, 32, 64])
def test_every_context_scores_the_same_tokens_once_each(context: int) -> None:
    ends, fitting = span_ends(300, [1, 2, 4, 16, 32, 64, 290], 3, 16)
    assert fitting == [1, 2, 4, 16, 32, 64]  # 290 and a span are more than there is
    assert (ends[0], ends[-1]) == (64 + 16, 300)
    scored: list[int] = []
    for window in windows(ends, 16, context):
        assert window.begin >= 0
        assert window.end - window.begin == context
        targets = list(range(window.end + 1 - window.scored, window.end + 1))
        assert all(context / 2 <= target - window.begin <= context for target in targets) or context > 32
        scored += targets
    assert sorted(scored) == [token for end in ends for token in range(end - 16, end)]


def test_losses_by_context_are_those_of_single_windows() -> None:
    torch.manual_seed(0)
    model = language_model("transformer", 11, Size(16, 1, 2, 24))
    ids = np.random.default_rng(0).integers(0, 11, 120)
    found = losses_by_context(model.train(), ids, [2, 8, 32], spans=2, span=8)
    assert model.training
    ends, _ = span_ends(120, [2, 8, 32], 2, 8)
    for context in (2, 8, 32):
        total = []
        for window in windows(ends, 8, context):
            tokens = torch.from_numpy(ids[window.begin : window.end])[None]
            with torch.no_grad():
                logits = model.eval()(tokens).logits[0].log_softmax(-1)
            for place in range(window.scored):
                last = context - window.scored + place
                total.append(-logits[last, ids[window.begin + last + 1]].item())
        assert found[context] == pytest.approx(np.mean(total), rel=1e-5)


def test_what_is_known_only_with_context_is_cheaper_with_it() -> None:
    class Echo(torch.nn.Module):
        """Knows the token that stood 10 before, if it has been read."""

        device = torch.device("cpu")

        def forward(self, input_ids: torch.Tensor, use_cache: bool, logits_to_keep: int) -> Any:
            logits = torch.zeros(*input_ids.shape, 7)
            if input_ids.shape[1] > 9:
                ahead = input_ids[:, : input_ids.shape[1] - 9]  # the next token after place p stood at p - 9
                logits[:, 9:].scatter_(2, ahead[..., None], 30.0)
            return type("Output", (), {"logits": logits[:, -logits_to_keep:]})()

    ids = np.tile(np.random.default_rng(0).integers(0, 7, 10), 20)
    found = losses_by_context(Echo(), ids, [4, 16, 32], spans=2, span=16)  # type: ignore[arg-type]
    assert found[4] == pytest.approx(math.log(7))
    assert 0 < found[16] < found[4] / 3  # of the last 8 of 16 tokens, one has only 9 before it
    assert found[32] == pytest.approx(0, abs=1e-6)


def test_a_cell_from_end_to_end_is_repeatable_and_measures_what_evaluate_does(data: str) -> None:
    first, same, other = (train_one("hope", 1e-2, seed, data=data, **CELL) for seed in (0, 0, 1))
    timed = {"tokens_per_second"}
    assert {k: v for k, v in first.items() if k not in timed} == {k: v for k, v in same.items() if k not in timed}
    assert first["curve"] != other["curve"]
    assert (first["steps"], first["tokens"]) == (8, 512)
    assert {key for key in first if key.startswith("context")} == {"context 4", "context 16", "context 64"}
    assert first["wikitext ppl"] == pytest.approx(math.exp(first["test_loss"]))
    # The bytes of a text of one document are its tokens.
    assert first["bits_per_byte"] == pytest.approx(first["test_loss"] / math.log(2))
    assert first["accuracy"] == "not asked for"
    assert first["curve"][-1][1] < first["curve"][0][1]


def test_the_test_loss_is_of_the_test_text(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, float] = {}

    def watch(network: Any, tokenizer: Any, documents: Any, **kwargs: Any) -> Any:
        found = evaluate_text(network, tokenizer, documents, **kwargs)
        seen["".join(documents)] = found["nats_per_token"]
        return found

    monkeypatch.setattr(language, "evaluate_text", watch)
    result = train_one("transformer", 1e-2, 0, data=data, **CELL)
    texts = {name: (Path(data) / "wikitext2" / f"{name}.txt").read_text() for name in ("valid", "test")}
    assert seen == {texts["valid"]: result["validation_loss"], texts["test"]: result["test_loss"]}


def test_what_is_not_finite_has_no_scores(data: str) -> None:
    result = train_one("hope", 1e30, 0, data=data, **CELL)
    assert result["diverged"] is True
    assert "validation_loss" not in result


def test_the_models_of_a_scale_are_of_one_size() -> None:
    for scale, tolerance in (("cpu", 0.002), ("gpu", 0.002)):
        size = Size(**language.RECIPES[scale]["size"])
        with torch.device("meta"):
            counts = {
                name: count_parameters(language_model(name, 4096, size, {"tie_word_embeddings": True}))
                for name in MODELS
            }
        assert max(counts.values()) - min(counts.values()) < tolerance * counts["hope"], counts


@pytest.mark.parametrize("scale", SCALES)
def test_every_model_is_planned_on_both_texts(scale: str, data: str) -> None:
    absent = plan(scale, None)
    assert {row.reason for row in absent.rows} == {"no data was given: --data DIR with wikitext2"}
    assert not absent.search()
    made = plan(scale, data)
    assert {(row.setting, row.model) for row in made.rows} == {(t, m) for t in (WORDS, BYTES) for m in MODELS}
    assert set(MODELS) >= {"transformer", "transformer+conv", "deltanet", "gated-deltanet", "titans", "hope"}
    assert all(row.reason is None for row in made.rows)
    assert all(made.shared["step"] % row.arguments["length"] == 0 for row in made.rows)
    assert plan(scale, str(Path(data) / "babi")).rows[0].reason == "the data folder must be one with wikitext2"


def test_the_section_has_what_is_there(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "missing", lambda: accuracy.INSTALL)
    made = plan("smoke", data)
    made = dataclasses.replace(
        made,
        rows=[row for row in made.rows if row.model in ("hope", "transformer") and row.setting == WORDS],
        shared={**made.shared, "tokens": 512},
    )
    carry_out(made, tmp_path, 1)
    found = outcomes(made, tmp_path)
    text = section(found, tmp_path)
    assert "Accuracy of transformer, hope: not run: pip install 'nestlearn[eval]', and give another folder." in text
    row = next(line for line in text.split("\n") if line.startswith("| hope |"))
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert cells[0] == f"{found[WORDS]['hope']['mean']['wikitext ppl']:.4g}<br>*14.39*"
    assert cells[1:3] == ["not run", "-<br>*10.08*"]
    assert len(cells) == len(TABLE_2_COLUMNS) + 1
    assert "| model | 128 | 256 | 512 |" in text
    assert (tmp_path / "contexts.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "not run" in section({}, tmp_path)


def test_figure_10_is_beside_its_contexts(tmp_path: Path) -> None:
    means = {f"context {c}": 100.0 + c for c in CONTEXTS}
    runs = [{"accuracy": None, **means}]
    outcome = {"state": "finished", "reason": None, "diverged": 0, "runs": runs, "mean": means}
    outcome["spread"] = dict.fromkeys(means)
    better = {**outcome, "mean": {key: value - 50 for key, value in means.items()}}
    text = section({WORDS: {"transformer": better, "hope": outcome}}, tmp_path)
    assert f"| 2148<br>*{FIGURE_10['hope'][0]}* |" in text
    assert "- 2,048 tokens of context: transformer (2098) is ahead of hope (2148), in the paper it is behind." in text
    assert "32,768 tokens of context:" not in text  # there the paper has the transformer ahead, too


def test_the_tokenizer_of_words_is_the_same_in_every_cell(data: str) -> None:
    corpus = language._read(str(Path(data) / "wikitext2"), "bpe:300", 32, 2)
    again = load_tokenizer("bpe:300", corpus.data.corpus)
    assert again.get_vocab() == corpus.data.tokenizer.get_vocab()
    text = "".join(corpus.data.corpus.test)
    assert corpus.data.tokenizer.decode(corpus.test_ids) == text

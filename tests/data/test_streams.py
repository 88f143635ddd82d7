"""Units of text, and tokens that do not depend on how the text was read."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nestlearn.data import Corpus, load_tokenizer, streams, token_units
from nestlearn.data.streams import text_units
from nestlearn.errors import UserError

CODE = "def f(x):\n    return [x, 'it''s']  # done\r\n\n\nclass A:\n\tpass\n" * 30
BYTES = load_tokenizer("bytes")
BPE = load_tokenizer("bpe:400", Corpus("", "", [CODE], []))
# The splitting expression of Llama 3, which keeps punctuation and the line ends after it together.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
texts = st.lists(st.sampled_from(["a", "bc", " ", "  ", "\n", "\r\n", "\t", "1", "'s", "é", "日", ";"])).map("".join)


@pytest.fixture
def small_units(monkeypatch):
    monkeypatch.setattr(streams, "LEAST", 5)
    monkeypatch.setattr(streams, "MOST", 40)


def llama3_like() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([CODE], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def pieces_of(text: str, lengths: list[int]) -> list[str]:
    pieces = []
    for length in lengths:
        pieces.append(text[:length])
        text = text[length:]
    return [*pieces, text]


@pytest.mark.usefixtures("small_units")
def test_units_do_not_depend_on_the_pieces_and_lose_nothing():
    @given(texts, st.lists(st.integers(0, 60)))
    @example("abcdefgh" * 20, [6, 1, 50])
    @example("ab cdefgh\n" * 20, [6, 3, 41])
    def check(text, lengths):
        units = list(text_units([text]))
        assert "".join(units) == text
        assert all(0 < len(unit) <= 40 for unit in units)
        assert list(text_units(pieces_of(text, lengths))) == units

    check()


@pytest.mark.usefixtures("small_units")
def test_units_are_short_where_there_are_words_or_lines():
    units = list(text_units([CODE]))
    assert max(len(unit) for unit in units) < 40
    assert len(units) > len(CODE) / 40


@pytest.mark.parametrize("tokenizer", [BYTES, BPE, llama3_like()], ids=["bytes", "bpe", "llama3"])
def test_tokens_of_units_are_those_of_the_whole(tokenizer, monkeypatch):
    monkeypatch.setattr(streams, "LEAST", 5)
    monkeypatch.setattr(streams, "MOST", 10_000)

    @given(texts)
    def check(text):
        ids = [i for unit in token_units([text], tokenizer) for i in unit.ids.tolist()]
        assert ids == tokenizer.encode(text)

    check()
    assert len(list(token_units([CODE], tokenizer))) > 50  # it was cut


def test_bytes_are_counted_and_eos_stands_between_documents():
    units = list(token_units(["né", iter(["x", "y"])], BPE))
    assert [unit.bytes for unit in units] == [3, 0, 2]
    assert units[1].ids.tolist() == [BPE.eos_token_id]
    assert BPE.decode(np.concatenate([unit.ids for unit in units])) == "né<|endoftext|>xy"


def test_tokenizer_that_merges_across_line_ends_gets_whole_documents(monkeypatch):
    monkeypatch.setattr(streams, "LEAST", 1)
    # One token for "\nb": cutting after the line end would lose it.
    alphabet = sorted({*streams.SAMPLE, "b"})
    vocabulary = {token: i for i, token in enumerate([*alphabet, "\na", "</s>"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("\n", "a")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    (unit,) = token_units([iter(["x\n", "a x"])], tokenizer)
    assert vocabulary["\na"] in unit.ids.tolist()


def test_no_eos_token_is_said():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(UserError, match="no eos token"):
        next(token_units(["a"], tokenizer))

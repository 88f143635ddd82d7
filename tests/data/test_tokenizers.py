"""Tokenizers: exact round trips, and the same after saving and loading with ``AutoTokenizer``."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nestlearn.data import TOKENIZER_KEYWORDS, Corpus, absolute, load_tokenizer
from nestlearn.errors import UserError

TEXT = "the cat sat on the mat; the dog lay on the log.\n<|endoftext|> naïve 日本語\n" * 20
CORPUS = Corpus("test", "", [TEXT, "held in"], ["out"])
BYTES = load_tokenizer("bytes")
BPE = load_tokenizer("bpe:300", CORPUS)


@given(st.text())
def test_bytes_are_the_bytes(text):
    assert BYTES.encode(text) == list(text.encode())


@given(st.one_of(st.text(), st.lists(st.sampled_from(["<|endoftext|>", "<|pad|>", " ,", "'s", "\n "])).map("".join)))
@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_round_trip_of_every_string(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize("tokenizer", [BYTES, BPE], ids=["bytes", "bpe"])
def test_saved_and_loaded_by_auto_tokenizer(tokenizer, tmp_path):
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    tokenizer.save_pretrained(tmp_path)
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(str(tmp_path))):
        assert loaded.encode(TEXT) == tokenizer.encode(TEXT)
        assert loaded.decode(loaded.encode(TEXT)) == TEXT
        assert len(loaded) == len(tokenizer)
        assert loaded.padding_side == "left"
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            assert getattr(loaded, name) == getattr(tokenizer, name)


def test_special_tokens():
    assert len(BYTES) == 258
    assert (BYTES.bos_token_id, BYTES.eos_token_id, BYTES.pad_token_id) == (256, 256, 257)
    batch = BYTES(["a", "abc"], padding=True)
    assert batch["input_ids"] == [[257, 257, 97], [97, 98, 99]]
    assert batch["attention_mask"] == [[0, 0, 1], [1, 1, 1]]
    assert BYTES.decode([97, 256, 98, 257], skip_special_tokens=True) == "ab"


def test_bpe_learns_from_the_training_split_alone():
    assert len(BPE) == 300
    assert len(BPE.encode(TEXT)) < len(TEXT.encode()) / 1.5
    other = Corpus("test", "", CORPUS.train, ["entirely different words " * 50])
    assert load_tokenizer("bpe:300", other).get_vocab() == BPE.get_vocab()


def test_bpe_is_the_same_in_another_process():
    code = (
        "import sys; from nestlearn.data import Corpus, load_tokenizer;"
        "text = sys.stdin.buffer.read().decode();"
        "print(load_tokenizer('bpe:300', Corpus('', '', [text, 'held in'], [])).encode(text))"
    )
    run = subprocess.run([sys.executable, "-c", code], input=TEXT.encode(), capture_output=True, check=True)
    assert run.stdout.decode().strip() == str(BPE.encode(TEXT))


@pytest.mark.parametrize("spec", ["", "byte", "Bytes", "bpe", "bpe:", "bpe:many", "bpe:100", "bpe:-5", "bpe:1000001"])
def test_wrong_specs_are_one_line_that_says_what_is_allowed(spec):
    with pytest.raises(UserError, match=r"bytes|bpe:8192") as error:
        load_tokenizer(spec, CORPUS)
    assert repr(spec) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_vocabulary_of_any_number_of_digits_is_one_line():
    with pytest.raises(UserError, match="258 to 1000000"):
        load_tokenizer("bpe:" + "9" * 5000, CORPUS)


def test_keywords_are_keywords_whatever_the_folder_holds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("bytes", "bpe:300"):
        (tmp_path / name).mkdir()
        assert absolute(name, TOKENIZER_KEYWORDS) == name
    assert len(load_tokenizer("bytes")) == 258
    assert len(load_tokenizer("bpe:300", CORPUS)) == 300
    assert absolute("./bytes", TOKENIZER_KEYWORDS) == str(tmp_path / "bytes")
    with pytest.raises(UserError, match="bytes has no tokenizer"):
        load_tokenizer("./bytes")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[]"),
        ("tokenizer.json", "{"),
        ("tokenizer.json", '"text"'),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "3"),
        ("tokenizer_config.json", '{"eos_token": 5}'),
        ("tokenizer_config.json", '{"tokenizer_class": 5}'),
    ],
)
def test_damaged_folder_is_one_line(tmp_path, file, content):
    BYTES.save_pretrained(tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match="has a damaged tokenizer") as error:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_folder_without_a_tokenizer_and_bpe_without_a_corpus(tmp_path):
    with pytest.raises(UserError, match="has no tokenizer"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(UserError, match="cannot be looked up"):
        load_tokenizer("x" * 300)
    with pytest.raises(UserError, match="trained on a corpus"):
        load_tokenizer("bpe:300")

"""Sources, their splits, and what is said about bad ones."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestlearn.data import SOURCE_KEYWORDS, absolute, load_corpus, stream_documents
from nestlearn.data import text_files as text_files_module
from nestlearn.data.corpus import hold_out
from nestlearn.data.stdlib_corpus import stdlib_documents
from nestlearn.errors import UserError


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_jsonl(path: Path, texts: list[str]) -> Path:
    return write(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))


def streamed(source: Path | str, split: str | None = None) -> tuple[str, list[str]]:
    name, documents = stream_documents(source, split)
    return name, ["".join(document) for document in documents]


def message(source: Path | str) -> str:
    with pytest.raises(UserError) as error:
        load_corpus(source)
    assert "\n" not in str(error.value)
    return str(error.value)


def size(texts: list[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def test_stdlib_holds_out_about_5_percent_of_its_files_and_nothing_is_lost():
    documents = stdlib_documents()
    names = [name for name, _ in documents]
    assert names == sorted(names)
    assert "json/decoder.py" in names
    assert not any("test" in name.split("/")[:-1] or name.startswith("encodings/") for name in names)
    corpus = load_corpus("stdlib")
    assert sorted([*corpus.train, *corpus.validation]) == sorted(text for _, text in documents)
    total = size([text for _, text in documents])
    assert total > 5_000_000
    assert 0.04 < size(list(corpus.validation)) / total <= 0.05
    assert corpus == load_corpus("stdlib")
    assert streamed("stdlib") == ("validation", list(corpus.validation))


@given(st.lists(st.tuples(st.text(max_size=2), st.text(max_size=40)), min_size=2, max_size=30))
def test_hold_out_keeps_every_document_in_order_and_equal_keys_together(rows):
    documents = [(key, f"{i} {text}") for i, (key, text) in enumerate(rows)]
    train, validation = hold_out(documents)
    assert train
    assert validation
    texts = [text for _, text in documents]
    assert train == [text for text in texts if text not in validation]
    assert validation == [text for text in texts if text not in train]
    keys = {key for key, _ in documents}
    if len(keys) > 1:
        assert {k for k, text in documents if text in train}.isdisjoint(
            k for k, text in documents if text in validation
        )


def test_hold_out_does_not_depend_on_the_order_of_the_documents():
    documents = [(f"file{i}", f"text {i} " * (i % 7 + 1)) for i in range(300)]
    train, validation = hold_out(documents)
    assert set(hold_out(documents[::-1])[1]) == set(validation)
    share = size(validation) / size([*train, *validation])
    assert 0.03 < share <= 0.05


def test_copies_of_a_row_stay_on_one_side(tmp_path):
    texts = [f"row {i % 100}" for i in range(300)]
    corpus = load_corpus(write_jsonl(tmp_path / "a.jsonl", texts))
    assert not set(corpus.train) & set(corpus.validation)
    assert len(corpus.train) + len(corpus.validation) == 300


def test_text_file_gives_its_last_lines(tmp_path):
    lines = [f"line {i:04}\n" for i in range(1000)]
    corpus = load_corpus(write(tmp_path / "a.txt", "".join(lines)))
    assert corpus.train == ["".join(lines[:950])]
    assert corpus.validation == ["".join(lines[950:])]


@pytest.mark.parametrize("text", ["word " * 40, "a\n" + "x" * 500, "x" * 500 + "\nb"])
def test_text_file_without_a_good_line_end_is_cut_all_the_same(tmp_path, text):
    corpus = load_corpus(write(tmp_path / "a.txt", text))
    assert "".join([*corpus.train, *corpus.validation]) == text
    assert corpus.train
    assert corpus.validation


def test_text_is_kept_verbatim_but_for_a_byte_order_mark(tmp_path, monkeypatch):
    text = "a\r\nb\rc\n日本語 é \u2028 end" * 20
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbf" + text.encode())
    for piece in (4, 7, 1 << 18):
        monkeypatch.setattr(text_files_module, "PIECE_BYTES", piece)
        assert streamed(path) == ("all", [text])


def test_wikitext_style_folder_keeps_its_splits(tmp_path):
    for split in ("train", "valid", "test"):
        write(tmp_path / f"wiki.{split}.tokens", f" = {split} = \n")
    write(tmp_path / "LICENSE.txt", "not text to learn")
    corpus = load_corpus(tmp_path)
    assert (corpus.train, corpus.validation, corpus.test) == ([" = train = \n"], [" = valid = \n"], [" = test = \n"])
    assert streamed(tmp_path) == ("validation", [" = valid = \n"])
    assert streamed(tmp_path, "test") == ("test", [" = test = \n"])
    assert len(streamed(tmp_path, "all")[1]) == 3


def test_split_folder_without_training_text_can_only_be_evaluated(tmp_path):
    write(tmp_path / "wiki.valid.tokens", "v")
    write(tmp_path / "wiki.test.tokens", "t")
    assert "no train file" in message(tmp_path)
    assert streamed(tmp_path) == ("validation", ["v"])


def test_split_folder_of_rows(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ["a", " ", "b"])
    write_jsonl(tmp_path / "test.jsonl", ["c"])
    corpus = load_corpus(tmp_path)
    assert sorted([*corpus.train, *corpus.validation]) == ["a", "b"]
    assert corpus.test == ["c"]
    write(tmp_path / "train.txt", "again")
    assert "train files in .jsonl and .txt" in message(tmp_path)


def test_folder_reads_text_files_and_skips_hidden_empty_and_binary_ones(tmp_path):
    for i in range(40):
        write(tmp_path / f"sub{i % 3}" / f"{i}.md", f"document {i}")
    write(tmp_path / "picture.png", b"\x89PNG\0\0")
    write(tmp_path / ".hidden" / "a.txt", "secret")
    write(tmp_path / "empty.txt", "")
    write(tmp_path / "blank.txt", b"\xef\xbb\xbf \n\t\xe3\x80\x80\n")
    corpus = load_corpus(tmp_path)
    assert sorted([*corpus.train, *corpus.validation]) == sorted(f"document {i}" for i in range(40))
    assert corpus.description.startswith("40 files, 1 binary files skipped")
    assert sorted(streamed(tmp_path)[1]) == sorted([*corpus.train, *corpus.validation])
    assert streamed(tmp_path, "validation") == ("validation", list(corpus.validation))


def test_the_runs_in_a_folder_are_no_text_of_it(tmp_path):
    write(tmp_path / "notes.txt", "a line\n" * 100)
    write(tmp_path / "more.md", "another\n" * 100)
    before = load_corpus(tmp_path)
    for name in ("run.toml", "metrics.jsonl", "baseline/config.json"):
        write(tmp_path / "runs" / "tiny-1" / name, '{"no": "text"}')
    assert load_corpus(tmp_path) == before
    assert load_corpus(tmp_path / "runs" / "tiny-1" / "baseline").train  # asked for, it is read


def test_folder_of_one_file_is_that_file(tmp_path):
    path = write(tmp_path / "only.txt", "a line\n" * 100)
    assert load_corpus(tmp_path).train == load_corpus(path).train


def test_parquet(tmp_path):
    texts = [f"row {i}" for i in range(60)]
    pq.write_table(pa.table({"text": [*texts, None, " "], "label": list(range(62))}), tmp_path / "a.parquet")
    corpus = load_corpus(tmp_path / "a.parquet")
    assert sorted([*corpus.train, *corpus.validation]) == sorted(texts)
    assert streamed(tmp_path / "a.parquet") == ("all", texts)
    pq.write_table(pa.table({"txt": texts, "label": list(range(60))}), tmp_path / "b.parquet")
    assert message(tmp_path / "b.parquet").endswith(
        "b.parquet has no column 'text', only label, txt: rename txt to 'text'"
    )
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "c.parquet")
    assert "row 1: 'text' is int" in message(tmp_path / "c.parquet")
    raw = (tmp_path / "a.parquet").read_bytes()
    write(tmp_path / "d.parquet", raw[:-20])
    assert "not a parquet file" in message(tmp_path / "d.parquet")


def test_local_folder_through_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    write_jsonl(tmp_path / "set" / "train.jsonl", [f"row {i}" for i in range(50)])
    write_jsonl(tmp_path / "set" / "validation.jsonl", ["held out"])
    corpus = load_corpus(f"hf:{tmp_path / 'set'}")
    assert len(corpus.train) == 50
    assert (tmp_path / "cache").is_dir()
    assert corpus.validation == ["held out"]
    assert streamed(f"hf:{tmp_path / 'set'}") == ("validation", ["held out"])


def test_missing_data_set_is_one_line(monkeypatch):
    import datasets

    def unreachable(*args: object) -> None:
        raise ConnectionError("Couldn't reach it\nat all")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert "without a network" in message("hf:nosuch/dataset:config")


@pytest.mark.parametrize("names", [("dev_guide.txt", "test-plan.txt"), ("train_trip.txt", "valid.md", "a.test2.txt")])
def test_ordinary_names_are_no_splits(tmp_path, names):
    for name in names:
        write(tmp_path / name, name * 9)
    assert sorted(streamed(tmp_path)[1]) == sorted(name * 9 for name in names)


@pytest.mark.parametrize(
    "names",
    [
        ("train.txt", "dev.txt"),
        ("TRAIN.TXT", "val.txt"),
        ("wiki.train.tokens", "wiki.valid.tokens"),
        ("train-00000-of-00002.txt", "validation-00000-of-00001.txt"),
    ],
)
def test_names_of_splits(tmp_path, names):
    for name in (*names, "other.txt"):
        write(tmp_path / name, name)
    corpus = load_corpus(tmp_path)
    assert (corpus.train, corpus.validation) == ([names[0]], [names[1]])


def test_extensions_in_capitals_and_byte_order_mark_of_rows(tmp_path):
    rows = b"\xef\xbb\xbf" + b'{"text": "one"}\n{"text": "two"}\n'
    assert streamed(write(tmp_path / "A.JSONL", rows))[1] == ["one", "two"]
    pq.write_table(pa.table({"text": ["one", "two"]}), tmp_path / "B.PARQUET")
    assert streamed(tmp_path / "B.PARQUET")[1] == ["one", "two"]
    assert streamed(tmp_path)[1] == ["one", "two"] * 2


def test_keywords_are_keywords_whatever_the_folder_holds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "stdlib", "a file\n")
    assert absolute("stdlib", SOURCE_KEYWORDS) == "stdlib"
    assert streamed("stdlib")[0] == "validation"
    assert absolute("./stdlib", SOURCE_KEYWORDS) == str(tmp_path / "stdlib")
    for path in ("./stdlib", Path("stdlib")):
        assert streamed(path) == ("all", ["a file\n"])
        assert load_corpus(path).description.startswith("one file")
    assert absolute("", SOURCE_KEYWORDS) == ""
    assert absolute("nowhere", SOURCE_KEYWORDS) == "nowhere"
    with pytest.raises(UserError, match="does not exist"):
        stream_documents("")


@pytest.mark.parametrize("source", ["~nosuchuser/x", "x" * 300])
def test_names_that_no_path_can_have(source):
    assert "cannot be looked up" in message(source)
    with pytest.raises(UserError, match="cannot be looked up"):
        absolute(source, SOURCE_KEYWORDS)


def test_a_name_that_no_recipe_can_hold():
    with pytest.raises(UserError, match="is not UTF-8: rename it"):
        absolute("bad\udcff.txt", SOURCE_KEYWORDS)


def test_what_may_not_be_read_is_one_line(tmp_path, monkeypatch):
    path = write(tmp_path / "a" / "b.txt", "text")

    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    assert message(tmp_path / "a") == message(path) == f"cannot read {path}: Permission denied"
    monkeypatch.setattr(Path, "iterdir", refuse)
    assert message(tmp_path / "a") == f"cannot read {path.parent}: Permission denied"


def test_missing_and_empty(tmp_path):
    assert "does not exist" in message(tmp_path / "nothing.txt")
    assert "does not exist" in message("")
    assert "names no data set" in message("hf:")
    assert "is empty" in message(write(tmp_path / "a.txt", b""))
    assert "white space" in message(write(tmp_path / "b.txt", b" \n\n"))
    assert "holds no text" in message(write_jsonl(tmp_path / "c.jsonl", ["", " "]))
    (tmp_path / "folder").mkdir()
    assert "no text file" in message(tmp_path / "folder")
    write(tmp_path / "folder" / "blank.txt", " \n")
    assert "no text file" in message(tmp_path / "folder")
    assert "neither a file nor a folder" in message("/dev/null")
    with pytest.raises(UserError, match="did you mean 'validation'"):
        stream_documents("stdlib", "valdation")


@pytest.mark.parametrize("piece", [4, 1 << 18])
@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"caf\xc3\xa9 na\xefve", "bad byte at offset 8"),
        (b"ends in the middle \xe6\x97", "bad byte at offset 19"),
        (b"text and then \0 a zero", "zero byte at offset 14"),
    ],
)
def test_bad_bytes_are_named_by_offset_however_the_file_is_read(tmp_path, monkeypatch, content, said, piece):
    monkeypatch.setattr(text_files_module, "PIECE_BYTES", piece)
    path = write(tmp_path / "a.txt", content)
    assert said in message(path)
    assert str(path) in message(path)


def test_bad_rows_are_named_by_line(tmp_path):
    good = b'{"text": "good"}\n\n'
    assert "line 3 has no field 'text', only body" in message(write(tmp_path / "a.jsonl", good + b'{"body": 1}'))
    assert "line 3 is not JSON" in message(write(tmp_path / "b.jsonl", good + b"{text}"))
    assert "line 3 is not an object" in message(write(tmp_path / "c.jsonl", good + b"[1]"))
    assert "line 3: 'text' is int" in message(write(tmp_path / "d.jsonl", good + b'{"text": 1}'))
    assert "line 3: 'text' holds a lone" in message(write(tmp_path / "f.jsonl", good + b'{"text": "\\ud800"}'))
    number = b'{"text": "", "number": ' + b"9" * 5000 + b"}"
    assert "line 3 has a number too long" in message(write(tmp_path / "g.jsonl", good + number))
    assert "line 3 has a number too long or lists" in message(write(tmp_path / "h.jsonl", good + b"[" * 100_000))
    assert f"offset {len(good) + 1}" in message(write(tmp_path / "e.jsonl", good + b'"\xff"'))


def test_wikitext2(shared_data):
    corpus = load_corpus(shared_data / "wikitext2")
    assert [len(texts) for texts in (corpus.train, corpus.validation, corpus.test)] == [1, 1, 1]
    assert corpus.train[0].startswith(" \n = Valkyria Chronicles III = \n")
    assert len(corpus.validation[0].split()) + corpus.validation[0].count("\n") == 217_646

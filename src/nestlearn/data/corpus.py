"""A corpus: documents to train on and documents held out, from a file, a folder, a data set or the default.

What is held out never depends on chance: a source that names its splits keeps them, one document gives its
last 5 %, and several documents are split by a hash of their name (files) or of their text (rows).
"""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nestlearn.data import text_files
from nestlearn.data.stdlib_corpus import stdlib_documents
from nestlearn.errors import UserError, nearest, require_extra

HELD_OUT_PERCENT = 5
SOURCE_KEYWORDS = ("stdlib", "hf")
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test",),
}
# The whole stem ("train"), the end of it ("wiki.train", as in WikiText and the Penn Treebank), or one of several
# parts ("train-00000-of-00002").
SPLIT_STEM = re.compile(r"(?:.+\.)?([a-z]+)(?:-\d+-of-\d+)?")
SPLIT_SUFFIXES = (".txt", ".tokens", ".raw", ".jsonl", ".parquet")
RECIPE = "run.toml"  # of a folder that `nestlearn train` made: what is in there is no text to learn from
ALLOWED = "'stdlib', a UTF-8 text file, a folder, a .jsonl or .parquet file, or hf:NAME[:CONFIG]"


@dataclass(frozen=True)
class Corpus:
    """Documents by split. ``test`` is empty unless the source names one.

    >>> corpus = load_corpus("stdlib")
    >>> len(corpus.train) > len(corpus.validation) > 0
    True
    """

    name: str
    description: str
    train: Sequence[str]
    validation: Sequence[str]
    test: Sequence[str] = ()


def load_corpus(source: str | Path) -> Corpus:
    """Read a corpus into memory.

    What ``source`` may be:

    - ``"stdlib"``: the Python standard library's sources, a document a file;
    - a text file: one document, the last 5 % of its characters held out, cut at the nearest line end;
    - a ``.jsonl`` or ``.parquet`` file: a document a row (its field ``text``), about 5 % of the bytes held
      out by a hash of the text, so that copies stay on one side;
    - a folder with files named by two splits or more (train, valid or validation or val or dev, test; also
      wiki.train.tokens and train-00000-of-00002.parquet): these are the splits, others are ignored;
    - any other folder: every file in it that is not binary, hidden or blank, about 5 % of the bytes held
      out by a hash of the file name;
    - ``"hf:NAME[:CONFIG]"``: a data set through ``datasets.load_dataset``, a document a row (column
      ``text``).

    ``"stdlib"`` and ``"hf:..."`` are never files, whatever the working folder holds: ``"./stdlib"`` and a
    ``Path`` are. Raises `UserError` for a missing, empty, binary or non-UTF-8 file and for rows without text.
    """
    if is_keyword(source):
        source = str(source)
        if source.startswith("hf:"):
            return _hub_corpus(source)
        train, validation = hold_out(stdlib_documents())
        return _corpus(f"sources of Python {platform.python_version()}", source, train, validation)
    path = _existing(source)
    source = str(source)
    if path.is_file():
        train, validation = hold_out([(text, text) for text in _joined(text_files.read_documents(path))])
        return _corpus("one file", source, train, validation)
    if splits := _split_files(path):
        parts = {name: [text for file in files for text in _read(file)] for name, files in splits.items()}
        if "train" not in parts:
            raise UserError(f"{source} has {' and '.join(parts)} files but no train file: add one")
        if "validation" not in parts:
            parts["train"], parts["validation"] = hold_out([(text, text) for text in parts["train"]])
        used = ", ".join(file.name for files in splits.values() for file in files)
        return _corpus(f"splits from {used}", source, **parts)
    files, skipped = _folder_files(path)
    if len(files) == 1:
        return load_corpus(files[0])
    # One key for the rows of one file: a file stays on one side.
    train, validation = hold_out([(file.relative_to(path).as_posix(), text) for file in files for text in _read(file)])
    note = f", {skipped} binary files skipped" if skipped else ""
    return _corpus(f"{len(files)} files{note}", source, train, validation)


def is_keyword(source: str | Path) -> bool:
    """Whether ``source`` is ``"stdlib"`` or ``"hf:..."`` and not a path."""
    return isinstance(source, str) and (source == "stdlib" or source.startswith("hf:"))


def stream_documents(source: str | Path, split: str | None = None) -> tuple[str, Iterator[str | Iterator[str]]]:
    """``(split, documents)`` for reading once, a text file piece by piece so that it may have any length.

    ``split``: ``"train"``, ``"validation"``, ``"test"`` or ``"all"``. None is the source's own validation (or
    else test) split if it has one, as ``"stdlib"``, data sets and folders with split files do, and everything
    otherwise. Raises what `load_corpus` raises, some of it only while the documents are read.

    >>> split, documents = stream_documents("stdlib"); split
    'validation'
    """
    if split not in (None, "all", *SPLITS):
        raise UserError(f"unknown split {split!r}: {nearest(str(split), ['all', *SPLITS])}")
    if not is_keyword(source):
        path = _existing(source)
        named = _split_files(path) if path.is_dir() else {}
        if named:
            split = split or ("validation" if "validation" in named else "test")
            wanted = list(named) if split == "all" else [split]
            if any(name in named for name in wanted):
                files = [file for name in wanted for file in named.get(name, [])]
                return split, (document for file in files for document in text_files.read_documents(file))
        elif split in (None, "all"):
            files = _folder_files(path)[0] if path.is_dir() else [path]
            return "all", (document for file in files for document in text_files.read_documents(file))
    corpus = load_corpus(source)
    split = split or ("validation" if corpus.validation else "test")
    if split == "all":
        return split, iter([*corpus.train, *corpus.validation, *corpus.test])
    documents = getattr(corpus, split)
    if not documents:
        raise UserError(f"{source} has no {split} documents: choose another split")
    return split, iter(documents)


def hold_out(documents: Sequence[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Split ``(key, text)`` pairs into training and validation texts, each in the given order.

    In the order of the keys' SHA-256, documents move to the validation side as long as they fit into 5 % of
    the bytes; equal keys move together; the smallest moves if none fits. One document is cut at a line end.
    """
    if len(documents) == 1:
        return _cut(documents[0][1])
    sizes: dict[str, int] = {}
    for key, text in documents:
        sizes[key] = sizes.get(key, 0) + len(text.encode("utf-8"))
    if len(sizes) < 2:  # copies of one document, or the rows of one file: cut between them
        count = max(1, len(documents) * HELD_OUT_PERCENT // 100)
        texts = [text for _, text in documents]
        return texts[:-count], texts[-count:]
    room = sum(sizes.values()) * HELD_OUT_PERCENT // 100
    held: set[str] = set()
    for key in sorted(sizes, key=lambda key: hashlib.sha256(key.encode("utf-8")).digest()):
        if sizes[key] <= room:
            held.add(key)
            room -= sizes[key]
    held = held or {min(sizes, key=lambda key: (sizes[key], key))}
    return [t for k, t in documents if k not in held], [t for k, t in documents if k in held]


def _cut(text: str) -> tuple[list[str], list[str]]:
    """The text up to the line end nearest to 95 % of it, and the rest."""
    goal = len(text) * (100 - HELD_OUT_PERCENT) // 100
    ends = (text.rfind("\n", 0, goal) + 1, text.find("\n", goal) + 1)
    cut = min((end for end in ends if 0 < end < len(text)), key=lambda end: abs(end - goal), default=goal)
    train, validation = text[:cut], text[cut:]
    return [train] if train.strip() else [], [validation] if validation.strip() else []


def _corpus(what: str, name: str, train: Sequence[str], validation: Sequence[str], test: Sequence[str] = ()) -> Corpus:
    parts = {"train": train, "validation": validation, "test": test}
    if not any(parts.values()):
        raise UserError(f"{name} holds no text: give {ALLOWED}")
    sizes = [
        f"{len(texts):,} documents, {sum(len(text.encode('utf-8')) for text in texts):,} bytes to {split}"
        for split, texts in parts.items()
        if texts
    ]
    return Corpus(name, f"{what}: {'; '.join(sizes)}", train, validation, test)


def _joined(documents: Iterable[Iterable[str]]) -> list[str]:
    return ["".join(document) for document in documents]


def _read(path: Path) -> list[str]:
    return _joined(text_files.read_documents(path))


def _existing(source: str | Path) -> Path:
    path = text_files.find_path(source, "data")
    if source == "" or not (path.is_file() or path.is_dir()):
        what = "is neither a file nor a folder" if source != "" and path.exists() else "does not exist"
        raise UserError(f"data {str(source)!r} {what}: give {ALLOWED}")
    return path


def _split_files(folder: Path) -> dict[str, list[Path]]:
    """Files by split (``wiki.valid.tokens``), if the folder holds files of two splits or more."""
    found: dict[str, list[Path]] = {}
    with text_files.readable(folder):
        for path in sorted(folder.iterdir()):
            stem = SPLIT_STEM.fullmatch(path.stem.lower())
            names = [split for split, spellings in SPLITS.items() if stem and stem[1] in spellings]
            if names and path.suffix.lower() in SPLIT_SUFFIXES and path.is_file():
                found.setdefault(names[0], []).append(path)
    for split, files in found.items():
        formats = sorted({file.suffix.lower() for file in files})
        if len(found) > 1 and len(formats) > 1:
            raise UserError(f"{folder} has {split} files in {' and '.join(formats)}: leave one format")
    return {split: found[split] for split in SPLITS if split in found} if len(found) > 1 else {}


def _folder_files(folder: Path) -> tuple[list[Path], int]:
    """The files below a folder, by name, without hidden, blank and binary ones and those of runs; and how many were
    binary."""
    files: list[Path] = []
    skipped = 0
    with text_files.readable(folder):
        paths = sorted(folder.rglob("*"), key=lambda path: path.relative_to(folder).as_posix())
        runs = {path.parent for path in paths if path.name == RECIPE} - {folder}
        for path in paths:
            hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
            if hidden or not runs.isdisjoint(path.parents) or not path.is_file() or path.stat().st_size == 0:
                continue
            if path.suffix.lower() != ".parquet" and text_files.is_binary(path):
                skipped += 1
            elif not text_files.is_blank(path):
                files.append(path)
    if not files:
        raise UserError(f"{folder} holds no text file ({skipped} binary): give {ALLOWED}")
    return files, skipped


def _hub_corpus(source: str) -> Corpus:
    datasets = require_extra("datasets", "hf:NAME")
    name, _, config = source.removeprefix("hf:").partition(":")
    if not name:
        raise UserError(f"{source!r} names no data set: write hf:NAME[:CONFIG]")
    try:
        loaded = datasets.load_dataset(name, config or None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot load {source} (without a network only a local folder or a cached one works): {reason}"
        ) from None
    parts: dict[str, list[str]] = {}
    for split, spellings in SPLITS.items():
        for spelling in set(spellings) & set(loaded):
            text_files.require_column(loaded[spelling].column_names, f"{source} ({spelling})", "column")
            rows = (text_files.require_text(text, source) for text in loaded[spelling][text_files.COLUMN])
            parts[split] = [text for text in rows if text.strip()]
    if "train" not in parts:
        raise UserError(f"{source} has no split 'train': it has {', '.join(loaded)}")
    if "validation" not in parts:
        parts["train"], parts["validation"] = hold_out([(text, text) for text in parts["train"]])
    return _corpus("data set", source, **parts)

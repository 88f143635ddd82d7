"""One file on disk as documents of text, read lazily, with an error that names the file and the place.

A text file is one document; so is a line of a ``.jsonl`` (field ``text``) and a row of a ``.parquet`` (column
``text``). A document is an iterator of pieces, so that a text file of any length can pass through.
"""

from __future__ import annotations

import codecs
import difflib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nestlearn.errors import UserError, require_extra

PIECE_BYTES = 1 << 18
COLUMN = "text"


def read_documents(path: Path) -> Iterator[Iterator[str]]:
    """The documents of one file, each an iterator of text pieces. Blank documents are left out.

    Raises `UserError` while it is read: for an empty, binary or non-UTF-8 file (with the byte offset), a line
    without ``text`` (with its number), a table without that column (with those it has).

    >>> import tempfile; path = Path(tempfile.mkdtemp(), "a.jsonl"); _ = path.write_text('{"text": "one"}\\n')
    >>> ["".join(document) for document in read_documents(path)]
    ['one']
    """
    with readable(path):
        if path.stat().st_size == 0:
            raise UserError(f"{path} is empty: give a file that holds text")
        if path.suffix.lower() == ".jsonl":
            yield from (iter((text,)) for text in _jsonl(path) if text.strip())
        elif path.suffix.lower() == ".parquet":
            yield from (iter((text,)) for text in _parquet(path) if text.strip())
        else:
            path.open("rb").close()  # what cannot be opened is said here
            yield _pieces(path)


def read_text(path: Path) -> str:
    """All documents of one file as one text, an empty line between two. Raises as `read_documents` does."""
    return "\n\n".join("".join(document) for document in read_documents(path))


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What the system says against reading ``path``, or something in it, as one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path}: {error.strerror or error}") from None


def find_path(name: str | Path, what: str) -> Path:
    """``name`` as a path with ``~`` expanded, which need not exist.

    Raises `UserError`, which calls it ``what``, for a name that no path can have.
    """
    try:
        path = Path(name).expanduser()
        path.exists()
    except (OSError, RuntimeError) as error:  # too long, not permitted; the home of a user that does not exist
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{what} {str(name)!r} cannot be looked up: {reason}") from None
    return path


def absolute(name: str, keywords: Iterable[str]) -> str:
    """``name`` made absolute if it is an existing path; unchanged if it is empty or one of ``keywords`` (up to its
    colon), even if the working folder has a file of that name."""
    if not name or name.partition(":")[0] in keywords:
        return name
    if is_undecoded(name):
        raise UserError(f"the name {name!r} is not UTF-8: rename it")
    path = find_path(name, "path")
    return str(path.resolve()) if path.exists() else name


def is_undecoded(text: str) -> bool:
    """Whether Python has put lone surrogates for bytes that are not UTF-8, as in names and on the command line."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def is_blank(path: Path) -> bool:
    """Whether a file holds nothing but white space; other files are read up to their first text."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return not any(piece.strip() for piece in iter(lambda: file.read(PIECE_BYTES), ""))


def is_binary(path: Path) -> bool:
    """Whether the first 8,192 bytes hold a zero byte, which no text does (the rule of git and grep)."""
    with path.open("rb") as file:
        return b"\0" in file.read(8192)


def _pieces(path: Path) -> Iterator[str]:
    """The text of a file, verbatim but for a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0  # of the first byte that the decoder has not been given
    blank = True
    with path.open("rb") as file:
        while True:
            raw = file.read(PIECE_BYTES)
            zero = raw.find(b"\0")
            if zero >= 0:
                raise UserError(f"{path} is binary (a zero byte at offset {offset + zero}): give UTF-8 text")
            held = len(decoder.getstate()[0])
            try:
                text = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError as error:
                raise UserError(_not_utf8(path, offset - held + error.start)) from None
            if offset == 0:
                text = text.removeprefix("\ufeff")
            offset += len(raw)
            blank = blank and not text.strip()
            if text:
                yield text
            if not raw:
                break
    if blank:
        raise UserError(f"{path} holds nothing but white space: give a file that holds text")


def _not_utf8(path: Path, offset: int) -> str:
    return f"{path} is not UTF-8 (bad byte at offset {offset}): convert it to UTF-8"


def _jsonl(path: Path) -> Iterator[str]:
    offset = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                text = raw.decode("utf-8")
                line = (text.removeprefix("\ufeff") if number == 1 else text).strip()
                row = json.loads(line) if line else {COLUMN: ""}
            except UnicodeDecodeError as error:
                raise UserError(_not_utf8(path, offset + error.start)) from None
            except json.JSONDecodeError as error:
                raise UserError(f"{path} line {number} is not JSON: {error.msg} at column {error.colno}") from None
            except (ValueError, RecursionError):  # Python's own limits
                raise UserError(
                    f"{path} line {number} has a number too long or lists nested too deep to read: shorten it"
                ) from None
            offset += len(raw)
            if not isinstance(row, dict):
                raise UserError(f"{path} line {number} is not an object: give lines like {{'{COLUMN}': '...'}}")
            require_column(row, f"{path} line {number}", "field")
            yield require_text(row[COLUMN], f"{path} line {number}")


def _parquet(path: Path) -> Iterator[str]:
    parquet = require_extra("pyarrow.parquet", "reading .parquet")
    try:
        table = parquet.ParquetFile(path)
    except ValueError:  # pyarrow.ArrowInvalid
        raise UserError(f"{path} is not a parquet file, or a damaged one: write it again") from None
    with table:
        require_column(table.schema_arrow.names, str(path), "column")
        row = 0
        for batch in table.iter_batches(columns=[COLUMN]):
            for value in batch.column(0).to_pylist():
                row += 1
                yield require_text(value, f"{path} row {row}")


def require_column(names: Iterable[str], where: str, kind: str) -> None:
    """Raises `UserError` with the nearest name if ``text`` is not among ``names``."""
    columns = sorted(str(name) for name in names)
    if COLUMN not in columns:
        close = difflib.get_close_matches(COLUMN, columns, n=1) or ["one of them"]
        only = f", only {', '.join(columns)}: rename {close[0]} to '{COLUMN}'" if columns else ""
        raise UserError(f"{where} has no {kind} '{COLUMN}'{only}")


def require_text(value: Any, where: str) -> str:
    """``value`` if it is a string that UTF-8 can hold (a missing one counts as blank), else `UserError`."""
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: '{COLUMN}' is {type(value).__name__}, not a string")
    text = value or ""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        raise UserError(f"{where}: '{COLUMN}' holds a lone surrogate, which is no character: remove it") from None
    return text

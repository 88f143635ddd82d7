"""The corpus that is always there: the Python standard library's sources, as this interpreter has them."""

from __future__ import annotations

import sysconfig
from pathlib import Path

from nestlearn.errors import UserError

# Folders left out wherever they are: installed packages, tests, and caches.
FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "ctypes_test"}
# Left out at the top: generated tables (codecs, help topics, HTML entities), and files that describe this
# machine's build rather than the language.
GENERATED = ("encodings/", "pydoc_data/", "html/entities.py", "config-", "_sysconfigdata", "sitecustomize.py")


def stdlib_documents() -> list[tuple[str, str]]:
    """(relative name, source) of every module of the standard library, ordered by name.

    Left out by rule: tests, installed packages, generated tables, links, and files that are not UTF-8. So
    the text depends on the Python version and on which optional modules the system ships. Raises
    `UserError` if the interpreter was installed without sources.

    >>> "json/decoder.py" in dict(stdlib_documents())
    True
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        if FOLDERS.intersection(name.split("/")[:-1]) or name.startswith(GENERATED) or path.is_symlink():
            continue
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            documents.append((name, text))
    if not documents:
        raise UserError("this Python has no standard library sources: give --data a text file or a folder")
    return sorted(documents)

"""The folder of real data that is given by ``--data`` or ``NESTLEARN_DATA``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def lacking(data: str | None, files: Sequence[str]) -> str | None:
    """Why rows that need ``files`` of the folder ``data`` cannot be run, in one line; ``None`` if all are there.

    >>> lacking(None, ["wikitext2"])
    'no data was given: --data DIR with wikitext2'
    """
    absent = [name for name in files if data is None or not (Path(data) / name).exists()]
    if not absent:
        return None
    what = "no data was given: --data DIR" if data is None else "the data folder must be one"
    return f"{what} with {', '.join(absent)}"

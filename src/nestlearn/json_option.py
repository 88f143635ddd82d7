"""``--json``, the same option of every command."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def print_json(value: Mapping[str, Any]) -> None:
    """One object on a line. Raises ``ValueError`` for NaN and infinity, which JSON lacks.

    >>> print_json({"tokens": 3})
    {"tokens": 3}
    """
    print(json.dumps(value, allow_nan=False))

"""What a user did wrong, in one line: what was given, what is allowed, what to do."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """A mistake of the caller. Its message is one line; the command line prints it and exits with code 2."""


def nearest(name: str, options: Iterable[str]) -> str:
    """The clause that ends a message about an unknown ``name``: the closest option, then all of them.

    >>> nearest("hopp", ["hope", "attention"])
    "did you mean 'hope'? (allowed: attention, hope)"
    """
    choices = sorted(options)
    close = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    allowed = f"allowed: {', '.join(choices)}"
    return f"did you mean '{close[0]}'? ({allowed})" if close else allowed


def require_extra(module: str, purpose: str) -> Any:
    """Import a module of the extra ``train``, or say which extra to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        package = module.partition(".")[0]
        raise UserError(f"{purpose} needs {package}: pip install 'nestlearn[train]'") from None

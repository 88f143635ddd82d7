"""What a user did wrong, in one line: what was given, what is allowed, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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

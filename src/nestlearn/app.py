"""`App`: a Typer application whose mistakes are told in the words of the command line."""

from __future__ import annotations

import re
import typing
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand

from nestlearn.errors import UserError

# What the library calls otherwise than the option that sets it.
OPTION_OF = {"period": "periods", "strength": "keep_strength"}


class _Command(TyperCommand):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse an empty path, as a variable of a shell that is not set leaves it: Python reads it as this folder."""
        assert self.callback is not None
        hints = typing.get_type_hints(self.callback)
        paths = {opt for param in self.params for opt in param.opts if Path in _types(hints.get(param.name or ""))}
        for before, word in pairwise(["", *args]):
            option = before if word == "" else word.removesuffix("=")
            if option in paths and option != word:
                raise UserError(f"{option} is empty: give a path, as . for this folder")
            if word == "" and not before.startswith("-"):
                raise UserError("an argument is empty: give a name or a path, as . for this folder, or leave it out")
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        options = {param.name: param.opts[0] for param in self.params if param.name and param.opts[0].startswith("--")}
        try:
            return super().invoke(ctx)
        except UserError as error:
            raise UserError(in_options(str(error), options)) from error


class App(typer.Typer):
    """Typer, but its commands refuse an empty path and speak of options where the library speaks of arguments."""

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        return super().command(name, cls=_Command, **settings)


def in_options(message: str, options: dict[str, str]) -> str:
    """A message of the library with ``--an-option value`` in place of ``an_option=value``.

    >>> in_options("autosave=0: give 1 or more", {"autosave": "--autosave"})
    '--autosave 0: give 1 or more'
    >>> in_options("give more layers or kind='split'", {"kind": "--kind"})
    'give more layers or --kind split'
    """

    def said(match: re.Match[str]) -> str:
        option = options.get(match[1]) or options.get(OPTION_OF.get(match[1], ""))
        return match[0] if option is None else f"{option} {match[2] or ''}"

    return re.sub(r"(?<![\w./-])([a-z]\w*)=(?:'(\w+)')?", said, message)  # not inside of a path


def _types(hint: Any) -> tuple[Any, ...]:
    """A type, or those of a union."""
    return typing.get_args(hint) or (hint,)

"""The command line. Each command stands in the package of its work, with heavy imports inside, so that ``--help`` and a
mistyped option answer at once."""

from __future__ import annotations

import io
import os
import sys
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer

from nestlearn.app import App
from nestlearn.convert import commands as conversion
from nestlearn.errors import UserError
from nestlearn.learner import commands as learning
from nestlearn.learner.store.commands import app as memory
from nestlearn.tasks import commands as tasks
from nestlearn.train import commands as training

# Typer re-exports this subclass of its UsageError, whose module has moved between versions.
ClickException: type[Exception] = typer.BadParameter.__mro__[2]

app = App(
    name="nestlearn",
    help="Train and use models that keep learning.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(memory, name="memory")


def _print_version(asked: bool) -> None:
    if asked:
        print(f"nestlearn {version('nestlearn')}")
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Train and use language models after Nested Learning."""


app.command()(training.train)
app.command(name="eval")(training.evaluate)
app.command()(training.generate)
app.command()(training.levels)
app.command()(tasks.bench)
app.command()(conversion.pull)
app.command()(conversion.convert)
app.command()(learning.learn)
app.command()(learning.chat)


def main() -> None:
    """The console entry: a user's mistake is one line on stderr and exit code 2, Ctrl-C is exit code 130.

    A reader that closes the pipe ends the program without a word.
    """
    _prepare_output()
    try:
        code = app(prog_name="nestlearn", standalone_mode=False)
        if code == 130:  # what Typer makes of Ctrl-C
            raise KeyboardInterrupt
        sys.stdout.flush()
    except UserError as error:
        _fail(str(error))
    except ClickException as error:  # an unknown command or option, a missing or wrong argument
        message = " ".join(error.format_message().split())  # pyrefly: ignore[missing-attribute]
        if message:
            _fail(message)
        sys.exit(2)  # without any argument the help has been printed
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        _discard_output()
        sys.exit(141)  # 128 + SIGPIPE
    except OSError as error:
        _fail(f"{error.filename or 'cannot write the output'}: {error.strerror or error}")
    sys.exit(code if isinstance(code, int) else 0)


def _prepare_output() -> None:
    """Streams that take any character, and that are there even if the caller has closed them."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _discard_output() -> None:
    """Drop what standard output cannot take; Python would try once more at exit and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    _discard_output()
    sys.exit(2)


if __name__ == "__main__":
    main()

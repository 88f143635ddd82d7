"""What every command refuses, and mistakes in the words of the command line."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from nestlearn.app import in_options
from nestlearn.cli import app
from nestlearn.errors import UserError


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("top_p=2.0: give a share", "--top-p 2.0: give a share"),
        ("give more layers or kind='split'", "give more layers or --kind split"),
        ("a prompt of 9 tokens with top_p=0.5 takes", "a prompt of 9 tokens with --top-p 0.5 takes"),
        ("period=0 of a level: give 1 or more", "--periods 0 of a level: give 1 or more"),
        ("window=0: give 1 or more", "window=0: give 1 or more"),  # which is no option of the command
        ("no file 'a/top_p=1', 'x.top_p=1', 'x-top_p=1'", "no file 'a/top_p=1', 'x.top_p=1', 'x-top_p=1'"),
    ],
)
def test_an_argument_is_told_as_the_option_that_sets_it(message: str, said: str) -> None:
    assert in_options(message, {"top_p": "--top-p", "kind": "--kind", "periods": "--periods"}) == said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["learn", "model", "--store", "", "a.txt"], "--store is empty: give a path"),
        (["learn", "model", "--store=", "a.txt"], "--store is empty: give a path"),
        (["learn", "model", "--store", "memory", "a.txt", "--probe", ""], "--probe is empty: give a path"),
        (["learn", "model", "--store", "memory", ""], "an argument is empty"),
        (["chat", "", "--store", "memory"], "an argument is empty"),
        (["convert", "model", "--out", ""], "--out is empty: give a path"),
        (["pull", "smollm2", "--to", ""], "--to is empty: give a path"),
        (["train", "--config", ""], "--config is empty: give a path"),
        (["train", "--preset", "tiny", "--out", ""], "--out is empty: give a path"),
        (["eval", "--suite", "core", "--out", ""], "--out is empty: give a path"),
        (["levels", "tiny", "--picture", ""], "--picture is empty: give a path"),
        (["memory", "gc", ""], "an argument is empty"),
    ],
)
def test_an_empty_path_is_not_this_folder(words: list[str], message: str) -> None:
    failed = CliRunner().invoke(app, words).exception
    assert isinstance(failed, UserError)
    assert message in str(failed)

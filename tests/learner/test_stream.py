"""The windows of a text do not depend on the pieces it comes in, nor on how often its reading was cut off."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from nestlearn.errors import UserError
from nestlearn.learner.stream import Windows, opening


def cut(text: str, sizes: list[int]) -> Iterator[str]:
    start = 0
    for size in sizes:
        yield text[start : start + size]
        start += size
    yield text[start:]


@given(st.text(max_size=200), st.lists(st.integers(0, 40)), st.integers(1, 50))
def test_pieces_of_any_size_give_the_same_windows(
    tokenizer: PreTrainedTokenizerBase, text: str, sizes: list[int], window: int
) -> None:
    whole = list(Windows(text, tokenizer, window))
    pieces = list(Windows(cut(text, sizes), tokenizer, window))
    assert [w.tolist() for w in pieces] == [w.tolist() for w in whole]
    assert [i for w in whole for i in w.tolist()] == list(text.encode())
    assert all(len(w) == window for w in whole[:-1])


@given(st.text(min_size=1, max_size=200), st.integers(1, 50), st.integers(0, 10))
def test_a_reading_that_was_cut_off_goes_on_at_the_exact_token(
    tokenizer: PreTrainedTokenizerBase, text: str, window: int, stop: int
) -> None:
    first = Windows(text, tokenizer, window)
    seen = list(islice(first, stop))
    again = Windows(text, tokenizer, window, "text", first.position)
    rest = list(again)
    assert torch.cat([*seen, *rest]).tolist() == list(text.encode())
    assert again.position == end_of(text, tokenizer, window)


def end_of(text: str, tokenizer: PreTrainedTokenizerBase, window: int) -> object:
    windows = Windows(text, tokenizer, window)
    for _ in windows:
        pass
    return windows.position


@pytest.mark.parametrize("changed", ["Another text", "shrt"])
def test_a_source_that_has_changed_is_refused_by_name(tokenizer: PreTrainedTokenizerBase, changed: str) -> None:
    windows = Windows("Some text to read", tokenizer, 4)
    assert len(list(islice(windows, 2))) == 2
    with pytest.raises(UserError, match=r"^notes.txt has changed since it was read: .*--again$"):
        list(Windows(changed, tokenizer, 4, "notes.txt", windows.position))


@pytest.mark.parametrize("text", [b"bytes", [b"bytes"], [[b"bytes"]], 3, [3], ["a", 3], [["a"], "b"]])
def test_what_is_no_text_is_said(tokenizer: PreTrainedTokenizerBase, text: object) -> None:
    with pytest.raises(UserError, match="give"):
        list(Windows(text, tokenizer, 4))  # type: ignore[arg-type]


def test_what_a_tokenizer_puts_before_every_text(tokenizer: PreTrainedTokenizerBase) -> None:
    assert opening(tokenizer) == []
    llama = copy.deepcopy(tokenizer)
    llama.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    assert opening(llama) == [256]

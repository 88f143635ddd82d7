"""Text of any length as tokens, with constant memory and without the cut depending on how it was read.

A document is cut into units of 4,096 characters or a little more, counted from its start: a unit ends at
the first place where a word is followed by a single line end (after it) or by a space (before it).
Byte-level tokenizers (ours, those of GPT-2, Llama 3 and SmolLM) give the same tokens for the units as for
the whole, because their own splitting into words cuts there, too. Only where no such place comes in 16,384
characters is a word cut. A tokenizer that cuts elsewhere is found out by trying it and gets whole documents
instead.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from nestlearn.errors import UserError

LEAST, MOST = 4096, 16384
CUT = re.compile(r"(?<=\S)(?:\n(?=\S)|(?= ))")
SAMPLE = "One line.\nand  another\n\nx = [1, 2];\r\n(2)\n'quoted' it's \n\t# end\nof it"


class TokenUnit(NamedTuple):
    """Some tokens (int32) and the UTF-8 bytes they stand for; a separator stands for none."""

    ids: np.ndarray
    bytes: int


def token_units(documents: Iterable[str | Iterable[str]], tokenizer: PreTrainedTokenizerBase) -> Iterator[TokenUnit]:
    """The tokens of documents (strings, or iterators of pieces) with one eos token between any two of them.

    No special token is added otherwise. Raises `UserError` if the tokenizer has no eos token.

    >>> from nestlearn.data import load_tokenizer
    >>> [unit.ids.tolist() for unit in token_units(["ab", "c"], load_tokenizer("bytes"))]
    [[97, 98], [256], [99]]
    """
    separator = tokenizer.eos_token_id
    if separator is None:
        raise UserError("the tokenizer has no eos token to put between documents: set its eos_token")
    clean = _splits_at_cuts(tokenizer)
    first = True
    for document in documents:
        if not first:
            yield TokenUnit(np.array([separator], np.int32), 0)
        first = False
        pieces = (document,) if isinstance(document, str) else document
        for text in text_units(pieces) if clean else ("".join(pieces),):
            yield TokenUnit(np.array(_encode(tokenizer, text), np.int32), len(text.encode("utf-8")))


def text_units(pieces: Iterable[str]) -> Iterator[str]:
    """Join pieces and cut them into units that depend on the text alone, not on the pieces.

    >>> list(text_units(["a b", "c\\nd"]))
    ['a bc\\nd']
    """
    buffer = ""
    for piece in pieces:
        buffer += piece
        start = 0
        while len(buffer) - start > MOST:  # then a cut needs no character that is not there yet
            end = _unit_end(buffer, start)
            yield buffer[start:end]
            start = end
        buffer = buffer[start:]
    start = 0
    while start < len(buffer):
        end = _unit_end(buffer, start)
        yield buffer[start:end]
        start = end


def _unit_end(buffer: str, start: int) -> int:
    """Where the unit from ``start`` ends, in a buffer that holds more than ``MOST`` from there, or all."""
    found = CUT.search(buffer, start + LEAST, start + MOST + 1)
    return found.end() if found else min(start + MOST, len(buffer))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _splits_at_cuts(tokenizer: PreTrainedTokenizerBase) -> bool:
    ends = [0, *(match.end() for match in CUT.finditer(SAMPLE)), len(SAMPLE)]
    parts = [SAMPLE[start:end] for start, end in pairwise(ends)]
    return _encode(tokenizer, SAMPLE) == [i for part in parts for i in _encode(tokenizer, part)]

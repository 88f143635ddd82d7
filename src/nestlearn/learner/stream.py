"""Text as windows of tokens: the same windows whatever the pieces it comes in, and in constant memory.

`nestlearn.data.streams` cuts a text at places that depend on the text alone and joins documents with the tokenizer's
end-of-text token; here the tokens become windows, counted from the start of the text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nestlearn.data.streams import token_units
from nestlearn.errors import UserError
from nestlearn.learner.state import Source

Text = str | Iterable[str] | Iterable[Iterable[str]]
"""One document: a string, or an iterable of pieces, which are joined without anything between; or several documents: an
iterable of iterables of pieces."""


def documents(text: Text) -> Iterator[Iterator[str]]:
    """The documents of a text, each as its pieces.

    Raises `UserError` for anything that is not text, while it is iterated.

    >>> [list(document) for document in documents(["a", "b"])]
    [['a', 'b']]
    >>> [list(document) for document in documents([["a"], ["b"]])]
    [['a'], ['b']]
    """
    if isinstance(text, str):
        yield iter((text,))
        return
    items = _items(text)
    first = next(items, None)
    if first is None:
        return
    if isinstance(first, str):
        yield _pieces(chain((first,), items))
    else:
        yield from (_pieces(_items(document)) for document in chain((first,), items))


def _items(text: object) -> Iterator[Any]:
    if isinstance(text, (str, bytes)) or not isinstance(text, Iterable):
        raise UserError(f"cannot read a {type(text).__name__}: give text, or an iterable of pieces of text")
    return iter(text)


def _pieces(items: Iterator[Any]) -> Iterator[str]:
    for item in items:
        if not isinstance(item, str):
            raise UserError(f"a piece of text is a {type(item).__name__}: give strings")
        yield item


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text, as Llama's and Gemma's do, whose models need it; often nothing."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    length = len(full) - len(plain)
    for start in range(length + 1):
        if full[start : start + len(plain)] == plain:
            return list(full[:start])
    return []


class Windows:
    """The windows of a text, (n,) int64 with n = ``size`` but for the last one, and how far they have come.

    Args:
        text: one document or several, between which one end-of-text token stands.
        size: tokens of a window.
        name: of the source, for what is said about it.
        read: how far an earlier read of the source came. That much is passed over, and compared.

    Raises:
        UserError: while it is iterated: the text is not the one that was read before, or is no text.

    >>> from nestlearn.data import load_tokenizer
    >>> [window.tolist() for window in Windows([["ab"], ["c"]], load_tokenizer("bytes"), 3)]
    [[97, 98, 256], [99]]
    """

    def __init__(
        self,
        text: Text,
        tokenizer: PreTrainedTokenizerBase,
        size: int,
        name: str | None = None,
        read: Source | None = None,
    ) -> None:
        self.text, self.tokenizer, self.size = text, tokenizer, size
        self.name, self.read = name, read
        self.tokens = 0
        self.digest = hashlib.sha256()

    @property
    def position(self) -> Source:
        """How far the windows given out so far have come."""
        return Source(self.tokens, self.digest.hexdigest(), False)

    def __iter__(self) -> Iterator[Tensor]:
        held: list[np.ndarray] = []
        count = 0
        before = 0 if self.read is None else self.read.tokens
        for unit in token_units(documents(self.text), self.tokenizer):
            ids = unit.ids
            if self.tokens < before:
                passed, ids = np.split(ids, [before - self.tokens])
                self._take(passed)
                if self.tokens == before:
                    self._compare()
            held.append(ids)
            count += len(ids)
            if count >= self.size:
                joined = np.concatenate(held)
                whole = count // self.size * self.size
                for start in range(0, whole, self.size):
                    yield self._take(joined[start : start + self.size])
                held, count = [joined[whole:]], count - whole
        if self.tokens < before:
            self._changed(f"it has {self.tokens:,} tokens, of which {before:,} were read")
        if count:
            yield self._take(np.concatenate(held))

    def _take(self, ids: np.ndarray) -> Tensor:
        self.digest.update(np.ascontiguousarray(ids, dtype="<i4").tobytes())
        self.tokens += len(ids)
        return torch.from_numpy(ids.astype(np.int64))

    def _compare(self) -> None:
        assert self.read is not None
        if self.digest.hexdigest() != self.read.sha256:
            self._changed(f"its first {self.read.tokens:,} tokens are others")

    def _changed(self, how: str) -> None:
        raise UserError(f"{self.name} has changed since it was read: {how}; restore it, or read it anew with --again")

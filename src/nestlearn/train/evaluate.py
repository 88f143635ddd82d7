"""Perplexity and bits per byte of text, in windows of a stated length or in one pass that carries its state.

Both modes read the same stream: a start token (bos, or eos if the tokenizer has no bos), then the documents
with eos between any two. Every token but the start token is scored exactly once, so the two numbers

    perplexity = exp(nats / tokens)        bits per byte = nats / ln 2 / UTF-8 bytes of the text

speak of the whole text. Bits per byte compare models with different tokenizers, perplexities do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestlearn.data.streams import token_units
from nestlearn.errors import UserError
from nestlearn.models.hope.configuration_hope import BLOCK_TYPES, GROWING
from nestlearn.train.positions import check_positions


class NotFinite(UserError):
    """A loss, a gradient or a weight is NaN or infinite, or so large that nothing can be computed with it.

    ``step``: of the training in which it became so, which ends the message; None outside of one.
    """

    def __init__(self, message: str, step: int | None = None) -> None:
        super().__init__(message if step is None else f"{message} at step {step}")
        self.step = step


class Window(NamedTuple):
    """Tokens from position ``start`` of the stream on, of which the first ``known`` are not scored."""

    ids: np.ndarray
    known: int
    start: int


class _Counts:
    def __init__(self) -> None:
        self.tokens = 0
        self.bytes = 0


def evaluate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str | Iterable[str]],
    *,
    context_length: int,
    stride: int | None = None,
    carry_state: bool = False,
    batch_size: int = 8,
    max_tokens: int | None = None,
) -> dict[str, Any]:
    """Score ``documents`` (strings, or iterators of pieces, as `nestlearn.data.stream_documents` gives them).

    Without ``carry_state``: windows of ``context_length`` input tokens (and as many targets, each one token
    later) begin every ``stride`` tokens (default: ``context_length``, so that windows do not overlap), and
    each scores its last ``stride`` targets, the first one all of them. This is the sliding window of
    Hugging Face's guide to perplexity with ``max_length = context_length + 1``.

    With ``carry_state``: one pass over the stream in pieces of ``context_length`` tokens, the state of one
    piece being where the next begins. The result does not depend on the length of the pieces, and memory is
    constant however long the text is. Only for models whose every block is of type ``"hope"``.

    ``batch_size``: windows of one forward pass. ``max_tokens``: stop before the unit of about 4,096
    characters that would bring the stream past so many tokens (the first unit is always read).

    Returns ``perplexity``, ``bits_per_byte``, ``nats_per_token``, ``nats``, ``tokens``, ``bytes`` (of what
    was scored), ``protocol`` (in words), ``context_length``, ``stride`` and ``carry_state``. Sums are
    float64, and every number is finite. Raises `UserError` for a model that cannot carry its state, for
    lengths out of range and for no text, and `NotFinite` at the first token whose loss is not finite (its
    position, counted from the start token, which is 0) and for a perplexity beyond float64.

    >>> import transformers; from nestlearn.data import load_tokenizer
    >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=258, hidden_size=8,
    ...     intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    >>> evaluate_text(model, load_tokenizer("bytes"), ["some text"], context_length=4)["tokens"]
    9
    """
    stride = _check(model, context_length, stride, carry_state)
    counts = _Counts()
    stream = _stream(tokenizer, documents, counts, max_tokens)
    training, state, nats = model.training, None, 0.0
    model.eval()
    try:
        with torch.no_grad():
            for batch in _batches(_windows(stream, context_length, stride), 1 if carry_state else batch_size):
                ids = torch.from_numpy(np.stack([window.ids for window in batch]).astype(np.int64))
                ids = ids.to(model.device)
                output = model(input_ids=ids[:, :-1], past_key_values=state, use_cache=carry_state)
                state = output.past_key_values if carry_state else None
                nats += _nats(output.logits, ids[:, 1:], batch)
    finally:
        model.train(training)
    if counts.bytes == 0:
        raise UserError("there is no text to score: give a file that holds text")
    return {
        "perplexity": _perplexity(nats / counts.tokens),
        "bits_per_byte": nats / math.log(2) / counts.bytes,
        "nats_per_token": nats / counts.tokens,
        "nats": nats,
        "tokens": counts.tokens,
        "bytes": counts.bytes,
        "protocol": _protocol(context_length, stride, carry_state),
        "context_length": context_length,
        "stride": stride,
        "carry_state": carry_state,
    }


def _check(model: PreTrainedModel, context_length: int, stride: int | None, carry_state: bool) -> int:
    """The stride. Raises `UserError` for what `evaluate_text` cannot do."""
    if context_length < 1:
        raise UserError(f"context length {context_length}: give 1 token or more")
    check_positions(model, context_length, "the context length")
    if carry_state:
        blocks = getattr(model.config, "block_types", None) or [model.config.model_type]
        growing = sorted({block for block in blocks if block not in BLOCK_TYPES or block in GROWING})
        if growing:
            raise UserError(
                f"carrying state needs blocks whose state has a constant size: that of {', '.join(growing)} grows "
                "with the text; use windows instead"
            )
        if stride not in (None, context_length):
            raise UserError(f"stride {stride} has no meaning when the state is carried: leave it out")
    if stride is not None and not 1 <= stride <= context_length:
        raise UserError(f"stride {stride}: give 1 to {context_length} tokens, the context length")
    return stride or context_length


def _protocol(context_length: int, stride: int, carry_state: bool) -> str:
    if carry_state:
        return f"one pass, state carried from start to end in pieces of {context_length} tokens"
    return f"windows of {context_length} tokens every {stride}, the last {stride} of each scored, state fresh"


def _stream(
    tokenizer: PreTrainedTokenizerBase,
    documents: Iterable[str | Iterable[str]],
    counts: _Counts,
    max_tokens: int | None,
) -> Iterator[np.ndarray]:
    """The start token, then the units of the documents; ``counts`` keeps what has been given out."""
    units = token_units(documents, tokenizer)  # asks for an eos token, which a tokenizer without bos starts with
    first = next(units, None)
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    yield np.array([start], np.int32)
    unit = first
    while unit is not None:
        if max_tokens is not None and counts.tokens and counts.tokens + len(unit.ids) > max_tokens:
            return
        counts.tokens += len(unit.ids)
        counts.bytes += unit.bytes
        yield unit.ids
        unit = next(units, None)


def _windows(stream: Iterator[np.ndarray], context_length: int, stride: int) -> Iterator[Window]:
    """Windows of ``context_length + 1`` tokens every ``stride``; the last one may be shorter."""
    buffer, known, start = np.empty(0, np.int32), 1, 0
    for ids in stream:
        buffer = np.concatenate([buffer, ids])
        begin = 0
        while len(buffer) - begin > context_length:
            yield Window(buffer[begin : begin + context_length + 1], known, start + begin)
            begin += stride
            known = context_length + 1 - stride
        buffer, start = buffer[begin:], start + begin
    if len(buffer) > known:
        yield Window(buffer, known, start)


def _batches(windows: Iterator[Window], size: int) -> Iterator[list[Window]]:
    """Windows in groups of ``size``; a shorter one, which can only be the last of all, stands alone."""
    while batch := list(islice(windows, size)):
        if len(batch[-1].ids) < len(batch[0].ids):
            yield batch[:-1]
            yield batch[-1:]
        else:
            yield batch


def _nats(logits: Tensor, targets: Tensor, batch: list[Window]) -> float:
    """The summed loss of the scored targets (B, T) under logits (B, T, V)."""
    losses = torch.nn.functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
    total = 0.0
    for row, window in zip(losses, batch, strict=True):
        scored = row[window.known - 1 :].double()
        finite = torch.isfinite(scored)
        if not finite.all():
            position = window.start + window.known + int((~finite).int().argmax())
            raise NotFinite(
                f"the loss of token {position} is not finite: the model diverges there; "
                "check its weights, or evaluate with a shorter context"
            )
        total += float(scored.sum())
    return total


def perplexity(nats: float) -> float:
    """``exp`` of nats per token; infinite where a float64 ends.

    >>> perplexity(0.0), perplexity(1e6)
    (1.0, inf)
    """
    return math.exp(nats) if nats < 700 else math.inf


def _perplexity(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        raise NotFinite(
            f"the perplexity of {nats:.6g} nats per token is too large for a number: the model diverged; "
            "train it again with a lower learning rate"
        ) from None

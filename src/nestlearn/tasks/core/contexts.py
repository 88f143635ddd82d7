"""Perplexity against the context used (figure 10), on the same tokens whatever the context.

The scored tokens are spans of a text. With a context of c tokens a span is read in windows of c tokens, each from a
fresh state, and each scores its last c / 2 tokens (at most the whole span). So every scored token has between c / 2
and c tokens before it, or more than c less a span. What changes from one context to the next is the context alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

BATCH = 4096  # tokens of one forward pass, where a window is shorter than that


class Window(NamedTuple):
    """Inputs from ``begin`` to ``end`` of a text, of which the last ``scored`` give the predictions that count."""

    begin: int
    end: int
    scored: int


def windows(ends: Sequence[int], span: int, context: int) -> Iterator[Window]:
    """The windows that score the tokens from ``end - span`` to ``end`` (not included) of every end.

    >>> list(windows([100], 8, 8))
    [Window(begin=87, end=95, scored=4), Window(begin=91, end=99, scored=4)]
    """
    scored = min(max(context // 2, 1), span)
    for end in ends:
        for last in range(end - span + scored, end + 1, scored):  # one beyond the last token that is scored
            yield Window(last - 1 - context, last - 1, scored)


def span_ends(tokens: int, contexts: Sequence[int], spans: int, span: int) -> tuple[list[int], list[int]]:
    """Where the spans end, evenly over a text of so many tokens, and the contexts that fit before all of them."""
    fitting = [context for context in contexts if context + span <= tokens]
    first = max(fitting, default=0) + span
    ends = [first + (tokens - first) * n // max(1, spans - 1) for n in range(spans)]
    return ends, fitting


@torch.no_grad()
def losses_by_context(
    model: PreTrainedModel, ids: np.ndarray, contexts: Sequence[int], spans: int, span: int = 1024
) -> dict[int, float]:
    """Mean loss in nats per token of the same tokens, by context.

    Args:
        model: a causal language model.
        ids: the tokens of a text, (T,).
        contexts: in tokens; a power of two each, as ``span``. One that does not fit into the text is left out.
        spans: how many spans, spread evenly over the text from the first place that has the longest context.
        span: tokens of each.

    >>> import transformers
    >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=9, hidden_size=8,
    ...     intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    >>> list(losses_by_context(model, np.arange(99) % 9, [4, 64, 128], spans=2, span=8))
    [4, 64]
    """
    training = model.training
    model.eval()
    ends, fitting = span_ends(len(ids), contexts, spans, span)
    found = {}
    for context in fitting:
        pieces = list(windows(ends, span, context))
        size, total, count = max(1, BATCH // context), 0.0, 0
        for start in range(0, len(pieces), size):
            group = pieces[start : start + size]
            tokens = np.stack([ids[window.begin : window.end + 1] for window in group]).astype(np.int64)
            read = torch.from_numpy(tokens).to(model.device)
            scored = group[0].scored
            logits = model(input_ids=read[:, :-1], use_cache=False, logits_to_keep=scored).logits
            losses = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), read[:, -scored:].flatten(), reduction="none"
            )
            total += float(losses.double().sum())
            count += losses.numel()
        found[context] = total / count
    model.train(training)
    return found

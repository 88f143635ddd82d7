"""Token by token at growing contexts, and a long stream: the time and memory of a token do not depend on what was read.

Every context is reached by reading it in pieces. Contexts take turns, so a ratio between two of them is of the same
minutes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import psutil
import torch
from transformers import DynamicCache, PreTrainedModel

from nestlearn.tasks.core.reading import tensor_bytes, tensors
from nestlearn.tasks.speed.model import HOPE, LLAMA, pair
from nestlearn.tasks.speed.timing import AGAIN, Run, in_turns, machine, rows


@torch.no_grad()
def decode(
    size: str, contexts: Sequence[int], steps: int, beside: int, streams: int, piece: int, rounds: int, budget: float
) -> dict[str, Any]:
    """A cell: greedy decoding after contexts of so many tokens, in increasing order.

    Args:
        steps: tokens that Hope makes in a round: a multiple of its chunk, so that every round has as many ends of one.
        beside: the same for the Llama, whose keys and values are filled at random: their content does not matter.
        streams: independent sequences of a batch, at the first context.
        piece: tokens read at a time.

    Returns ``rows`` by tokens a second, ratios to the first context, and ``state_bytes`` by candidate.
    """
    before, models = machine(), pair(size)
    hope, llama = models[HOPE].eval(), models[LLAMA].eval()
    generator = torch.Generator().manual_seed(0)
    caches = {name_of(HOPE, c): cache for c, cache in reach(hope, contexts, piece, generator).items()}
    first = next(iter(caches))
    caches[first + AGAIN] = copy.deepcopy(caches[first])
    many = copy.deepcopy(caches[first])
    many.batch_repeat_interleave(streams)
    runs: dict[str, Run] = {name: _decode(hope, cache, 1, steps) for name, cache in caches.items()}
    found = in_turns(runs, rounds, budget)
    state_bytes = {name: tensor_bytes(cache.layers) for name, cache in caches.items()}
    batch = f"{HOPE}, {streams} streams"
    runs = {first: runs[first], batch: _decode(hope, many, streams, steps)}
    together = in_turns(runs, rounds, budget)
    caches.clear()
    theirs: dict[str, list[float]] = {}
    for context in contexts:  # one at a time: a long one is large, and is copied for every token
        cache = filled(llama, context)
        name = name_of(LLAMA, context)
        theirs |= in_turns({name: _decode(llama, cache, 1, beside)}, rounds, budget)
        state_bytes[name] = tensor_bytes(cache.layers)
    return {
        "machine": before,
        "rows": rows(found, [first], steps),
        "llama": rows(theirs, [next(iter(theirs))], beside),
        "streams": rows(together, [], steps * streams)[1:],
        "state_bytes": state_bytes,
    }


def name_of(model: str, context: int) -> str:
    """A candidate's name.

    >>> name_of("Hope", 1024)
    'Hope, 1,024 tokens before'
    """
    return f"{model}, {context:,} tokens before"


@torch.no_grad()
def reach(
    model: PreTrainedModel, contexts: Sequence[int], piece: int, generator: torch.Generator
) -> dict[int, DynamicCache]:
    """A cache after each of ``contexts`` tokens of one random stream, read in pieces."""
    cache, read, found = DynamicCache(config=model.config), 0, {}
    for context in contexts:
        while read < context:
            count = min(piece, context - read)
            tokens = torch.randint(model.config.vocab_size, (1, count), generator=generator)
            model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            read += count
        found[context] = copy.deepcopy(cache)
    return found


def filled(model: PreTrainedModel, context: int) -> DynamicCache:
    """A Llama's cache with random keys and values of so many tokens."""
    config = model.config
    cache = DynamicCache(config=config)
    width = config.hidden_size // config.num_attention_heads
    for layer in range(config.num_hidden_layers):
        keys = torch.randn(1, config.num_key_value_heads, context, width)
        cache.update(keys, keys.clone(), layer)
    return cache


def _decode(model: PreTrainedModel, cache: DynamicCache, streams: int, steps: int) -> Run:
    """The next tokens, most likely first. The cache goes on from round to round."""
    token = torch.arange(streams)[:, None] % model.config.vocab_size

    @torch.no_grad()
    def run() -> None:
        nonlocal token
        for _ in range(steps):
            token = model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)

    return run


@torch.no_grad()
def stream(size: str, tokens: int, piece: int, points: int) -> dict[str, Any]:
    """A cell: a random stream of ``tokens`` tokens read in pieces, looked at so many times on the way.

    Returns ``points``: after so many ``tokens`` the ``seconds`` since the last point, the process's memory ``rss`` and
    the ``state_bytes``, both in bytes, the ``largest`` number of the state and whether all are ``finite``.
    """
    before, model = machine(), pair(size)[HOPE].eval()
    generator, cache = torch.Generator().manual_seed(0), DynamicCache(config=model.config)
    found: list[dict[str, Any]] = []
    begin, read = time.perf_counter(), 0
    for point in range(1, points + 1):
        while read < tokens * point // points:
            count = min(piece, tokens * point // points - read)
            ids = torch.randint(model.config.vocab_size, (1, count), generator=generator)
            model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            read += count
        now = time.perf_counter()
        values = [t for t in tensors(cache.layers) if t.is_floating_point() and t.numel()]
        found.append(
            {
                "tokens": read,
                "seconds": now - begin,
                "rss": psutil.Process().memory_info().rss,
                "state_bytes": tensor_bytes(cache.layers),
                "largest": max(float(t.abs().max()) for t in values),
                "finite": all(bool(t.isfinite().all()) for t in values),
            }
        )
        begin = time.perf_counter()
    return {"machine": before, "piece": piece, "points": found}

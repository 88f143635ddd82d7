"""Levels that learn from the model's own next-token loss while it reads (Eq. 71).

The sequence is cut wherever a level is updated. When the token after such a segment is known, so is the loss of all
its tokens, and its gradient with respect to every level's weights is gathered; levels whose chunk has ended take
their step. The inner gradient goes through the segment and not through what earlier segments left in the mixers'
states; the outer one goes through everything.

A segment that is not yet complete is kept, as its tokens and the state at its start, and read once more when it is: so
text in pieces of any size gives what one pass gives.

Shapes: B rows, T tokens, D channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import Cache

from nestlearn.errors import UserError
from nestlearn.memory.structures import Weights
from nestlearn.models.hope.cache_hope import HopeCacheLayer, Replay
from nestlearn.nn.continuum import ContinuumMemory

Read = Callable[[Tensor, Cache], Tensor]
"""Token ids (B, T) and a cache, which it updates, to hidden states (B, T, D)."""


def read_and_learn(
    read: Read,
    head: Callable[[Tensor], Tensor],
    memories: list[ContinuumMemory],
    input_ids: Int[Tensor, "B T"],
    cache: Cache,
) -> Float[Tensor, "B T D"]:
    """Hidden states of the new tokens; the levels in ``cache`` learn at the end of every segment.

    Args:
        read: the model without its head.
        head: hidden states (..., D) to logits (..., V).
        memories: the continuum memory of every block, static ones included.
        input_ids: the new tokens, without filler.
        cache: the state, updated in place. Where gradients are enabled, an outer loss can be differentiated through
            the learning; under ``no_grad`` the graph of a segment is dropped at its end.

    Raises:
        UserError: under ``torch.inference_mode``, in which no gradient can be taken.
    """
    if torch.is_inference_mode_enabled():
        raise UserError("levels that learn by the next token take gradients: use no_grad in place of inference_mode")
    layers: list[HopeCacheLayer] = cache.layers  # type: ignore[assignment]
    learning = [i for i, memory in enumerate(memories) if memory.online == "next-token"]
    seen = layers[0].get_seq_length()
    replay = layers[0].replay
    tokens = input_ids if replay is None else torch.cat([replay.tokens, input_ids], dim=1)
    start = seen + input_ids.shape[1] - tokens.shape[1]
    first, end, done = start, start + tokens.shape[1], seen

    def between(i: int, j: int) -> Tensor:
        return tokens[:, i - first : j - first]

    outputs: list[Tensor] = []
    at_start = [layer.state if layer.replay is None else layer.replay.state for layer in layers]
    while True:
        stop = min(memories[i].boundary(start) for i in learning)
        if end <= stop:  # the loss of the segment's last token is not known yet
            break
        if done > start:  # read before, but not to its end
            for layer, state in zip(layers, at_start, strict=True):
                layer.rewind(state, start)
        targets = between(start + 1, stop + 1)
        hidden = _learn(read, head, memories, learning, between(start, stop), targets, cache)
        outputs.append(hidden[:, done - start :])
        start = done = stop
        at_start = [layer.state for layer in layers]
    if done < end or not outputs:
        outputs.append(read(between(done, end), cache))
    for index, layer in enumerate(layers):
        open_tokens = between(start, end) if index == 0 else input_ids[:, :0]
        layer.replay = Replay(open_tokens, at_start[index])
    return torch.cat(outputs, dim=1)


def _learn(
    read: Read,
    head: Callable[[Tensor], Tensor],
    memories: list[ContinuumMemory],
    learning: list[int],
    tokens: Tensor,
    targets: Tensor,
    cache: Cache,
) -> Tensor:
    """Read one whole segment, take its error to the levels and update those whose chunk ends with it."""
    layers: list[HopeCacheLayer] = cache.layers  # type: ignore[assignment]
    rows, outer = tokens.shape[0], torch.is_grad_enabled()
    with torch.enable_grad():
        aliases: list[Weights] = []
        for i in learning:
            layer = layers[i]
            past = layer.state
            state = memories[i].begin(rows) if past is None or past.memory is None else past.memory
            levels = []
            for level in state.levels:
                # A name of its own for each row and segment: the error goes through this segment alone.
                own = tuple(_alias(w, rows, outer) for w in level.weights)
                aliases.append(own)
                levels.append(replace(level, weights=own))
            layer.give_memory(replace(state, levels=tuple(levels)))
        # Of PyTorch's attention kernels only the plain one has a derivative of its derivative.
        with sdpa_kernel(SDPBackend.MATH) if outer else nullcontext():
            hidden = read(tokens, cache)
        logits = head(hidden).flatten(0, 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss = F.cross_entropy(logits, targets.reshape(-1).long(), reduction="sum")
        flat = [w for own in aliases for w in own]
        gradients = iter(torch.autograd.grad(loss, flat, create_graph=outer))
    with torch.set_grad_enabled(outer):
        for i in learning:
            state = layers[i].memory
            errors = []
            for level, erasure in zip(state.levels, state.erasure, strict=True):
                error = tuple(next(gradients) for _ in level.weights)
                errors.append(tuple(e + x for e, x in zip(error, erasure, strict=True)) if erasure else error)
            layers[i].give_memory(memories[i].learn(state, errors))
        if not outer:
            for layer in layers:
                assert layer.state is not None
                layer.state = layer.state.detach()
    return hidden if outer else hidden.detach()


def _alias(w: Tensor, rows: int, outer: bool) -> Tensor:
    each = w.expand(rows, *w.shape[-2:])
    if outer and each.requires_grad:
        return each.view_as(each)
    return each.detach().requires_grad_()

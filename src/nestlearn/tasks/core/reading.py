"""A stream of any length read through a model's cache in pieces, then asked: what grows is the state alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from transformers import DynamicCache

from nestlearn.models.hope import HopeForCausalLM


@torch.no_grad()
def advance(network: HopeForCausalLM, tokens: Tensor, cache: DynamicCache, mask: Tensor | None = None) -> Tensor:
    """Read tokens (B, T) into the cache; the hidden states (B, T, D)."""
    read = network.model(input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True)
    return read.last_hidden_state


@torch.no_grad()
def answer(
    network: HopeForCausalLM, cache: DynamicCache, questions: Sequence[np.ndarray], end: int, most: int
) -> list[list[int]]:
    """The most likely tokens after every question, up to ``end``, which stands in them, or at most so many.

    ``cache`` holds a stream for each of the ``questions``, and is spent.
    """
    device = network.device
    width = max(map(len, questions))
    tokens = torch.zeros(len(questions), width, dtype=torch.long)
    mask = torch.zeros(len(questions), width, dtype=torch.long)
    for row, question in enumerate(questions):
        tokens[row, : len(question)] = torch.from_numpy(question)
        mask[row, : len(question)] = 1
    hidden = advance(network, tokens.to(device), cache, mask.to(device))
    last = hidden[torch.arange(len(questions)), mask.sum(1).to(device) - 1]
    found: list[list[int]] = [[] for _ in questions]
    for _ in range(most):
        following = network.lm_head(last).argmax(-1)
        for given, token in zip(found, following.tolist(), strict=True):
            if end not in given:
                given.append(token)
        if all(end in given for given in found):
            break
        last = advance(network, following[:, None], cache)[:, -1]
    return found


class MemoryMeter:
    """The most memory, in bytes, that this process held when asked, or the device at any moment since."""

    def __init__(self, device: str) -> None:
        self.device, self.most = device, 0
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(device)
        self.note()

    def note(self) -> None:
        """Look now."""
        if self.device.startswith("cuda"):
            self.most = torch.cuda.max_memory_allocated(self.device)
        else:
            self.most = max(self.most, psutil.Process().memory_info().rss)


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in a state: in objects, dictionaries, lists and tuples.

    >>> tensor_bytes([torch.zeros(3), {"a": torch.zeros(2, dtype=torch.float64)}, None])
    28
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors(value))


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in a state, as `tensor_bytes` counts them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)
    elif hasattr(value, "__dict__"):
        yield from tensors(vars(value))

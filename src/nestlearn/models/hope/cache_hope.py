"""The cache of a Hope model: one state per block in a ``DynamicCache``, recurrent or growing alike."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import NoReturn, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from nestlearn.errors import UserError
from nestlearn.models.hope.configuration_hope import CACHE_LAYER_TYPE
from nestlearn.nn.continuum import ContinuumState


class MixerState(Protocol):
    """What a token mixer carries along a sequence; dimension 0 of every tensor is the batch."""

    def index_select(self, rows: Tensor) -> MixerState: ...
    def detach(self) -> MixerState: ...


@dataclass(frozen=True)
class BlockState:
    """What one block carries along a sequence: the states of its token mixer (None before the first token), of its own
    convolution, if any, and of a continuum memory that learns along the sequence."""

    mixer: MixerState | None
    conv: Tensor | None = None
    memory: ContinuumState | None = None

    def index_select(self, rows: Tensor) -> BlockState:
        """The state of the given rows, in that order."""
        return BlockState(
            None if self.mixer is None else self.mixer.index_select(rows),
            None if self.conv is None else self.conv.index_select(0, rows),
            None if self.memory is None else self.memory.index_select(rows),
        )

    def detach(self) -> BlockState:
        """The same values, cut from the graph that made them."""
        return BlockState(
            None if self.mixer is None else self.mixer.detach(),
            None if self.conv is None else self.conv.detach(),
            None if self.memory is None else self.memory.detach(),
        )


@dataclass(frozen=True)
class Replay:
    """A segment that waits for its end: its tokens (B, n), kept by the first block, and a block's state before it."""

    tokens: Tensor
    state: BlockState | None

    def index_select(self, rows: Tensor) -> Replay:
        """That of the given rows, in that order."""
        state = None if self.state is None else self.state.index_select(rows)
        return Replay(self.tokens.index_select(0, rows), state)


class HopeCacheLayer(CacheLayerMixin):
    """State of one block. ``DynamicCache(config=model.config)`` builds one for each.

    A recurrent state has no memory of its own past, so nothing can be cropped off its end: assisted decoding and
    other methods that take tokens back raise :class:`UserError`.
    """

    _layer_type = CACHE_LAYER_TYPE
    is_croppable = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.reset()

    def store(self, state: BlockState, hidden_states: Tensor) -> None:
        """Take the state after the tokens of ``hidden_states`` (B, T, D)."""
        self.state, self.is_initialized = state, True
        self.columns += hidden_states.shape[1]
        self.batch_size, self.device = hidden_states.shape[0], hidden_states.device

    @property
    def memory(self) -> ContinuumState:
        """The state of the block's continuum memory, which must be there."""
        assert self.state is not None
        assert self.state.memory is not None
        return self.state.memory

    def give_memory(self, memory: ContinuumState) -> None:
        """Put another state of the continuum memory in place."""
        self.state = replace(self.state or BlockState(None), memory=memory)

    def rewind(self, state: BlockState | None, columns: int) -> None:
        """Go back to an earlier state, after so many tokens."""
        self.state, self.columns = state, columns

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def reset(self) -> None:
        self.state: BlockState | None = None
        self.replay: Replay | None = None  # of levels that learn from the next-token loss
        self.columns = 0  # tokens seen, filler of padded rows included, as transformers counts a cache's length
        self.batch_size = -1  # unknown, as transformers writes it
        self.is_initialized = False

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows, in that order."""
        if self.state is not None:
            self.state = self.state.index_select(indices.to(self.device))
            self.replay = None if self.replay is None else self.replay.index_select(indices.to(self.device))
            self.batch_size = len(indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            rows = torch.arange(self.batch_size, device=self.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def __deepcopy__(self, memo: dict[int, object]) -> HopeCacheLayer:
        """A layer that goes on by itself. The tensors are shared: a new state replaces the old, nothing writes into
        it (and torch would not copy those that carry gradients)."""
        return copy.copy(self)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise UserError(
                "the state of a Hope model cannot take tokens back, so it cannot be cropped: "
                "generate without an assistant model or prompt lookup, or keep "
                "copy.deepcopy(past_key_values) from before those tokens"
            )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._no_keys()

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> NoReturn:
        self._no_keys()

    def _no_keys(self) -> NoReturn:
        raise TypeError("a Hope cache layer stores a block's state, not keys and values: use store()")

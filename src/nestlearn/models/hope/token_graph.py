"""A decoded token as one CUDA graph in place of the hundreds of small kernels that it is.

A graph replays kernels at fixed addresses: what a token reads is copied there, some hundred kilobytes, and what it
makes is copied away, so that states stay values that nothing writes into. Python does not run in a replay, so the
tokens are counted outside. A token that begins a chunk, where anchors move, goes the general way, and so does whatever
`nestlearn.nn.decoding` does not cover.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nestlearn.models.hope.block import HopeBlock
from nestlearn.models.hope.cache_hope import BlockState, HopeCacheLayer
from nestlearn.nn import MemoryMixer
from nestlearn.nn.decoding import covered, within_chunk
from nestlearn.nn.mixer import MemoryState
from nestlearn.ops import CoreState

Run = Callable[[], list[Tensor]]
WARM = 3  # runs before the recording, in which libraries set themselves up


def record_on_cuda(run: Run) -> tuple[Callable[[], Any], list[Tensor]]:
    """What replays the kernels of ``run``, and the tensors that every replay writes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = run()
    return graph.replay, made


class TokenGraph:
    """Blocks on one token of every row, recorded once for a number of rows.

    Args:
        blocks: of the model.
        record: as `record_on_cuda`.
    """

    def __init__(
        self,
        blocks: Sequence[HopeBlock],
        record: Callable[[Run], tuple[Callable[[], Any], list[Tensor]]] = record_on_cuda,
    ) -> None:
        self.blocks, self.record = list(blocks), record
        self.parameters = [p for block in self.blocks for p in block.parameters()]
        self.fits: list[Any] | None = None  # what the recording was made for
        self.able = False  # whether the blocks are of those that have a short way
        self.inputs: list[Tensor] = []
        self.made: list[Tensor] = []
        self.replay: Callable[[], Any] = lambda: None

    def __call__(self, hidden: Tensor, layers: Sequence[HopeCacheLayer]) -> Tensor | None:
        """Hidden states (B, 1, D) behind the blocks, and ``layers`` after the token; None, and nothing done, where the
        blocks themselves have to run."""
        states = [layer.state for layer in layers]
        if hidden.shape[1] != 1 or torch.is_grad_enabled() or torch.is_autocast_enabled(hidden.device.type):
            return None
        cores = [_core(state) for state in states]
        if None in cores:
            return None
        given = [hidden, *(t for state in states for t in _tensors(state))]
        fits = [*((t.shape, t.dtype) for t in given), *(p.data_ptr() for p in self.parameters)]
        if fits != self.fits:
            self._prepare(given, fits)
        rules = [block.mixer.rule for block in self.blocks]  # type: ignore[union-attr]
        if not self.able or not all(within_chunk(r, c.clock) for r, c in zip(rules, cores, strict=True)):  # type: ignore[union-attr]
            return None
        if not self.made:
            self.replay, self.made = self.record(lambda: self._run(states))
        torch._foreach_copy_(self.inputs, given)
        self.replay()
        hidden, *rest = [t.clone() for t in self.made]
        for layer, state in zip(layers, states, strict=True):
            layer.store(_after(state, rest), hidden)
        return hidden

    def __deepcopy__(self, memo: dict[int, object]) -> None:
        """A copy of the model lies elsewhere and has no recording."""
        return

    def _prepare(self, given: list[Tensor], fits: list[Any]) -> None:
        self.fits, self.made = fits, []
        mixers = [block.mixer for block in self.blocks]
        self.able = all(isinstance(mixer, MemoryMixer) and covered(mixer.initial(), mixer.rule) for mixer in mixers)
        with torch.inference_mode(False):  # tensors that may be written to in and out of it
            self.inputs = [torch.empty_like(t) for t in given]

    def _run(self, states: Sequence[Any]) -> list[Tensor]:
        hidden, *rest = self.inputs
        made = []
        for block, state in zip(self.blocks, states, strict=True):
            own = [rest.pop(0) for _ in _tensors(state)]
            hidden, after = block.read(hidden, _before(state, own), None)
            made += [after.mixer.conv, *after.mixer.core.current]  # type: ignore[union-attr]
        return [hidden, *made]


def _core(state: BlockState | None) -> CoreState | None:
    """Of a state that is a memory's and nothing else."""
    if state is None or state.conv is not None or state.memory is not None or not isinstance(state.mixer, MemoryState):
        return None
    return None if state.mixer.attention is not None or state.mixer.core.momentum else state.mixer.core


def _tensors(state: Any) -> list[Tensor]:
    """Those that a token reads; all but the anchors it also makes."""
    core = state.mixer.core
    return [state.mixer.conv, *core.current, *core.anchor]


def _before(state: Any, tensors: Sequence[Tensor]) -> BlockState:
    """The state with these for `_tensors`."""
    core = state.mixer.core
    conv, *weights = tensors
    current, anchor = weights[: len(core.current)], weights[len(core.current) :]
    return BlockState(MemoryState(conv, CoreState(tuple(current), tuple(anchor), (), core.clock)))


def _after(state: Any, made: list[Tensor]) -> BlockState:
    """The state after the token, from what it made, which is taken off the front of ``made``."""
    core = state.mixer.core
    conv = made.pop(0)
    current = tuple(made.pop(0) for _ in core.current)
    return BlockState(MemoryState(conv, CoreState(current, core.anchor, (), core.clock + 1)))

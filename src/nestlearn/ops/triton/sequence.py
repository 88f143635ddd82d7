"""Five memories along a sequence as one node of the graph, by the kernels of this folder.

The kernels have never run on a GPU, so nothing chooses them but ``NESTLEARN_OPS=triton``. On a CPU they run in Triton's
interpreter, for tests: with ``TRITON_INTERPRET=1`` before Triton is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from nestlearn.errors import UserError
from nestlearn.ops.adjoint import outside_autocast, second_order, write_scales
from nestlearn.ops.linear import LinearKernel
from nestlearn.ops.mlp import MLPKernel
from nestlearn.ops.rule import GATES, Start
from nestlearn.ops.state import CoreState
from nestlearn.ops.triton.linear import LinearLaunch
from nestlearn.ops.triton.mlp import MLPLaunch
from nestlearn.ops.triton.support import tile, unsupported

INTERPRETED = not isinstance(LinearLaunch.forward, triton.JITFunction)
READ = ("eta", "alpha", "k", "v", "q")
"""The inputs in the order in which the kernels take them."""

ByChunks = Callable[..., tuple[Tensor, CoreState]]
Launch = LinearLaunch | MLPLaunch
Run = tuple[Launch, Tensor, Tensor]
"""Which memories, and for every row the tokens seen and those that count."""


def by_kernels(
    inputs: Mapping[str, Tensor],
    kernel: LinearKernel | MLPKernel,
    learned: tuple[Tensor, ...],
    state: CoreState,
    lengths: Tensor | None,
    by_chunks: ByChunks,
) -> tuple[Tensor, CoreState]:
    """:func:`nestlearn.ops.self_modify` by the kernels, from a state. Rows that do not count read as zero.

    Args:
        inputs, kernel, learned, state, lengths: as the chunk form has them.
        by_chunks: the chunk form, through which second derivatives go.

    Raises:
        UserError: a switch that the kernels do not know, or tensors that are not where they run.
    """
    start = kernel.start
    why = unsupported(inputs, start, kernel.rule)
    if why is not None:
        raise UserError(f"NESTLEARN_OPS=triton: {why}; or take NESTLEARN_OPS=torch")
    x = inputs["q"]
    if x.device.type != ("cpu" if INTERPRETED else "cuda"):
        raise UserError(
            f"NESTLEARN_OPS=triton does not run on {x.device.type!r} here: it takes CUDA, or, with TRITON_INTERPRET=1 "
            "set before Python starts, the CPU; or take NESTLEARN_OPS=torch"
        )
    launch = LinearLaunch(kernel) if isinstance(kernel, LinearKernel) else MLPLaunch(kernel)
    batch, _, tokens, _ = x.shape
    counts = torch.full((batch,), tokens) if lengths is None else lengths.cpu()
    y, current, anchor = MemorySequence.apply(
        by_chunks,
        (launch, state.clock, counts),
        *(inputs[name] for name in READ),
        launch.flat(learned),
        torch.stack([start.bias[name] for name in GATES], -1),
        write_scales(start, kernel.names),
        start.erase,
        launch.flat(state.current),
        launch.flat(state.anchor),
    )
    return y, CoreState(launch.packed(current), launch.packed(anchor), (), state.clock + counts)


def _constants(run: Run, x: Tensor) -> tuple[int, list[Tensor], tuple, dict]:
    """The most segments of a row, and what both kernels take after the tensors that they differ in: what is read
    besides (of heads, clock, counts), numbers, tile sizes."""
    launch, clock, counts = run
    rule = launch.kernel.rule
    heads, tokens = x.shape[1:3]
    counts = counts.clamp(0, tokens)
    segments = (clock % rule.chunk_size + counts + rule.chunk_size - 1) // rule.chunk_size
    most = int(segments.max()) if len(segments) else 0
    read = [t.to(x.device, torch.int32) for t in (*launch.of_heads(), clock % rule.chunk_size, counts)]
    sizes = heads, tokens, most, *launch.sizes(), rule.chunk_size
    numbers = rule.eta_max, rule.stretch, rule.norm_limit, *launch.numbers()
    return most, read, (*sizes, *numbers), compiled_for(rule.chunk_size, x.dtype) | launch.tiles(x.dtype)


def compiled_for(chunk: int, dtype: torch.dtype) -> dict[str, Any]:
    """What all kernels are compiled for, from tokens of a chunk and the precision of the inputs.

    Products of bfloat16 inputs are rounded to their precision and a little more, those of float32 are not.
    """
    return {"C": tile(chunk), "P": "ieee" if dtype == torch.float32 else "tf32", "num_stages": 1}


class MemorySequence(torch.autograd.Function):
    """See the head of this file. It keeps its inputs and the states at segment boundaries."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        by_chunks: ByChunks,
        run: Run,
        x_eta: Tensor,
        x_alpha: Tensor,
        x_k: Tensor,
        x_v: Tensor,
        q: Tensor,
        base: Tensor,
        bias: Tensor,
        scale: Tensor,
        erase: Tensor | None,
        current: Tensor,
        anchor: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        most, read, numbers, tiles = _constants(run, q)
        given = (x_eta, x_alpha, x_k, x_v, q, base, bias, scale, erase, current, anchor)
        keep = any(ctx.needs_input_grad)
        y = torch.zeros_like(q, memory_format=torch.contiguous_format)
        kept = base.new_empty(*q.shape[:2], most if keep else 0, *base.shape[1:])
        ends = base.new_empty(*q.shape[:2], *base.shape[1:]), base.new_empty(*q.shape[:2], *base.shape[1:])
        *inputs, current, anchor = _dense(given)
        programs = q.shape[0] * q.shape[1]
        outputs = y, kept, *ends, run[0].scratch(programs, base, forward=True)
        _launch(run[0].forward, programs, *inputs, *read, current, anchor, *outputs, *numbers, KEEP=keep, **tiles)
        ctx.by_chunks, ctx.run = by_chunks, run
        ctx.save_for_backward(*given, kept)
        return y, *ends

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, d_y: Tensor, d_current: Tensor, d_anchor: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        *given, kept = ctx.saved_tensors
        if torch.is_grad_enabled():
            again, d_outputs = partial(_again, ctx.by_chunks, ctx.run), (d_y, d_current, d_anchor)
            return second_order(again, given, ctx.needs_input_grad[2:], d_outputs)
        q, base, erase, batch = given[4], given[5], given[8], given[4].shape[0]
        _, read, numbers, tiles = _constants(ctx.run, q)
        *inputs, _, anchor = _dense(given)
        d_inputs = [torch.zeros_like(x) for x in inputs[:5]]
        d_shared = [base.new_zeros(batch, *t.shape) for t in inputs[5:]]
        d_states = base.new_empty(anchor.shape), base.new_zeros(anchor.shape)
        outer = [t.contiguous() for t in (d_y, d_current, d_anchor)]
        programs, launch = batch * q.shape[1], ctx.run[0]
        outputs = *d_inputs, *d_shared, *d_states, launch.scratch(programs, base, forward=False)
        _launch(launch.backward, programs, *inputs, *read, kept, anchor, *outer, *outputs, *numbers, **tiles)
        d_base, d_bias, d_scale, d_erase = (t.sum(0) for t in d_shared)
        return None, None, *d_inputs, d_base, d_bias, d_scale, None if erase is None else d_erase, *d_states


def _launch(kernel: Any, programs: int, *given: Any, **tiles: Any) -> None:
    """Run so many programs of a kernel, or say in one line that its tiles are too large for the device."""
    try:
        kernel[(programs,)](*given, **tiles)
    except OutOfResources as error:
        hidden = f", {tiles['E']} hidden," if "E" in tiles else ""
        raise UserError(
            f"NESTLEARN_OPS=triton: a chunk of {tiles['C']} tokens by {tiles['D']} channels{hidden} does not fit this "
            f"device ({error.name}: {error.required} needed, {error.limit} there): take a smaller chunk_size, more "
            "heads, or NESTLEARN_OPS=torch"
        ) from error


def _dense(given: Sequence[Tensor | None]) -> list[Tensor]:
    """The tensors of the node as the kernels take them: contiguous, and all of the erasure where no share is given."""
    base = given[5]
    assert base is not None
    return [base.new_ones(base.shape[0]) if t is None else t.contiguous() for t in given]


def _again(by_chunks: ByChunks, run: Run, *given: Tensor) -> tuple[Tensor, ...]:
    """The outputs of the node by the chunk form, differentiable twice."""
    launch, clock, counts = run
    *inputs, base, bias, scale, erase, current, anchor = given
    kernel, learned = launch.kernel, launch.packed(base)
    start = Start(
        weights=kernel.named(learned),
        bias=dict(zip(GATES, bias.unbind(-1), strict=True)),
        write_scale=dict(zip(kernel.names, scale.unbind(-1), strict=True)),
        erase=erase,
        accumulates=kernel.start.accumulates,
    )
    state = CoreState(launch.packed(current), launch.packed(anchor), (), clock)
    wide = {name: x.to(base.dtype) for name, x in zip(READ, inputs, strict=True)}
    y, end = by_chunks(wide, type(kernel)(start, kernel.rule), learned, state, counts)
    return y.to(inputs[-1].dtype), launch.flat(end.current), launch.flat(end.anchor)

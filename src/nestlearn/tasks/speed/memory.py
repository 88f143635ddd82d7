"""Memory of a training step against the length of the sequence: the peak of a model, and what one block keeps."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestlearn.nn import SelfReferentialTitans

STATUS = Path("/proc/self/status")


def peak(size: str, model: str, seq: int) -> dict[str, Any]:
    """A cell, in a process of its own: the most memory, in bytes, that forward and backward of one sequence add to it
    after a short step; ``model`` is a name of `nestlearn.tasks.speed.model.pair`.

    Returns ``bytes``, or ``not_run`` with the reason.
    """
    if not STATUS.exists():
        return {"not_run": "needs the peak memory in /proc, which Linux has"}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as fresh:
        try:
            return fresh.submit(_peak, size, model, seq, torch.get_num_threads()).result()
        except BrokenProcessPool:
            return {"not_run": "the process was killed, perhaps for want of memory"}


def kept(dim: int, chunk: int, heads: Sequence[int], lengths: Sequence[int]) -> dict[str, Any]:
    """A cell: bytes that the graph of one block holds between forward and backward pass, its parameters aside.

    Args:
        dim, chunk: of the block.
        heads: one row for each and each kind of memory.
        lengths: tokens of the one sequence.

    Returns ``lengths`` and ``rows``: ``name``, ``bytes`` by length, and ``states``, what a state for every token of
    the longest sequence would take.
    """
    rows = []
    for memory in ("mlp", "linear"):
        for n in heads:
            layer = SelfReferentialTitans(dim, n, chunk, memory=memory)  # type: ignore[arg-type]
            state = sum(w.nbytes for w in layer(torch.zeros(1, 1, dim))[1].core.current)
            name = f"five {'MLP' if memory == 'mlp' else memory} memories, {n} head{'s' if n > 1 else ''}"
            sizes = [_kept(layer, torch.randn(1, length, dim)) for length in lengths]
            rows.append({"name": name, "bytes": sizes, "states": lengths[-1] * state})
    return {"lengths": list(lengths), "rows": rows}


def _kept(layer: SelfReferentialTitans, x: Tensor) -> int:
    storages: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def pack(saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        y = layer(x.requires_grad_())[0]
    del y  # until here it keeps every storage alive, so that no address is another's
    return sum(storages.values())


def _peak(size: str, name: str, seq: int, threads: int) -> dict[str, Any]:
    from nestlearn.tasks.speed.model import pair

    torch.set_num_threads(threads)
    model = pair(size)[name].train()

    def step(tokens: int) -> None:
        ids = torch.zeros(1, tokens, dtype=torch.long)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    step(min(seq, 64))  # gradients, and what libraries take for themselves
    before = _high_water()
    step(seq)
    return {"bytes": _high_water() - before}


def _high_water() -> int:
    """The most resident memory that this process ever had, in bytes. Not ``ru_maxrss``: a child inherits that."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

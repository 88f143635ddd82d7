"""Peak memory of a training step against the length of the sequence, each in a process of its own."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch

STATUS = Path("/proc/self/status")


def peak(size: str, model: str, seq: int) -> dict[str, Any]:
    """A cell: the most memory, in bytes, that forward and backward of one sequence add to a process that has already
    made a short step; ``model`` is a name of `nestlearn.tasks.speed.model.pair`.

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

"""Times of one piece of work by several candidates, taken so that a machine that slows down slows all of them.

Candidates take turns, one run each a round. A ratio is taken within a round and reported with its spread over the
rounds; the machine's own ceilings take turns too, so that a share of them is of the same minutes.
"""

from __future__ import annotations

import gc
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Run = Callable[[], object]

PRODUCT, COPY = "matrix product", "copy"
CEILINGS = (PRODUCT, COPY)
AGAIN = ", again"  # ends the name of a candidate that is another one once more: the noise


def in_turns(candidates: Mapping[str, Run], rounds: int, budget: float) -> dict[str, list[float]]:
    """Wall-clock seconds of every candidate in every round, after one round to warm up.

    A candidate that has used more than ``budget`` seconds sits out the rounds after the second.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    spent = dict.fromkeys(candidates, 0.0)
    gc.collect()
    gc.freeze()  # what is there already need not be looked through before every run
    try:
        for number in range(rounds + 1):
            for name, run in candidates.items():
                if number > 2 and spent[name] > budget:
                    continue
                gc.collect()
                begin = time.perf_counter()
                run()
                took = time.perf_counter() - begin
                spent[name] += took
                if number:
                    seconds[name].append(took)
    finally:
        gc.unfreeze()
    return seconds


def ceilings(size: int, megabytes: int) -> dict[str, Run]:
    """What the machine can do: a float32 product of two (size, size) matrices, and a copy of so many MB."""
    a, out = torch.randn(size, size), torch.empty(size, size)
    source = torch.ones(megabytes * 250_000)
    target = torch.empty_like(source)
    return {PRODUCT: lambda: torch.mm(a, a, out=out), COPY: lambda: target.copy_(source)}


def rates(seconds: Mapping[str, Sequence[float]], size: int, megabytes: int) -> dict[str, Any]:
    """`ceilings` in GFLOP/s and GB/s (read and written), each the best and the median of the rounds."""
    product, copy = seconds[PRODUCT], seconds[COPY]
    operations, moved = 2 * size**3 / 1e9, 2 * megabytes / 1e3
    return {
        "gflops": operations / min(product),
        "gflops_median": operations / statistics.median(product),
        "gigabytes_per_second": moved / min(copy),
        "gigabytes_per_second_median": moved / statistics.median(copy),
    }


def rows(seconds: Mapping[str, Sequence[float]], against: Sequence[str], units: int) -> list[dict[str, Any]]:
    """One row a candidate.

    Args:
        seconds: of `in_turns`.
        against: candidates to compare with; of a name that ends in `AGAIN` only the one it repeats.
        units: what one run does, in tokens or steps.

    Returns ``name``, ``rounds``, ``seconds`` (median), ``best``, ``per_second`` (units, at the median), and
    ``times_as_fast``: by the name of another, the ``ratio`` (median over the rounds), ``low`` and ``high`` (quartiles).

    >>> rows({"a": [1.0, 1.2], "b": [2.0, 2.4]}, ["b"], units=10)[0]["times_as_fast"]["b"]["ratio"]
    2.0
    """
    found = []
    for name, own in seconds.items():
        if name in CEILINGS:
            continue
        first = name.removesuffix(AGAIN)
        others = [first] if first != name else [other for other in against if other != name]
        found.append(
            {
                "name": name,
                "rounds": len(own),
                "seconds": statistics.median(own),
                "best": min(own),
                "per_second": units / statistics.median(own),
                "times_as_fast": {other: ratio(seconds[other], own) for other in others if other in seconds},
            }
        )
    return found


def ratio(theirs: Sequence[float], own: Sequence[float]) -> dict[str, float]:
    """How many times as fast as the other: median and quartiles over the rounds that both took part in."""
    each = [t / o for t, o in zip(theirs, own, strict=False)]
    low, high = (each[0], each[0]) if len(each) == 1 else _quartiles(each)
    return {"ratio": statistics.median(each), "low": low, "high": high}


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def machine() -> dict[str, Any]:
    """What every time depends on."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"threads": torch.get_num_threads(), "torch": torch.__version__, "load_before": load}

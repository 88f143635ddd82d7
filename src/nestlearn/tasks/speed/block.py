"""One block, forward and backward, and one token a call: nestlearn beside its peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nestlearn.nn import MemoryLayer, SelfReferentialTitans
from nestlearn.tasks.speed import operations, peers
from nestlearn.tasks.speed.timing import AGAIN, Run, ceilings, in_turns, machine, rates, rows


def train(
    dim: int,
    seq: int,
    batch: int,
    chunk: int,
    heads: Sequence[int],
    others: Sequence[str],
    rounds: int,
    budget: float,
    product: int,
    megabytes: int,
) -> dict[str, Any]:
    """A cell: x (batch, seq, dim) float32 with gradient, ``block(x).square().mean().backward()``.

    Args:
        chunk: tokens of a chunk, of every candidate.
        heads: of ours, one candidate for each and each kind of memory.
        others: names of `nestlearn.tasks.speed.peers.PEERS` to time beside.
        rounds, budget: of `nestlearn.tasks.speed.timing.in_turns`.
        product, megabytes: of `nestlearn.tasks.speed.timing.ceilings`.

    Returns the ``machine``, its ``ceilings``, and ``rows``; ours have ``of_product``, the share of the machine's
    matrix product that their useful operations reach.
    """
    torch.manual_seed(0)
    before = machine()
    steps: dict[str, peers.Step] = {}
    useful: dict[str, int] = {}
    for memory in ("mlp", "linear"):
        for n in heads:
            layer = SelfReferentialTitans(dim, n, chunk, memory=memory)  # type: ignore[arg-type]
            name = f"nestlearn, five {'MLP' if memory == 'mlp' else memory} memories, {_heads(n)}"
            steps[name] = peers.training(lambda x, layer=layer: layer(x)[0])
            useful[name] = operations.TRAINING * operations.per_token(memory, dim, n, chunk)
    first = next(iter(steps))
    steps[first + AGAIN] = steps[first]
    useful[first + AGAIN] = useful[first]
    if "flash-linear-attention" in others:
        delta = MemoryLayer(dim, heads[0], chunk, design="gated-deltanet")
        steps[f"nestlearn, gated delta rule, one linear memory, {_heads(heads[0])}"] = peers.training(
            lambda x: delta(x)[0]
        )
    for peer in others:
        steps |= peers.blocks(peer, dim, heads[0], chunk)
    x = torch.randn(batch, seq, dim)
    runs: dict[str, Run] = ceilings(product, megabytes)
    runs |= {name: _on(step, x) for name, step in steps.items()}
    seconds = in_turns(runs, rounds, budget)
    theirs = [name for name in steps if not name.startswith("nestlearn")]
    limits = rates(seconds, product, megabytes)
    found = rows(seconds, theirs, batch * seq)
    for row in found:
        if row["name"] in useful:
            reached = useful[row["name"]] * batch * seq / row["best"] / 1e9
            row |= {"operations_per_token": useful[row["name"]], "of_product": reached / limits["gflops"]}
    return {"machine": before, "ceilings": limits, "rows": found, "not_run": peers.not_run()}


@torch.no_grad()
def one_token(
    dim: int, chunk: int, tokens: int, heads: Sequence[int], others: Sequence[str], rounds: int, budget: float
) -> dict[str, Any]:
    """A cell: ``tokens`` tokens of one sequence, one a call, the state carried, after one chunk at once."""
    torch.manual_seed(0)
    before = machine()
    x = torch.randn(1, chunk + tokens, dim)
    runs: dict[str, Run] = {}
    for memory in ("mlp", "linear"):
        for n in heads:
            layer = SelfReferentialTitans(dim, n, chunk, memory=memory)  # type: ignore[arg-type]
            name = f"nestlearn, five {'MLP' if memory == 'mlp' else memory} memories, {_heads(n)}"
            runs[name] = _stream(layer, x, chunk)
    first = next(iter(runs))
    runs[first + AGAIN] = runs[first]
    if "titans-pytorch" in others:
        memory = peers.titans_memory(dim, chunk)
        runs["titans-pytorch, one MLP memory"] = _stream(lambda t, state: memory(t, state=state), x, chunk)
    if "nested-learning" in others:
        own = peers.nested_memory(dim, chunk)
        runs["nested-learning, five MLP memories"] = _stream(
            lambda t, state: own.forward_with_updates(t, own.init_fast_state() if state is None else state), x, chunk
        )
    seconds = in_turns(runs, rounds, budget)
    theirs = [name for name in runs if not name.startswith("nestlearn")]
    return {"machine": before, "rows": rows(seconds, theirs, tokens), "not_run": peers.not_run()}


def _on(step: peers.Step, x: Tensor) -> Run:
    return lambda: step(x.clone().requires_grad_())


def _stream(layer: Callable[..., Any], x: Tensor, chunk: int) -> Run:
    """The tokens after the first chunk, one a call, each time from the same state."""
    _, begun = layer(x[:, :chunk], None)

    def run() -> None:
        state = begun
        for t in range(chunk, x.shape[1]):
            _, state = layer(x[:, t : t + 1], state)

    return run


def _heads(n: int) -> str:
    return f"{n} head{'s' if n > 1 else ''}"

"""The public implementations that the speed suite times beside ours, each optional.

Of every peer a block that does as near the same work as it can: x (B, T, D) to y (B, T, D). What differs is in the
candidate's name: how many memories, whether there is a backward pass.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Step = Callable[[Tensor], object]


class Peer(NamedTuple):
    """A package, the other module it needs, and how to install both."""

    package: str
    needs: str
    install: str


PEERS = {
    "titans-pytorch": Peer("titans_pytorch", "einops", "pip install titans-pytorch==0.5.5"),
    # Its metadata excludes transformers 5, which it runs with.
    "nested-learning": Peer(
        "nested_learning", "omegaconf", "pip install omegaconf && pip install --no-deps nested-learning==0.2.0"
    ),
    "flash-linear-attention": Peer("fla", "einops", "pip install flash-linear-attention einops"),
}


def installed() -> dict[str, str]:
    """The peers that are there, and their versions."""
    there = {n: p for n, p in PEERS.items() if all(importlib.util.find_spec(m) for m in (p.package, p.needs))}
    return {name: version(name) for name in there}


def not_run() -> dict[str, str]:
    """Why the other peers are not timed."""
    there = installed()
    return {name: f"not installed: {peer.install}" for name, peer in PEERS.items() if name not in there}


def training(block: Callable[[Tensor], Tensor]) -> Step:
    """Forward and backward of ``block``."""
    return lambda x: block(x).square().mean().backward()


def blocks(peer: str, dim: int, heads: int, chunk: int) -> dict[str, Step]:
    """What a peer can train, or failing that run, by the name of the candidate. Each takes x with gradient."""
    return {"titans-pytorch": _titans, "nested-learning": _nested, "flash-linear-attention": _fla}[peer](
        dim, heads, chunk
    )


def _titans(dim: int, heads: int, chunk: int) -> dict[str, Step]:
    memory = titans_memory(dim, chunk)
    return {"titans-pytorch, one MLP memory": training(lambda x: memory(x)[0])}


def titans_memory(dim: int, chunk: int) -> Any:
    """One MLP memory of two layers and hidden width ``dim``, re-linearised every chunk, no momentum, one head."""
    from titans_pytorch import NeuralMemory

    return NeuralMemory(
        dim=dim,
        default_model_kwargs={"depth": 2, "expansion_factor": 1.0},
        chunk_size=chunk,
        batch_size=chunk,
        momentum=False,
    )


def _nested(dim: int, heads: int, chunk: int) -> dict[str, Step]:
    from nested_learning.fast_state import build_block_fast_state
    from nested_learning.hope.block import HOPESelfModBlock, HOPESelfModBlockConfig
    from nested_learning.levels import LevelSpec

    layer = nested_memory(dim, chunk)
    levels = [LevelSpec("fast", 8), LevelSpec("middle", 32), LevelSpec("slow", 128)]
    block = HOPESelfModBlock(
        HOPESelfModBlockConfig(
            dim=dim, cms_levels=levels, selfmod_chunk_size=8, selfmod_chunk_size_memory=64, selfmod_use_skip=False
        )
    )

    def step(x: Tensor) -> None:
        """A pass that reads, with its gradient; then the pass in which it writes, which has none."""
        y = block(x)
        y.retain_grad()
        y.square().mean().backward()
        with torch.no_grad():
            state = build_block_fast_state(
                titan_module=None,
                cms_blocks=dict(block.cms.blocks.items()),
                selfmod_module=block.selfmod,
                specs=levels,
                optimizer_configs={},
                default_lr=1e-3,
            )
            block(x, teach_signal=y.grad, fast_state=state)

    return {
        "nested-learning, five MLP memories, no backward exists": lambda x: layer.forward_with_updates(
            x, layer.init_fast_state()
        ),
        "nested-learning, Hope block in two passes": step,
    }


def nested_memory(dim: int, chunk: int) -> Any:
    """Five MLP memories with self-modification, which it runs under ``no_grad`` only."""
    from nested_learning.titan.self_modifying import SelfModifyingTitans, SelfModifyingTitansConfig

    config = SelfModifyingTitansConfig(dim=dim, chunk_size_other=chunk, chunk_size_memory=chunk, use_skip=False)
    return SelfModifyingTitans(config)


class GatedDeltaBlock(nn.Module):
    """flash-linear-attention's naive gated delta rule between the projections that ours has too."""

    def __init__(self, rule: Callable[..., tuple[Tensor, Any]], dim: int, heads: int, chunk: int) -> None:
        super().__init__()
        self.rule, self.heads, self.chunk = rule, heads, chunk
        names = {"q": dim, "k": dim, "v": dim, "gate": dim, "out": dim, "beta": heads, "decay": heads}
        self.project = nn.ModuleDict({name: nn.Linear(dim, size, bias=False) for name, size in names.items()})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.project[name](x).unflatten(-1, (self.heads, -1)) for name in ("q", "k", "v"))
        beta, decay = self.project["beta"](x).sigmoid(), F.logsigmoid(self.project["decay"](x))
        y, _ = self.rule(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, beta=beta, g=decay, chunk_size=self.chunk)
        return self.project["out"](y.flatten(-2) * self.project["gate"](x).sigmoid())


def _fla(dim: int, heads: int, chunk: int) -> dict[str, Step]:
    rule = _naive("gated_delta_rule").naive_chunk_gated_delta_rule
    block = GatedDeltaBlock(rule, dim, heads, chunk)
    return {f"flash-linear-attention, naive gated delta rule, one linear memory, {heads} heads": training(block)}


def _naive(operation: str) -> ModuleType:
    """The file of a naive operation alone: the package itself needs Triton."""
    import fla

    path = next(p for p in (Path(f) / "ops" / operation / "naive.py" for f in fla.__path__) if p.exists())
    spec = importlib.util.spec_from_file_location(f"fla_naive_{operation}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

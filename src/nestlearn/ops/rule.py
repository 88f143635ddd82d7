"""The rule by which a self-referential core writes itself, and what its outer level gives it (section 8)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.errors import UserError, nearest
from nestlearn.memory import objectives
from nestlearn.memory.structures import Weights

PROJECTIONS = ("eta", "alpha", "k", "v", "q")
"""What a memory may generate in place of a static projection, in the order in which states are packed."""
GATES = ("eta", "alpha")
MEMORY = "memory"
"""The name of the main memory, the one that is read to give the output (Eq. 83, 86)."""
REACH = 1000.0
"""How many times the norm limit heads may grow to that are given their values (`Start.accumulates`)."""


@dataclass(frozen=True)
class WriteRule:
    """Switches of the update of Eq. 88/90. ``WriteRule.printed()`` is the paper's letter.

    Args:
        chunk_size: tokens between two anchors of the main memory.
        chunk_size_other: the same for the memories of k, v, q, eta, alpha; None means ``chunk_size``.
        objective: internal objective, ``"dot"`` (Eq. 92), ``"l2"`` (Eq. 88, 93), or an Lp one such as ``"l3"``.
        read: ``"anchor"`` reads the main memory as it was at the end of the previous chunk (Eq. 90);
            ``"inclusive"`` reads it after the current token was written.
        delta: whether ``eta k k^T`` erases along the key (DGD); without it the core writes by gradient descent.
        decay: whether ``alpha`` is applied; without it everything is retained.
        self_values: whether each memory generates its own value (Eq. 84); without it the memories of width d
            share ``v``, and the gates, for which ``v`` has the wrong width, keep generating theirs. For DGD only.
        retention: ``"zero"`` lets ``alpha`` and the erasure pull the weights toward zero (Eq. 88),
            ``"start"`` toward their learned initial state: only what was learned in context fades.
        eta_max: upper end of the step size, in units of ``alpha`` if ``bounded`` (dimensionless, keys have norm 1).
        stretch: how far the sigmoid of the step size reaches beyond 0 and ``eta_max``, where it is cut, in units of
            ``eta_max``; with 0 it never reaches them. Steps of exactly 2 turn a sign again and again without a loss.
        bounded: whether ``eta`` is in units of ``alpha``, which with ``eta_max <= 2`` makes every transition
            ``alpha I - eta k k^T`` non-expansive.
        normalize_v: whether values are scaled to unit length before they are written.
        clip_values: whether self-generated values longer than 1 are scaled to length 1. A memory whose values
            come from itself amplifies them otherwise, chunk after chunk.
        norm_limit: bound on the root mean square singular value of what each weight matrix has learned in
            context, enforced at its chunk boundaries; None leaves the state unbounded.
        update: by which rule of :mod:`nestlearn.memory.rules` the core is written. ``"dgd"`` (Eq. 88) goes with every
            switch above. A linear main memory with nothing beside it may also learn by ``"delta"`` (Eq. 65) or
            ``"oja"`` (Eq. 66, 67), whose error is that of every single token whatever the chunk size, or by
            ``"omega"`` (Eq. 68), whose gradients are taken at the anchor.
        window: pairs in each step of the Omega rule, in tokens, the current one included; each weighs 1 / window.

    >>> WriteRule.printed(chunk_size=16).retention
    'zero'
    """

    chunk_size: int = 64
    chunk_size_other: int | None = None
    objective: str = "dot"
    read: Literal["anchor", "inclusive"] = "inclusive"
    delta: bool = True
    decay: bool = True
    self_values: bool = True
    retention: Literal["zero", "start"] = "start"
    eta_max: float = 2.0
    stretch: float = 0.0
    bounded: bool = True
    normalize_v: bool = True
    clip_values: bool = True
    norm_limit: float | None = 2.0
    update: Literal["dgd", "delta", "oja", "omega"] = "dgd"
    window: int = 1

    def __post_init__(self) -> None:
        for name in ("chunk_size", "chunk_size_other", "window"):
            size = getattr(self, name)
            if size is not None and (not isinstance(size, int) or size < 1):
                raise UserError(f"{name} must be a positive number of tokens, got {size!r}")
        objectives.get(self.objective)
        for name, allowed in (
            ("read", ("anchor", "inclusive")),
            ("retention", ("zero", "start")),
            ("update", ("dgd", "delta", "oja", "omega")),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(f"unknown {name} {getattr(self, name)!r}: {nearest(getattr(self, name), allowed)}")
        if self.update in ("delta", "oja") and self.objective != "dot":
            raise UserError(
                f"update={self.update!r} has an objective of its own: leave objective={self.objective!r} out"
            )
        if not 0 < self.eta_max < math.inf:
            raise UserError(f"eta_max must be positive and finite, got {self.eta_max}")
        if not 0 <= self.stretch < math.inf:
            raise UserError(f"stretch must be a finite number from 0 on, got {self.stretch}")
        if self.norm_limit is not None and not 0 < self.norm_limit < math.inf:
            raise UserError(f"norm_limit must be positive and finite, or None, got {self.norm_limit}")

    @classmethod
    def printed(cls, chunk_size: int = 16, **changes: object) -> WriteRule:
        """The letter of Eq. 88-90: L2 objective, anchor reads, decay toward zero, nothing bounded."""
        letter: dict[str, object] = {
            "objective": "l2",
            "read": "anchor",
            "retention": "zero",
            "eta_max": 1.0,
            "bounded": False,
            "normalize_v": False,
            "clip_values": False,
            "norm_limit": None,
        }
        return cls(chunk_size=chunk_size, **{**letter, **changes})  # type: ignore[arg-type]

    @property
    def erases(self) -> bool:
        """Whether a write erases along its key, which takes a triangular solve."""
        return self.update in ("delta", "oja") or (self.update == "dgd" and self.delta)

    @property
    def other(self) -> int:
        """Tokens between two anchors of the projection memories."""
        return self.chunk_size_other or self.chunk_size


@dataclass
class Start:
    """What the outer level learns and hands to the core: the state of every memory before the first token.

    Args:
        weights: initial weights of each memory by name, leading dimension H (heads). ``"memory"`` is always
            there; a name of ``PROJECTIONS`` that is absent must be *given* to the core as a tensor.
        bias: added to the raw ``"eta"`` and ``"alpha"`` before their sigmoid, each (H,).
        write_scale: factor on the writes of a memory, each (H,); absent means 1. Small factors restrain
            self-modification without slowing the forgetting.
        momentum: retained fraction b of the inner update ``S_t = b S_{t-1} - eta grad`` in (0, 1), (H,), or None.
        erase: share of the erasure ``eta k k^T`` that a head applies, in [0, 1], (H,); None means all of it.
        accumulates: heads whose main memory is written with values as they are given, not with self-generated ones,
            and has `REACH` times the norm limit, (H,) bool; None means no head. Linear memories alone have such heads.
    """

    weights: dict[str, Weights]
    bias: dict[str, Tensor]
    write_scale: dict[str, Tensor] = field(default_factory=dict)
    momentum: Tensor | None = None
    erase: Tensor | None = None
    accumulates: Tensor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The memories in packing order, the main memory last."""
        return (*(name for name in PROJECTIONS if name in self.weights), MEMORY)


def unit(x: Tensor) -> Tensor:
    """``x / ||x||`` over the last dimension, smooth at zero and never longer than 1."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def clip(values: Tensor, rule: WriteRule) -> Tensor:
    """Self-generated values (..., d), none longer than 1 if the rule says so."""
    if not rule.clip_values:
        return values
    return values * torch.rsqrt(values.square().sum(-1, keepdim=True).clamp_min(1.0))


def gates(raw_eta: Tensor, raw_alpha: Tensor | None, start: Start, rule: WriteRule) -> tuple[Tensor, Tensor]:
    """Step sizes and logarithms of the retained fractions, (B, H, T) each, from raw gates of that shape.

    A rule without decay needs no raw ``alpha`` and everything is retained.
    """
    eta = rule.eta_max * stretched(torch.sigmoid(raw_eta + start.bias["eta"][:, None]), rule.stretch).clamp(0, 1)
    if not rule.decay:
        return eta, torch.zeros_like(eta)
    assert raw_alpha is not None
    log_alpha = F.logsigmoid(raw_alpha + start.bias["alpha"][:, None]).clamp_min(-60)  # 1 / alpha stays finite
    return (eta * log_alpha.exp() if rule.bounded else eta), log_alpha


def stretched(opened: Tensor, stretch: float) -> Tensor:
    """A gate between 0 and 1 over the range from ``-stretch`` to ``1 + stretch``."""
    return (1 + 2 * stretch) * opened - stretch if stretch else opened


def limit(weights: Tensor, norm_limit: float | None) -> Tensor:
    """Scale matrices (..., m, n) so that their root mean square singular value is at most ``norm_limit``."""
    if norm_limit is None or not exceeds([weights], norm_limit):
        return weights
    return weights * shrink(weights.square().sum((-2, -1), keepdim=True), weights.shape[-2:], norm_limit)


def transformed() -> bool:
    """Whether a transform of `torch.func` is at work (grad, vmap, jvp), which goes through no hand-written node."""
    return torch._C._are_functorch_transforms_active()


def may_look(t: Tensor) -> bool:
    """Whether what is done may depend on a value: on an accelerator to look is to wait, and vmap and torch.export do
    not allow it."""
    return t.device.type == "cpu" and not transformed() and not torch.compiler.is_exporting()


def exceeds(blocks: Iterable[Tensor], norm_limit: float | Tensor) -> bool:
    """Whether any matrix (..., m, n) is past the limit, or may be where one does not look."""
    return any(
        not may_look(w)
        or bool((torch.linalg.vector_norm(w.detach(), dim=(-2, -1)) > norm_limit * min(w.shape[-2:]) ** 0.5).any())
        for w in blocks
    )


def shrink(squares: Tensor, shape: tuple[int, ...], norm_limit: float | Tensor) -> Tensor:
    """The factor, at most 1, that keeps matrices of ``shape`` (m, n) with summed ``squares`` to the limit."""
    most = norm_limit**2 * min(shape)
    return (most / squares.clamp(min=most)).sqrt()

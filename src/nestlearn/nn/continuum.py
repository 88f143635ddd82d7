"""The continuum memory system (CMS): a chain of MLPs, each with its own update frequency (Eq. 70).

Shapes: B rows, T tokens, D channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.errors import UserError, nearest

ACTIVATIONS = ("swiglu", "mlp")
VARIANTS = ("sequential", "nested", "independent")


class ContinuumLevel(nn.Module):
    """One level: the residual MLP ``h + W_down(act(norm(h)))`` and the chunk size at which it may be updated.

    Args:
        dim: channels D.
        hidden: hidden width, in channels.
        chunk_size: tokens between two updates of this level; the inverse of its update frequency.
        activation: "swiglu" for ``silu(W_gate x) * W_up x``, "mlp" for ``silu(W_up x)`` (two matrices).
        norm_eps: added to the mean square inside the norm.
    """

    def __init__(self, dim: int, hidden: int, chunk_size: int, activation: str, norm_eps: float) -> None:
        super().__init__()
        self.chunk_size = chunk_size
        self.norm = nn.RMSNorm(dim, eps=norm_eps)
        self.gate = nn.Linear(dim, hidden, bias=False) if activation == "swiglu" else None
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def extra_repr(self) -> str:
        return f"chunk_size={self.chunk_size}"

    def forward(self, h_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        x_BTD = self.norm(h_BTD)
        if self.gate is None:
            return h_BTD + self.down(F.silu(self.up(x_BTD)))
        return h_BTD + self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class ContinuumMemory(nn.Module):
    """Chain of residual MLP levels from fast to slow, ``y = MLP_k(... MLP_1(x))`` (Eq. 70).

    Each level has its own norm. The levels are static inside a sequence: the outer optimizer trains all of
    them. One level is the plain pre-norm residual MLP of a Transformer.

    Args:
        dim: channels D.
        chunk_sizes: tokens between two updates of each level, fast to slow, so in increasing order.
        variant: how the levels are joined; only "sequential" (Eq. 73) exists so far.
        hidden: hidden width of all levels together, in channels; every level gets an equal share. None gives
            each level 4 ``dim``.
        activation: "swiglu", or "mlp" for the paper's two-layer MLP.
        norm_eps: added to the mean square inside each norm.

    Raises:
        UserError: an unknown or not yet existing variant, an unknown activation, chunk sizes that are not
            positive or not in increasing order, or a hidden width that does not split evenly.

    >>> import torch
    >>> ContinuumMemory(8, chunk_sizes=[16, 64])(torch.randn(2, 5, 8))[0].shape
    torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        dim: int,
        chunk_sizes: Sequence[int],
        variant: Literal["sequential", "nested", "independent"] = "sequential",
        *,
        hidden: int | None = None,
        activation: Literal["swiglu", "mlp"] = "swiglu",
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        sizes = list(chunk_sizes)
        if variant not in VARIANTS:
            raise UserError(f"unknown ContinuumMemory variant {variant!r}: {nearest(variant, VARIANTS)}")
        if variant != "sequential":
            raise UserError(f"ContinuumMemory variant {variant!r} does not exist yet: use 'sequential'")
        if activation not in ACTIVATIONS:
            raise UserError(f"unknown activation {activation!r}: {nearest(activation, ACTIVATIONS)}")
        if not sizes or any(type(size) is not int or size < 1 for size in sizes) or sizes != sorted(sizes):
            raise UserError(
                f"chunk_sizes={sizes}: give at least one positive integer, in tokens, ordered fast to slow "
                "(increasing), e.g. [64, 512, 4096]"
            )
        hidden = 4 * dim * len(sizes) if hidden is None else hidden
        share, rest = divmod(hidden, len(sizes))
        if share < 1 or rest:
            raise UserError(
                f"hidden={hidden} does not split evenly over {len(sizes)} levels: use a positive multiple "
                f"of {len(sizes)}, e.g. {max(share, 1) * len(sizes)}"
            )
        self.variant = variant
        self.levels = nn.ModuleList(ContinuumLevel(dim, share, size, activation, norm_eps) for size in sizes)

    def forward(self, x_BTD: Float[Tensor, "B T D"], state: None = None) -> tuple[Float[Tensor, "B T D"], None]:
        """Apply the chain. The state is None in and out: the static chain remembers nothing of a sequence."""
        for level in self.levels:
            x_BTD = level(x_BTD)
        return x_BTD, state

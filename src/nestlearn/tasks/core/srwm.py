"""The self-referential weight matrix of Irie et al. 2022: the baseline that is trained token by token.

Shapes: B rows, T tokens, D channels, H heads of width d = D / H, R = 3 d + 4 rows of the matrix.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from nestlearn.errors import UserError
from nestlearn.nn import ContinuumMemory


class SelfReferentialMatrix(nn.Module):
    """One matrix a head that makes its own output, keys and learning rates, and rewrites itself with each token.

        (y, k, q, b) = W phi(x),    W <- W + sigmoid(b) (W phi(q) - W phi(k)) phi(k)^T,    phi = softmax

    The four learning rates ``b`` are of the rows of y, k, q and b. The parameter is the matrix before the first token.

    Args:
        dim: channels D.
        heads: H, a divisor of ``dim``; every head reads its own channels of x.

    Raises `UserError` if ``heads`` does not divide ``dim``.

    >>> SelfReferentialMatrix(8, heads=2)(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        if dim < 1 or heads < 1 or dim % heads:
            raise UserError(f"heads={heads} must divide dim={dim}")
        self.heads, self.width = heads, dim // heads
        self.rows = (self.width, self.width, self.width, 4)
        # phi is a distribution over d channels, so W phi has about the scale of W / sqrt(d). Of the scales 0.25, 1, 4
        # the last learned Parity soonest: the keys, distributions too, then differ from the first step on.
        self.start = nn.Parameter(4 * torch.randn(heads, sum(self.rows), self.width))
        self.out = nn.Linear(dim, dim, bias=False)
        nn.init.normal_(self.out.weight, std=1 / math.sqrt(dim))
        kinds = [kind for kind, count in enumerate(self.rows) for _ in range(count)]
        self.register_buffer("kinds", torch.tensor(kinds), persistent=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Read and rewrite along ``x_BTD`` (B, T, D)."""
        B = x_BTD.shape[0]
        phi_TBHd = x_BTD.unflatten(-1, (self.heads, self.width)).softmax(-1).transpose(0, 1)
        W = self.start.expand(B, -1, -1, -1)
        outputs = []
        for phi in phi_TBHd:
            y, k, q, b = (W @ phi[..., None]).squeeze(-1).split(self.rows, dim=-1)
            keys = torch.stack([k, q], dim=-1).softmax(-2)  # (B, H, d, 2)
            old, new = (W @ keys).unbind(-1)
            rate = b.sigmoid()[..., self.kinds]  # (B, H, R)
            W = W + (rate * (new - old))[..., None] * keys[..., 0][..., None, :]
            outputs.append(y)
        return self.out(torch.stack(outputs, dim=1).flatten(-2))


class SelfReferentialModel(nn.Module):
    """Embedding, blocks of `SelfReferentialMatrix` and a SwiGLU MLP, and a final norm: (B, T) -> (B, T, dim).

    Args:
        vocabulary: number of symbols.
        dim, layers, heads: width in channels, number of blocks, heads of each.
        intermediate: hidden width of the MLPs, in channels.

    >>> SelfReferentialModel(5, dim=8, layers=1, heads=2, intermediate=16)(torch.tensor([[1, 2]])).shape
    torch.Size([1, 2, 8])
    """

    def __init__(self, vocabulary: int, dim: int, layers: int, heads: int, intermediate: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim)
        self.norms = nn.ModuleList(nn.RMSNorm(dim, eps=1e-6) for _ in range(layers))
        self.mixers = nn.ModuleList(SelfReferentialMatrix(dim, heads) for _ in range(layers))
        self.memories = nn.ModuleList(ContinuumMemory(dim, [1], hidden=intermediate) for _ in range(layers))
        self.norm = nn.RMSNorm(dim, eps=1e-6)

    def forward(self, tokens: Tensor) -> Tensor:
        """Hidden states of every token."""
        x = self.embed(tokens)
        for norm, mixer, memory in zip(self.norms, self.mixers, self.memories, strict=True):
            x = memory(x + mixer(norm(x)))[0]
        return self.norm(x)

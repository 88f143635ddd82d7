"""Where a memory keeps what it knows: a matrix, a two-layer MLP or a gated one (Definition 1, Eq. 6).

A structure is stateless; its weights travel as a tuple of tensors. Column convention: ``W`` is
(d_out, d_in) and ``y = W x``; tokens are rows, so a batch of tokens is (..., T, d) and reads are ``X W^T``.

The gradient of every weight is a sum of rank-one terms ``left_t right_t^T``. ``factors`` returns those rows
in closed form; it is all that the learning rules and the chunk-parallel forms need.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.errors import UserError
from nestlearn.memory.objectives import Objective

Weights = tuple[Tensor, ...]
Factors = tuple[tuple[Tensor, Tensor], ...]


def silu_derivative(z: Tensor) -> Tensor:
    """The derivative of ``silu(z) = z sigmoid(z)``."""
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


class _Memory:
    """What both structures share, given ``read`` and ``factors``."""

    def read(self, weights: Weights, x: Tensor) -> Tensor:
        raise NotImplementedError

    def factors(self, weights: Weights, k: Tensor, error: Tensor) -> Factors:
        raise NotImplementedError

    def objective(self, weights: Weights, k: Tensor, v: Tensor, objective: Objective) -> Tensor:
        """The summed internal objective of the pairs ``k`` (..., T, d_in), ``v`` (..., T, d_out): (...)."""
        return objective.value(self.read(weights, k), v).sum(-1)

    def gradient(self, weights: Weights, k: Tensor, v: Tensor, objective: Objective) -> Weights:
        """The gradient of ``objective`` with respect to each weight, in closed form, same shapes as ``weights``."""
        error = objective.error(self.read(weights, k), v)
        return tuple(left.mT @ right for left, right in self.factors(weights, k, error))


@dataclass(frozen=True)
class LinearMemory(_Memory):
    """A matrix-valued memory ``M(x) = W x`` with weights ``(W,)``, W of shape (..., d_out, d_in).

    >>> import torch
    >>> LinearMemory(2, 2).read((torch.eye(2),), torch.ones(3, 2)).shape
    torch.Size([3, 2])
    """

    d_in: int
    d_out: int

    def init(self, heads: tuple[int, ...] = (), generator: torch.Generator | None = None) -> Weights:
        """Random weights of variance 1/d_in, shapes ``(*heads, d_out, d_in)``."""
        return (torch.randn(*heads, self.d_out, self.d_in, generator=generator) / math.sqrt(self.d_in),)

    def read(self, weights: Weights, x: Tensor) -> Tensor:
        """``W x`` for every row of ``x`` (..., T, d_in): (..., T, d_out)."""
        return x @ weights[0].mT

    def factors(self, weights: Weights, k: Tensor, error: Tensor) -> Factors:
        """Rows of the rank-one gradients for keys ``k`` and errors at the output: ``error_t k_t^T``."""
        return ((error, k),)


@dataclass(frozen=True)
class MLPMemory(_Memory):
    """A two-layer memory ``M(x) = x + W1 silu(W2 x)`` (Eq. 89, 91) with weights ``(W1, W2)``.

    W1 is (..., d_out, d_hidden), W2 is (..., d_hidden, d_in). Unless ``skip`` says otherwise the residual is there
    if ``d_in == d_out``: a memory of the gates maps d numbers to one and has none.

    >>> import torch
    >>> memory = MLPMemory(4, 1, d_hidden=8)
    >>> memory.read(memory.init(), torch.ones(3, 4)).shape
    torch.Size([3, 1])
    """

    d_in: int
    d_out: int
    d_hidden: int
    skip: bool | None = None

    def __post_init__(self) -> None:
        if self.skip and self.d_in != self.d_out:
            raise UserError(f"skip=True adds {self.d_in} channels of input to {self.d_out} of output: leave it out")

    @property
    def residual(self) -> bool:
        """Whether the input is added to the output."""
        return self.d_in == self.d_out if self.skip is None else self.skip

    def init(self, heads: tuple[int, ...] = (), generator: torch.Generator | None = None) -> Weights:
        """Random weights of variance 1/fan_in."""
        w1 = torch.randn(*heads, self.d_out, self.d_hidden, generator=generator) / math.sqrt(self.d_hidden)
        w2 = torch.randn(*heads, self.d_hidden, self.d_in, generator=generator) / math.sqrt(self.d_in)
        return w1, w2

    def read(self, weights: Weights, x: Tensor) -> Tensor:
        """``x + W1 silu(W2 x)`` for every row of ``x`` (..., T, d_in): (..., T, d_out)."""
        w1, w2 = weights
        y = F.silu(x @ w2.mT) @ w1.mT
        return x + y if self.residual else y

    def factors(self, weights: Weights, k: Tensor, error: Tensor) -> Factors:
        """Rows ``error_t h_t^T`` for W1 and ``delta_t k_t^T`` for W2, where
        ``z = W2 k``, ``h = silu(z)`` and ``delta = (W1^T error) * silu'(z)``."""
        w1, w2 = weights
        z = k @ w2.mT
        return (error, F.silu(z)), ((error @ w1) * silu_derivative(z), k)


@dataclass(frozen=True)
class SwiGLUMemory(_Memory):
    """A gated memory ``M(x) = W1 (silu(W3 x) * W2 x)``, a Transformer's SwiGLU MLP, with weights ``(W1, W2, W3)``.

    W1 is (..., d_out, d_hidden), W2 and W3, the gate, are (..., d_hidden, d_in). There is no residual.

    >>> import torch
    >>> memory = SwiGLUMemory(4, 4, d_hidden=8)
    >>> memory.read(memory.init(), torch.ones(3, 4)).shape
    torch.Size([3, 4])
    """

    d_in: int
    d_out: int
    d_hidden: int

    def init(self, heads: tuple[int, ...] = (), generator: torch.Generator | None = None) -> Weights:
        """Random weights of variance 1/fan_in."""
        w1 = torch.randn(*heads, self.d_out, self.d_hidden, generator=generator) / math.sqrt(self.d_hidden)
        into = [torch.randn(*heads, self.d_hidden, self.d_in, generator=generator) for _ in range(2)]
        return w1, into[0] / math.sqrt(self.d_in), into[1] / math.sqrt(self.d_in)

    def read(self, weights: Weights, x: Tensor) -> Tensor:
        """``W1 (silu(W3 x) * W2 x)`` for every row of ``x`` (..., T, d_in): (..., T, d_out)."""
        w1, w2, w3 = weights
        return (F.silu(x @ w3.mT) * (x @ w2.mT)) @ w1.mT

    def factors(self, weights: Weights, k: Tensor, error: Tensor) -> Factors:
        """Rows of the rank-one gradients, with ``z = W3 k``, ``u = W2 k`` and ``g = W1^T error``:
        ``error_t (silu(z) * u)_t^T``, ``(g * silu(z))_t k_t^T``, ``(g * u * silu'(z))_t k_t^T``."""
        w1, w2, w3 = weights
        z, u, g = k @ w3.mT, k @ w2.mT, error @ w1
        gate = F.silu(z)
        return (error, gate * u), (g * gate, k), (g * u * silu_derivative(z), k)

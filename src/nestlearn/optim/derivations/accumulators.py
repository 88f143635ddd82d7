"""The parts of an optimizer seen as memories (appendix B): what accumulates gradients, and how it is read.

Every accumulator takes one gradient-descent step on an internal objective of `nestlearn.memory` per gradient. A
running sum descends the dot product; an exponential average descends the regression loss with the step ``1 - beta``;
the statistics of Shampoo are a matrix memory written by the Hebbian rule. Eq. 102 reads them into an update.

Shapes: an element-wise memory has the shape of the parameter; a matrix memory of a dimension of size d is (d, d).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nestlearn.memory import LinearMemory, objectives
from nestlearn.memory.objectives import Objective

ELEMENTS = "element-wise, shape of W"


@dataclass(frozen=True)
class Memory:
    """What one memory of an optimizer is: strings for a reader, numbers for a program.

    Args:
        name: its name in the recurrence.
        structure: what it is made of.
        objective: the internal objective that one write descends.
        rule: the learning rule of that write.
        key, value: the pair that is stored; g is the gradient, W the parameter. Without a key the value is stored as
            it is; of a layer ``y = W x`` the gradient is itself a pair, ``g = delta x^T`` (Eq. 34).
        step_size: step of the write on its objective.
        retention: fraction of the memory that one write keeps; 1 keeps everything.
        frequency: writes per step of the optimizer.

    >>> Memory("m", ELEMENTS, "-<m, g>", "gradient descent", "none", "g", step_size=1.0, retention=0.9).frequency
    1.0
    """

    name: str
    structure: str
    objective: str
    rule: str
    key: str
    value: str
    step_size: float
    retention: float
    frequency: float = 1.0


@dataclass(frozen=True)
class Accumulator(Memory):
    """An element-wise memory that runs: ``write`` is one step of gradient descent on its objective after a decay.

    Args:
        loss: the internal objective; see `Memory` for the other fields.
        decay: factor of the memory before the step; ``retention`` is what decay and step together keep.
        monotone: project the result on ``memory >= its former value``, so that nothing is ever forgotten (AMSGrad).

    >>> average("v", "g^2", 0.75).write(torch.tensor(0.0), torch.tensor(4.0))
    tensor(1.)
    """

    loss: Objective = field(default=objectives.l2, repr=False)
    decay: float = 1.0
    monotone: bool = False

    def write(self, memory: Tensor, value: Tensor) -> Tensor:
        """The memory after one more value; both of the parameter's shape."""
        kept = self.decay * memory
        written = kept - self.step_size * self.loss.error(kept, value)
        return torch.maximum(memory, written) if self.monotone else written

    def without_ridge(self, memory: Tensor, t: int) -> Tensor:
        """What the memory would hold after t writes without its pull to zero: Adam's bias correction.

        An average started at zero is the minimiser of ``sum_i w_i ||v - v_i||^2 + beta^t ||v||^2`` with the weights
        ``w_i = (1 - beta) beta^(t - i)``, which sum to ``1 - beta^t``.
        """
        return memory / (1 - self.retention**t)


def average(name: str, value: str, beta: float, key: str = "none") -> Accumulator:
    """An exponential average ``v <- beta v + (1 - beta) x`` as descent on ``1/2 ||v - x||^2`` with the step 1 - beta.

    >>> average("v", "g^2", 0.9).retention
    0.9
    """
    objective = f"1/2 ||{name} - {value}||^2"
    return Accumulator(name, ELEMENTS, objective, "gradient descent", key, value, 1 - beta, beta, loss=objectives.l2)


def running_sum(name: str, value: str, retention: float = 1.0, step_size: float = 1.0) -> Accumulator:
    """A sum with decay, ``m <- retention m + step x`` (Eq. 10-13, 33-34), as descent on ``-<m, x>``.

    >>> running_sum("m", "g", retention=0.5).write(torch.tensor(2.0), torch.tensor(3.0))
    tensor(4.)
    """
    return Accumulator(
        name,
        ELEMENTS,
        f"-<{name}, {value}>",
        "gradient descent",
        "none",
        value,
        step_size,
        retention,
        loss=objectives.dot_product,
        decay=retention,
    )


def running_maximum(name: str, value: str) -> Accumulator:
    """``H <- max(H, x)``: a full step on ``1/2 ||H - x||^2`` under the constraint that H never falls (AMSGrad)."""
    objective, rule = f"1/2 ||{name} - {value}||^2 with {name} not falling", "projected gradient descent"
    return Accumulator(name, ELEMENTS, objective, rule, "none", value, 1.0, 1.0, loss=objectives.l2, monotone=True)


@dataclass(frozen=True)
class MatrixAccumulator(Memory):
    """A matrix memory of the gradient's columns along one dimension: ``L <- retention L + step_size G G^T``.

    The Hebbian rule (Eq. 64), a step on ``-<L k, k>`` for every column k of the gradient, which is key and value.
    """

    def write(self, memory: Tensor, g: Tensor, dim: int) -> Tensor:
        """The memory (d, d) after a gradient whose dimension ``dim`` has the size d."""
        columns = unfold(g, dim).mT
        size = columns.shape[-1]
        (gradient,) = LinearMemory(size, size).gradient((memory,), columns, columns, objectives.dot_product)
        return self.retention * memory - self.step_size * gradient


def statistics(step_size: float, retention: float) -> tuple[MatrixAccumulator, MatrixAccumulator]:
    """The two matrix memories L and R of a gradient matrix G (d_out, d_in); other tensors have one per dimension."""
    left = ("L", "matrix d_out x d_out", "-sum <L k, k> over columns k of G", "Hebbian", "column of G", "column of G")
    right = ("R", "matrix d_in x d_in", "-sum <R k, k> over rows k of G", "Hebbian", "row of G", "row of G")
    return MatrixAccumulator(*left, step_size, retention), MatrixAccumulator(*right, step_size, retention)


def unfold(g: Tensor, dim: int) -> Tensor:
    """The matrix (d, everything else) of a tensor along its dimension ``dim`` of size d.

    >>> unfold(torch.zeros(2, 3, 4), 1).shape
    torch.Size([3, 8])
    """
    return g.movedim(dim, 0).reshape(g.shape[dim], -1)


def apply_along(matrix: Tensor, g: Tensor, dim: int) -> Tensor:
    """``matrix`` (d', d) applied to every vector of ``g`` along its dimension ``dim`` of size d.

    >>> apply_along(torch.ones(1, 3), torch.ones(2, 3), 1)
    tensor([[3.],
            [3.]])
    """
    return torch.tensordot(matrix, g, dims=([1], [dim])).movedim(0, dim)


def read_out(m: Tensor, h: Tensor, p: Tensor, ridge: Tensor | float) -> Tensor:
    """Eq. 102: ``M P / (H + lambda)``, the minimiser of ``sum_i ||m g_i - P||^2 + lambda ||m||^2`` (Eq. 101).

    ``m`` is the sum M of the gradients g_i, ``h`` the sum H of their squares (or the averages of both), ``p`` the
    target P and ``ridge`` lambda, all of the parameter's shape. An element that no gradient has reached reads 0.

    >>> read_out(torch.tensor([3.0, 0.0]), torch.tensor([9.0, 0.0]), torch.tensor([3.0, 0.0]), 0.0)
    tensor([1., 0.])
    """
    total = h + ridge
    return torch.where(total > 0, m * p / total, 0)


def symmetric_power(matrix: Tensor, exponent: float) -> Tensor:
    """A power of a symmetric positive matrix (d, d), as in ``L^(-1/4)``.

    >>> symmetric_power(torch.diag(torch.tensor([16.0, 1.0])), -0.25)
    tensor([[0.5000, 0.0000],
            [0.0000, 1.0000]])
    """
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.pow(exponent)) @ vectors.mT

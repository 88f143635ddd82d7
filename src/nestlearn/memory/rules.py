"""How a memory is written: learning rules, one pure step each (Eq. 5, 57-60, 64-68).

Every rule maps a matrix ``W`` (..., d_out, d_in) to the next one. Keys ``k`` are (..., d_in), values and
errors (..., d_out); step sizes ``eta`` and retained fractions ``alpha`` (1 = keep everything) are floats or
tensors of shape (...). Rules are differentiable in every argument.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from nestlearn.memory.objectives import Objective
from nestlearn.memory.structures import LinearMemory

Gate = float | Tensor
Matrix = Float[Tensor, "*b o i"]
Key = Float[Tensor, "*b i"]
Value = Float[Tensor, "*b o"]
Moment = Float[Tensor, "*b i i"]


def outer(left: Tensor, right: Tensor) -> Tensor:
    """``left right^T`` over the last dimensions: (..., d_out), (..., d_in) -> (..., d_out, d_in)."""
    return left.unsqueeze(-1) * right.unsqueeze(-2)


def _read(w: Tensor, k: Tensor) -> Tensor:
    return (w @ k.unsqueeze(-1)).squeeze(-1)


def _over(gate: Gate, dims: int) -> Gate:
    """A gate of shape (...) made to broadcast over ``dims`` trailing dimensions."""
    return gate[(...,) + (None,) * dims] if isinstance(gate, Tensor) else gate


def hebbian(w: Matrix, k: Key, v: Value, eta: Gate, alpha: Gate = 1.0) -> Matrix:
    """Hebbian rule with decay (Eq. 5, 64): ``alpha W + eta v k^T``, a gradient step on ``-<W k, v>``.

    >>> import torch
    >>> hebbian(torch.zeros(1, 2), torch.tensor([1.0, 0.0]), torch.tensor([3.0]), eta=0.5)
    tensor([[1.5000, 0.0000]])
    """
    return _over(alpha, 2) * w + _over(eta, 2) * outer(v, k)


def delta(w: Matrix, k: Key, v: Value, eta: Gate, alpha: Gate = 1.0) -> Matrix:
    """Delta rule (Eq. 65) after a decay: ``alpha W - eta (alpha W k - v) k^T``, the gated delta rule.

    For a unit key and ``eta = 1`` the new memory answers ``v`` exactly.
    """
    w = _over(alpha, 2) * w
    return w - _over(eta, 2) * outer(_read(w, k) - v, k)


def oja(w: Matrix, k: Key, v: Value, eta: Gate, alpha: Gate = 1.0) -> Matrix:
    """Oja's rule (Eq. 66-67): ``alpha W + eta v (k - W^T v)^T``, which normalises the memory as it writes."""
    return _over(alpha, 2) * w + _over(eta, 2) * outer(v, k - _read(w.mT, v))


def omega(w: Tensor, k: Tensor, v: Tensor, eta: Gate, gamma: Tensor, objective: Objective, alpha: Gate = 1.0) -> Tensor:
    """Omega rule (Eq. 68): one step on a window of the last c pairs, ``alpha W - eta sum_i gamma_i grad_i(W)``.

    Args:
        k, v: the window, (..., c, d_in) and (..., c, d_out), oldest first.
        gamma: weight of each pair, (..., c).
    """
    error = objective.error(k @ w.mT, v) * gamma.unsqueeze(-1)
    return _over(alpha, 2) * w - _over(eta, 2) * (error.mT @ k)


def dgd(w: Matrix, k: Key, error: Value, eta: Gate, alpha: Gate = 1.0) -> Matrix:
    """Delta gradient descent with weight decay (Eq. 57, 88): ``W (alpha I - eta k k^T) - eta error k^T``.

    ``error`` is the derivative of the loss with respect to ``W k``, taken at ``W`` or, in a chunk, at an
    earlier state. ``eta`` is the explicit step; see :func:`implicit_step` for the proximal one (Eq. 56).
    """
    return _over(alpha, 2) * w - _over(eta, 2) * outer(_read(w, k) + error, k)


def implicit_step(eta: Gate, k: Tensor) -> Gate:
    """The step ``eta / (1 + eta ||k||^2)`` that makes :func:`dgd` the exact minimiser of Eq. 56.

    >>> import torch
    >>> implicit_step(1.0, torch.tensor([1.0, 0.0]))
    tensor(0.5000)
    """
    return eta / (1 + eta * k.square().sum(-1))


def dgd_batch(w: Matrix, moment: Moment, gradient: Matrix, eta: Gate) -> Matrix:
    """:func:`dgd` on the mean over a batch: ``W (I - eta G) - eta gradient``.

    ``moment`` is G, the mean of ``k k^T``; ``gradient`` the mean of ``error k^T``, shaped like W.

    >>> dgd_batch(torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, 1), eta=0.5)
    tensor([[0.5000]])
    """
    return w - _over(eta, 2) * (w @ moment + gradient)


def proximal_dgd_batch(w: Matrix, moment: Moment, gradient: Matrix, eta: Gate) -> Matrix:
    """The exact minimiser of Eq. 56 on the mean over a batch: ``(W - eta gradient) (I + eta G)^-1``.

    Arguments as for :func:`dgd_batch`. For one key it is :func:`dgd` with :func:`implicit_step`. The step is lowered
    to at most ``1 / (100 eps trace(G))``, where rounding (eps) could otherwise make ``I + eta G`` indefinite: in
    float32 above ``eta * mean ||k||^2`` of about 80,000.

    >>> proximal_dgd_batch(torch.ones(1, 1), torch.ones(1, 1), torch.zeros(1, 1), eta=1.0)
    tensor([[0.5000]])
    """
    trace = moment.diagonal(dim1=-2, dim2=-1).sum(-1)
    most = 1 / (100 * torch.finfo(moment.dtype).eps * trace).clamp(min=torch.finfo(moment.dtype).tiny)
    step = _over(most.clamp(max=eta), 2)
    system = step * moment + torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    factor, _ = torch.linalg.cholesky_ex(system)  # unlike cholesky it does not wait for an accelerator
    return torch.cholesky_solve((w - step * gradient).mT, factor).mT


def ggd(
    w: Matrix,
    k: Key,
    value: Callable[[Tensor, Tensor], Tensor],
    objective: Objective,
    eta: Gate,
    alpha: Gate = 1.0,
    steps: int = 1,
) -> Matrix:
    """Generalised gradient descent (Definition 5, Eq. 59-60): explicit steps on
    ``objective(W k, u) + 1/(2 eta) ||W - alpha W_t||^2`` with the self-generated value ``u = value(W_t, k)``.

    One step from ``alpha W_t`` is ``alpha W_t - eta grad(alpha W_t)``; further steps also pull toward
    ``alpha W_t``. With a dot product this is gradient descent (Eq. 58).

    Args:
        value: maps ``(W_t, k)`` to the value u, (..., d_out); it is held constant during the steps.
    """
    u = value(w, k)
    anchor = _over(alpha, 2) * w
    memory, keys, values = LinearMemory(k.shape[-1], u.shape[-1]), k.unsqueeze(-2), u.unsqueeze(-2)
    w = anchor
    for _ in range(steps):
        (gradient,) = memory.gradient((w,), keys, values, objective)
        w = w - _over(eta, 2) * gradient - (w - anchor)
    return w

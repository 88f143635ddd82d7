"""The five ways in which knowledge moves from one block to another (section 3.3), as functions.

    direct            the other block's parameters, output or context are read; no gradient goes back
    backpropagation   one gradient flow through all blocks, each applies it at its own frequency: `descend`
    initialisation    one block learns where another begins: `adapt`, `initialisation` (MAML, Eq. 28)
    generation        one block makes the weights of another: `generate_weights` (a hypernetwork)

Parameters are dictionaries, as `torch.func.functional_call` takes them. Everything is differentiable unless it says
otherwise, so that the pieces can be put into one another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from nestlearn.errors import UserError, nearest

Parameters = dict[str, Tensor]
Pair = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


def direct(block: Callable[..., Any], x: Any, knowledge: Any) -> Any:
    """``block(x, knowledge)`` without a gradient to where the knowledge comes from (Eq. 24, 25, 27).

    Args:
        block: what reads.
        x: its own input; gradients to it, and to the block's parameters, are as ever.
        knowledge: of the other block. Parametric transfer hands over its parameters or state (Eq. 24) or its output
            (Eq. 25), non-parametric transfer its context, such as the keys and values of attention (Eq. 27). Tensors
            and states of this package's layers, or those in tuples, lists and dictionaries, are detached; other things
            are passed on as they are.

    >>> memory, query = torch.ones(1, 2, requires_grad=True), torch.ones(2, requires_grad=True)
    >>> direct(lambda q, m: m @ q, query, memory).sum().backward(); (memory.grad, query.grad)
    (None, tensor([1., 1.]))
    """
    return block(x, pytree.tree_map(lambda part: part.detach() if hasattr(part, "detach") else part, knowledge))


def descend(
    loss: Callable[[Parameters, Any], Tensor],
    parameters: Mapping[str, Tensor],
    contexts: Iterable[Any],
    lr: float,
    periods: Mapping[str, int] | None = None,
    first_order: bool = False,
) -> Parameters:
    """Gradient descent on one loss, in which every parameter is updated at its own frequency.

    The gradient flows through all blocks at every step; a parameter of period C applies the sum of the last C
    gradients at the steps C, 2C, ... (Eq. 71). With equal periods of 1 it is gradient descent on the composite. What
    is left of an unfinished chunk is dropped. This is the plain form, pure and differentiable; to train a model use
    `nestlearn.optim.LevelwiseOptimizer`, which under SGD gives the same numbers.

    Args:
        loss: of parameters and one context, a scalar.
        parameters: at the start, by name; they are not changed.
        contexts: one for each step.
        lr: step size, in units of the parameter per unit of gradient.
        periods: steps between two updates, by name of a parameter or of a block whose parameters begin with
            ``name.``; 1 for those that are left out.
        first_order: treat the gradients as constants where the result is differentiated.

    Returns:
        The parameters after the last context.

    Raises:
        UserError: a period that is not a positive integer, of a name that no parameter has, or two for one parameter.

    >>> start = {"w": torch.tensor(1.0, requires_grad=True)}
    >>> descend(lambda p, x: (p["w"] * x) ** 2, start, [1.0, 1.0], lr=0.25)["w"].item()
    0.25
    """
    period = _periods(parameters, periods or {})
    now = {name: p if p.requires_grad else p.detach().requires_grad_() for name, p in parameters.items()}
    kept: Parameters = {}
    create_graph = torch.is_grad_enabled() and not first_order
    for step, context in enumerate(contexts, start=1):
        with torch.enable_grad():
            # Aliases: another block may have been updated by a gradient that depends on a parameter that rests, and the
            # derivative wanted is the one at the present values of all.
            at = {name: p.view_as(p) for name, p in now.items()}
            gradients = torch.autograd.grad(
                loss(at, context), list(at.values()), create_graph=create_graph, materialize_grads=True
            )
        for name, gradient in zip(list(now), gradients, strict=True):
            gradient = gradient if create_graph else gradient.detach()
            kept[name] = kept[name] + gradient if name in kept else gradient
            if step % period[name] == 0:
                now[name] = now[name] - lr * kept.pop(name)
                if not now[name].requires_grad:  # under no_grad the chain is cut at every update
                    now[name].requires_grad_()
    return now


def adapt(
    module: nn.Module,
    support: Pair,
    loss: Loss,
    lr: float,
    steps: int = 1,
    periods: Mapping[str, int] | None = None,
    first_order: bool = False,
) -> Parameters:
    """The parameters of ``module`` after ``steps`` of `descend` on one task, from where they stand now.

    Args:
        module: its parameters are the initial state, and stay as they are; frozen ones are left out.
        support: inputs and targets of the task.
        loss: of the module's output and the targets, a scalar.
        lr: inner step size, in units of the parameter per unit of gradient.
        steps: inner updates; 0 gives the initial state itself.
        periods, first_order: as in `descend`.

    Raises:
        UserError: steps below 0; see also `descend`.

    >>> module, x = nn.Linear(1, 1), torch.ones(1, 1)
    >>> fast = adapt(module, (x, 2 * x), nn.functional.mse_loss, lr=0.25, steps=20)
    >>> round(functional_call(module, fast, (x,)).item(), 3)
    2.0
    """
    if type(steps) is not int or steps < 0:
        raise UserError(f"steps={steps!r} of an adaptation: it must be a whole number of updates, 0 or more")

    def inner(parameters: Parameters, task: Pair) -> Tensor:
        return loss(functional_call(module, parameters, (task[0],)), task[1])

    start = {name: p for name, p in module.named_parameters() if p.requires_grad}
    return descend(inner, start, [support] * steps, lr, periods, first_order)


def initialisation(
    module: nn.Module,
    tasks: Iterable[tuple[Pair, Pair]],
    loss: Loss,
    lr: float,
    steps: int = 1,
    periods: Mapping[str, int] | None = None,
    first_order: bool = False,
) -> Tensor:
    """The outer loss of a meta-learned initial state, the mean over tasks of the loss after adaptation (MAML, Eq. 28).

    Its gradient, which ``backward`` leaves in the module's parameters, goes through the inner updates or, first-order,
    past them. Any optimizer makes the slow block's step with it.

    Args:
        tasks: pairs ``(support, query)`` of pairs ``(inputs, targets)``: adapt to the one, be judged on the other.
        module, loss, lr, steps, periods, first_order: as in `adapt`. With 0 steps this is ordinary training on the
            queries.

    Raises:
        UserError: no task; see also `adapt`.

    >>> module, x = nn.Linear(1, 1), torch.ones(4, 1)
    >>> initialisation(module, [((x, x), (x, x))], nn.functional.mse_loss, lr=0.1).backward()
    >>> module.weight.grad.shape
    torch.Size([1, 1])
    """
    losses = []
    for support, (x, y) in tasks:
        fast = adapt(module, support, loss, lr, steps, periods, first_order)
        losses.append(loss(functional_call(module, fast, (x,)), y))
    if not losses:
        raise UserError("an initial state is learned from tasks, and none is given: give at least one")
    return torch.stack(losses).mean()


def generate_weights(block: nn.Module, generator: Callable[[Any], Tensor], knowledge: Any) -> Parameters:
    """Weights for ``block`` that another block generates, ``Theta = g(knowledge)`` (a hypernetwork).

    The gradient of whatever is done with them flows through ``generator``, and into the knowledge; the block's own
    parameters only say how many weights there are and of which shapes.

    Args:
        block: whose weights are made, for ``torch.func.functional_call(block, weights, (x,))``.
        generator: from the knowledge to one vector of all weights, in the order of ``block.named_parameters()``.
        knowledge: what it makes them from.

    Raises:
        UserError: the generator gives another number of weights than the block has.

    >>> block, generator = nn.Linear(2, 1), nn.Linear(4, 3)
    >>> weights = generate_weights(block, generator, torch.ones(4))
    >>> functional_call(block, weights, (torch.ones(5, 2),)).shape
    torch.Size([5, 1])
    """
    shapes = {name: p.shape for name, p in block.named_parameters()}
    sizes = [shape.numel() for shape in shapes.values()]
    made = generator(knowledge)
    if made.shape != (sum(sizes),):
        raise UserError(
            f"the generator made {tuple(made.shape)} for a {type(block).__name__} of {sum(sizes)} weights: it must "
            f"give one vector of {sum(sizes)}"
        )
    pieces = zip(shapes.items(), made.split(sizes), strict=True)
    return {name: piece.view(shape) for (name, shape), piece in pieces}


def _periods(parameters: Mapping[str, Tensor], periods: Mapping[str, int]) -> dict[str, int]:
    """The period of each parameter."""
    found: dict[str, int] = {}
    for name, period in periods.items():
        if type(period) is not int or period < 1:
            raise UserError(f"the period of {name!r} is {period!r}: it must be a whole number of steps, 1 or more")
        covered = [p for p in parameters if p == name or p.startswith(f"{name}.")]
        if not covered:
            blocks = {p.rpartition(".")[0] for p in parameters} - {""}
            raise UserError(f"no block or parameter is called {name!r}; {nearest(name, blocks or parameters)}")
        for p in covered:
            if p in found:
                raise UserError(f"{p!r} has two periods, one of them by {name!r}: leave one out")
            found[p] = period
    return {p: found.get(p, 1) for p in parameters}

"""A cost on writing: what each write costs teaches a memory to leave alone what it need not keep.

Steps can be zero and nothing is forgotten by the clock, so that what is kept stays as it is; the mean step size is in
the loss. The cost was chosen from 1, 3 and 10 on BABILong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nestlearn.nn import step_sizes
from nestlearn.tasks.report import base

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "hope, writes cost": ("hope", {"decay": False, "stretch": 0.1}),
    "deltanet, writes cost": ("deltanet", {"stretch": 0.1}),
}
COST = 10.0  # nats for a mean step size of 1


def cost_of(row: str) -> dict[str, float]:
    """The argument ``cost`` of a row of a plan, if its writes cost.

    >>> cost_of("hope, writes cost"), cost_of("hope")
    ({'cost': 10.0}, {})
    """
    return {"cost": COST} if row in ROWS else {}


def with_cost(network: nn.Module, cost: float, loss: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """The loss of a forward pass, and that plus what its writes cost: ``cost`` nats times the mean step size of all
    tokens, heads and layers.

    >>> from nestlearn.nn import SelfReferentialTitans
    >>> layer = SelfReferentialTitans(16, heads=2, chunk_size=4)
    >>> loss, paid = with_cost(layer, 10.0, lambda: layer(torch.ones(1, 6, 16))[0].square().mean())
    >>> bool(paid > loss)
    True
    """
    if not cost:
        value = loss()
        return value, value
    with step_sizes(network) as sizes:
        value = loss()
    return value, value + cost * torch.stack([eta.mean() for eta in sizes]).mean()


def lines(rows: Iterable[str], colours: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and style of every row in a figure: rows whose writes cost are dashed, in the colour of their model.

    >>> lines(["linear", "hope", "hope, writes cost"], ["red", "blue"])["hope, writes cost"]
    ('blue', 'o--')
    """
    names = list(rows)
    own = dict(zip((name for name in names if name not in ROWS), colours, strict=False))
    return {name: (own[base(name)], "o--") if name in ROWS else (own[name], "o-") for name in names}

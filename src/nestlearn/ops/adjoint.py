"""What the hand-written backward passes share: each small map of a segment beside its adjoint.

Autograd records a node for every product and every elementwise step; a segment has two hundred of them. Here
a segment is one node, whose backward pass knows what it may add up before it multiplies. The general form in
``ops.segment`` stays what these are tested against and what second derivatives go through.

Shapes: N = B H (sequences times heads), c tokens of the segment, d channels. ``d_x`` is the derivative of the
loss by x.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.ops.rule import Start, WriteRule, stretched


def outside_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The backward pass of a node whose forward pass ran without autocast, also where a gradient is taken inside it."""

    @functools.wraps(backward)
    def run(ctx: Any, *d_outputs: Tensor | None) -> Any:
        device = next(d for d in d_outputs if d is not None).device.type
        with torch.autocast(device, enabled=False):
            return backward(ctx, *d_outputs)

    return run


def unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """``x / ||x||`` as in ``ops.rule`` and the factor (N, c, 1)."""
    r = torch.rsqrt((x * x).sum(-1, keepdim=True).add_(1e-6))
    return x * r, r


def unit_adjoint(y: Tensor, r: Tensor, d_y: Tensor) -> Tensor:
    return torch.addcmul(d_y, y, (y * d_y).sum(-1, keepdim=True), value=-1).mul_(r)


Units = tuple[tuple[Tensor, Tensor | None], ...]


def units(made: Mapping[str, Tensor], names: Sequence[str], rule: WriteRule) -> Units:
    """k, q and v as a segment uses them, each with its factor, None where it is as it was given."""
    scaled = {"k": "k" in names, "q": "q" in names, "v": rule.normalize_v}
    return tuple(unit(made[name]) if on else (made[name], None) for name, on in scaled.items())


def units_adjoint(used: Units, d_used: Sequence[Tensor]) -> dict[str, Tensor]:
    """Derivatives by what `units` was given, by name."""
    pairs = zip("kqv", used, d_used, strict=True)
    return {name: d if r is None else unit_adjoint(y, r, d) for name, (y, r), d in pairs}


class Gates(NamedTuple):
    """Step sizes and retained fractions of a segment, (N, c) each; ``eta`` and ``log_alpha`` are zero where a token
    does not count."""

    eta: Tensor
    log_alpha: Tensor
    alpha: Tensor
    slope: Tensor
    """``d eta / d raw eta`` for a token that counts."""

    @classmethod
    def of(
        cls,
        raw_eta: Tensor,
        raw_alpha: Tensor | None,
        bias_eta: Tensor,
        bias_alpha: Tensor | None,
        valid: Tensor | None,
        rule: WriteRule,
    ) -> Gates:
        """From raw gates (N, c) and biases (H,); the maps of ``ops.rule.gates``."""
        biased = lambda raw, bias: raw.unflatten(0, (-1, bias.shape[0])).add(bias.unsqueeze(-1)).flatten(0, 1)  # noqa: E731
        opened = torch.sigmoid(biased(raw_eta, bias_eta))
        wide = stretched(opened, rule.stretch)
        eta = wide.clamp(0, 1) * rule.eta_max
        slope = (1 + 2 * rule.stretch) * rule.eta_max * opened * (1 - opened)
        if rule.stretch:
            slope = slope * ((wide > 0) & (wide < 1))
        if not rule.decay:
            log_alpha, alpha = torch.zeros_like(eta), torch.ones_like(eta)
        else:
            assert raw_alpha is not None
            assert bias_alpha is not None
            log_alpha = F.logsigmoid(biased(raw_alpha, bias_alpha)).clamp_min_(-60)
            alpha = log_alpha.exp()
            eta, slope = (eta * alpha, slope * alpha) if rule.bounded else (eta, slope)
        if valid is not None:
            eta, log_alpha, slope = eta * valid, log_alpha * valid, slope * valid
        return cls(eta, log_alpha, alpha, slope)

    def adjoint(
        self, d_eta: Tensor, d_log_alpha: Tensor, valid: Tensor | None, rule: WriteRule
    ) -> tuple[Tensor, Tensor]:
        """Derivatives by the raw gates."""
        if valid is not None:
            d_log_alpha = d_log_alpha * valid
        if rule.bounded:
            d_log_alpha = torch.addcmul(d_log_alpha, d_eta, self.eta)
        # logsigmoid' = 1 - sigmoid, which cancels near 1; a clamped gate is flat.
        opening = -torch.expm1(self.log_alpha) * (self.alpha > CLOSED)
        return d_eta * self.slope, d_log_alpha * opening


CLOSED = 8.8e-27
"""exp(-60) rounded up: a retained fraction that ``gates`` has clamped."""


class Tables(NamedTuple):
    """The tables of ``ops.segment.Segment`` for keys (N, c, d), without momentum."""

    gamma: Tensor
    """(N, c, 1), retained fraction of the segment's first state after each token."""
    last: Tensor
    """(N, c, 1), retained fraction of each token's write at the end."""
    ratio: Tensor
    """(N, c, c), retained fraction of write s after token t."""
    strength: Tensor
    """(N, c, 1), ``eta_t / alpha_t``, the part that erases."""
    overlap: Tensor
    """(N, c, c), ``ratio k k^T`` below the diagonal."""
    inverse: Tensor
    """(N, c, c), ``(I + T)^-1`` with ``T = strength overlap``."""

    @classmethod
    def of(cls, k: Tensor, gates: Gates, erase: Tensor | None, delta: bool) -> Tables:
        """From the share of the erasure (N, 1), None for all of it, and whether anything is erased at all."""
        log_gamma = gates.log_alpha.cumsum(-1)
        ratio = (log_gamma.unsqueeze(-1) - log_gamma.unsqueeze(-2)).clamp_max_(0).exp_().tril_()
        erasing = gates.eta if erase is None else gates.eta * erase
        strength = (erasing * (-gates.log_alpha).exp()).unsqueeze(-1)
        overlap = inverse = ratio
        if delta:
            overlap = torch.bmm(k, k.mT).mul_(ratio).tril_(-1)
            # The inverse is bounded, since no transition expands; it serves every memory and the backward pass, where
            # a solve for all of their rows would run at a fraction of the speed of a product.
            eye = torch.eye(k.shape[1], dtype=k.dtype, device=k.device).expand_as(ratio)
            inverse = torch.linalg.solve_triangular(overlap * strength, eye, upper=False, unitriangular=True)
        return cls(log_gamma.exp().unsqueeze(-1), ratio[:, -1, :, None], ratio, strength, overlap, inverse)

    def adjoint(
        self,
        k: Tensor,
        gates: Gates,
        erase: Tensor | None,
        d_t: Tensor | None,
        d_erasing_key: Tensor | None,
        d_log_ratio: Tensor,
        d_log_last: Tensor,
        d_log_gamma: Tensor,
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
        """Derivatives by k, eta, log alpha and the share of the erasure.

        Args:
            k, gates, erase: as given to :meth:`of`.
            d_t: by ``T`` (N, c, c), below the diagonal, or None where nothing is erased.
            d_erasing_key: by the erasing key ``strength gamma k`` (N, c, d), or None.
            d_log_ratio: by the logarithm of ``ratio`` (N, c, c), from all but ``T``.
            d_log_last, d_log_gamma: by the logarithms of ``last`` and ``gamma`` (N, c).
        """
        d_k = d_erase = None
        d_eta = d_log_alpha = None
        if d_t is not None:
            assert d_erasing_key is not None
            along = (d_erasing_key * k).sum(-1)
            d_overlap = d_t * self.overlap
            gamma, strength = self.gamma.squeeze(-1), self.strength.squeeze(-1)
            d_strength = d_overlap.sum(-1) + along * gamma
            d_log_ratio = torch.addcmul(d_log_ratio, d_overlap, self.strength)
            d_log_gamma = torch.addcmul(d_log_gamma, along * strength, gamma)
            d_product = (d_t * self.strength).mul_(self.ratio)
            d_k = torch.baddbmm(d_erasing_key * (self.strength * self.gamma), d_product + d_product.mT, k)
            d_eta = d_strength * (-gates.log_alpha).exp()
            d_log_alpha = d_strength * strength
            if erase is not None:
                d_erase = d_eta * gates.eta
                d_eta = d_eta * erase
        d_log = d_log_gamma + d_log_ratio.sum(-1) - d_log_ratio.sum(-2) - d_log_last
        d_log[:, -1] += d_log_last.sum(-1)
        reached = torch.matmul(d_log, self.ratio.new_ones(self.ratio.shape[1:]).tril_())  # log gamma sums log alpha
        d_log_alpha = reached if d_log_alpha is None else reached - d_log_alpha
        return d_k, torch.zeros_like(reached) if d_eta is None else d_eta, d_log_alpha, d_erase


def each(t: Tensor, batch: int) -> Tensor:
    """What the heads have, (H, ...), for every sequence: (N, ...)."""
    return t.expand(batch, *t.shape).flatten(0, 1)


def write_scales(start: Start, names: Sequence[str]) -> Tensor:
    """The write scales of the n memories, (H, n); 1 where one has none."""
    ones = torch.ones_like(start.bias["eta"])
    return torch.stack([start.write_scale.get(name, ones) for name in names], -1)


class Sums:
    """Derivatives by the distinct inputs, added up in the order in which they come; None where there is none."""

    def __init__(self, inputs: int) -> None:
        self.found: list[Tensor | None] = [None] * inputs

    def add(self, i: int, d_x: Tensor) -> None:
        """One more part of the derivative by input ``i``."""
        found = self.found[i]
        self.found[i] = d_x if found is None else found + d_x


def per_sequence(valid: Tensor, batch: int, heads: int) -> Tensor:
    """Which tokens count, (B, 1, c), for every head: (N, c)."""
    return valid.expand(batch, heads, -1).flatten(0, 1)


def second_order(
    again: Callable[..., tuple[Tensor, ...]],
    given: Sequence[Tensor | None],
    needed: Sequence[bool],
    d_outputs: Sequence[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """What a node's backward pass returns where a second derivative is asked for: its forward pass ``again`` of what
    was ``given`` by autograd, and the gradient of that. The first two arguments of a node have none.

    What was given goes under new names: the one may be made from the other, a state from the biases that an earlier
    segment was written with, and the way through the one is not the other's part.
    """
    alias = [t if t is None or not need else t.view_as(t) for t, need in zip(given, needed, strict=True)]
    pairs = [(y, d) for y, d in zip(again(*alias), d_outputs, strict=True) if d is not None and y.requires_grad]
    wanted = [t for t, need in zip(alias, needed, strict=True) if need and t is not None]
    outputs, weights = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, weights, create_graph=True, allow_unused=True))
    return None, None, *(next(found) if need else None for need in needed)

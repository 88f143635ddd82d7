"""Known architectures as memories (section 5, SPEC 10): each a choice of structure, objective, rule and frequency.

``DESIGNS`` is the list; :class:`MemoryLayer` runs any of them. Softmax attention and its sliding window, memories
without parameters (Eq. 62, 63), are :class:`nestlearn.nn.CausalAttention`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor, nn

from nestlearn.errors import UserError, nearest
from nestlearn.memory import LinearMemory, MLPMemory
from nestlearn.nn.attention import AttentionState, attend
from nestlearn.nn.mixer import MemoryMixer, MemoryState, lifetime_bias, wide
from nestlearn.ops import MEMORY, Start, WriteRule, kernel_for


@dataclass(frozen=True)
class Design:
    """What an architecture chooses.

    Args:
        rule: objective, update and its switches; its chunk sizes are the layer's.
        memory: structure, ``"linear"`` or ``"mlp"``.
        gates: which of ``eta`` and ``alpha`` are learned per token. Others are constant: a step size of
            ``eta_max / 2``, and RetNet's retained fractions ``1 - 2^-(5 + h)`` of head h.
        learned_start: whether the outer loss learns the state before the first token; else it is zero.
        momentum: whether the inner update has a momentum, its retained fraction learned per head.
        attention: whether the memory is read with what softmax attention over the same q, k and v gives.
    """

    rule: WriteRule
    memory: Literal["linear", "mlp"] = "linear"
    gates: tuple[str, ...] = ("eta", "alpha")
    learned_start: bool = False
    momentum: bool = False
    attention: bool = False

    @property
    def at_anchor(self) -> bool:
        """Whether the rule takes its gradients at the anchor: the chunk size is then the memory's update frequency.
        Else the error is that of every single token, and the chunk size changes the speed and not the result."""
        return self.rule.update == "omega" or (self.rule.update == "dgd" and self.rule.objective != "dot")


EXACT = WriteRule(self_values=False, retention="zero", bounded=False, normalize_v=False, norm_limit=None)
HEBBIAN = replace(EXACT, delta=False, eta_max=2.0)  # constant steps of 1
# Nothing erases inside a chunk, so steps are smaller and the state has a limit, as for the MLP memories of Hope.
AT_ANCHOR = WriteRule(objective="l2", self_values=False, delta=False, eta_max=0.5)
START_SCALE = 0.02
# Of the steps of a linear memory. All layers of an MLP move on one error, so that its output moves further; with full
# steps Titans' perplexity on WikiText-2 was twice that with a tenth (`docs/log.md`).
MLP_STEP = 0.1

DESIGNS = {
    "linear-attention": Design(replace(HEBBIAN, decay=False), gates=()),
    "retnet": Design(HEBBIAN, gates=()),
    "deltanet": Design(replace(EXACT, update="delta", decay=False, eta_max=1.0), gates=("eta",)),
    "gated-deltanet": Design(replace(EXACT, update="delta", eta_max=1.0)),
    "ojanet": Design(replace(EXACT, update="oja", bounded=True, normalize_v=True, eta_max=1.0)),
    "omega": Design(replace(AT_ANCHOR, update="omega", window=8), learned_start=True),
    "ttt-linear": Design(replace(AT_ANCHOR, decay=False), gates=("eta",), learned_start=True),
    "ttt-mlp": Design(replace(AT_ANCHOR, decay=False), memory="mlp", gates=("eta",), learned_start=True),
    "titans": Design(AT_ANCHOR, memory="mlp", learned_start=True, momentum=True),
    "miras": Design(replace(AT_ANCHOR, objective="l3"), memory="mlp", learned_start=True),
    "ada-transformer": Design(
        replace(HEBBIAN, decay=False, retention="start"), gates=(), learned_start=True, attention=True
    ),
}


class MemoryLayer(MemoryMixer):
    """An architecture of ``DESIGNS`` as a sequence layer, (B, T, dim) -> (B, T, dim), with state in and out.

    Per head of width d = dim / heads, one memory is written and read along the sequence; key, value, query and gates
    are static linear projections. Keys and queries have unit length. Around the memory stand what stands around
    :class:`SelfReferentialTitans`, of which this is the case that modifies none of its projections.

    Args:
        dim: width of the input and output, in channels.
        heads: independent memories; must divide ``dim``.
        chunk_size: tokens between two anchors: the update frequency of designs that take gradients at the anchor.
        design: a name in ``DESIGNS``, or a design of one's own.
        memory_hidden: hidden width of an MLP memory; None means d.
        conv_size: tokens that the causal depthwise convolution sees; 1 leaves it out.
        retained: initial retained fractions alpha per token of the first and the last head, where they are learned.
        gate: whether a static sigmoid gate multiplies the output.
        rope_theta: base of the rotary wavelengths, where the design has attention.
        changes: fields of the design's :class:`nestlearn.ops.WriteRule` to replace, such as ``norm_limit``. Unless
            ``eta_max`` is among them, step sizes at the anchor end at d / chunk_size at most, those of MLP memories
            at a tenth of it.

    Raises:
        UserError: an unknown design, ``heads`` that do not divide ``dim``, or a value outside its range.

    >>> layer = MemoryLayer(dim=16, heads=2, chunk_size=4, design="gated-deltanet")
    >>> y, state = layer(torch.zeros(1, 6, 16)); y.shape
    torch.Size([1, 6, 16])
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        chunk_size: int = 64,
        *,
        design: str | Design,
        memory_hidden: int | None = None,
        conv_size: int = 4,
        retained: tuple[float, float] = (0.98, 0.998),
        gate: bool = True,
        rope_theta: float = 10_000.0,
        **changes: object,
    ) -> None:
        if isinstance(design, str):
            if design not in DESIGNS:
                raise UserError(f"unknown design {design!r}: {nearest(design, DESIGNS)}")
            design = DESIGNS[design]
        unknown = [name for name in changes if name not in WriteRule.__dataclass_fields__]
        if unknown:
            raise UserError(f"unknown option {unknown[0]!r}: {nearest(unknown[0], WriteRule.__dataclass_fields__)}")
        if memory_hidden is not None and memory_hidden < 1:
            raise UserError(f"memory_hidden must be at least 1, got {memory_hidden}")
        rule = replace(design.rule, chunk_size=chunk_size, **changes)  # type: ignore[arg-type]
        if design.at_anchor and "eta_max" not in changes:
            # C random keys of width d add up to (1 + sqrt(C / d))^2 along one direction: a chunk should not overshoot.
            share = MLP_STEP if design.memory == "mlp" else 1.0
            rule = replace(rule, eta_max=share * min(rule.eta_max, dim / max(heads, 1) / chunk_size))
        super().__init__(dim, heads, rule, ("q", "k", "v", *design.gates), conv_size, gate)
        if design.attention and self.width % 2:
            raise UserError(f"attention of dim={dim} with heads={heads}: dim / heads must be an even integer")
        self.design, self.retained, self.rope_theta = design, retained, rope_theta
        d, hidden = self.width, self.width if memory_hidden is None else memory_hidden
        self.memory = LinearMemory(d, d) if design.memory == "linear" else MLPMemory(d, d, hidden)
        learned = self.memory.init((heads,)) if design.learned_start else ()
        self.start = nn.ModuleDict({MEMORY: nn.ParameterList(learned)} if learned else {})
        self.bias = nn.ParameterDict({name: nn.Parameter(torch.zeros(heads)) for name in design.gates})
        self.momentum = nn.Parameter(torch.zeros(heads)) if design.momentum else None
        self.reset_parameters()
        kernel_for(self.initial(), rule)  # refuses a structure that the update cannot write

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew from the global random generator."""
        super().reset_parameters()
        if self.design.learned_start:
            for parameter, drawn in zip(self._weights(), self.memory.init((self.heads,)), strict=True):
                parameter.copy_(drawn)
            if self.design.attention:  # W = I: untrained, it passes on what attention gives
                self._weights()[0].copy_(torch.eye(self.width))
            elif isinstance(self.memory, LinearMemory):  # small, as TTT's
                self._weights()[0].mul_(START_SCALE)
        for name, bias in self.bias.items():
            bias.copy_(lifetime_bias(self.retained, self.heads) if name == "alpha" else torch.zeros(self.heads))
        if self.momentum is not None:
            nn.init.zeros_(self.momentum)

    def _weights(self) -> list[nn.Parameter]:
        return list(cast(nn.ParameterList, self.start[MEMORY]))

    def initial(self) -> Start:
        """The start of the core, in float32 or wider."""
        template = wide(self.norm.weight)
        weights = (template.new_zeros(self.heads, self.width, self.width),)  # of a linear memory
        if self.design.learned_start:
            weights = tuple(wide(w) for w in self._weights())
        head = torch.arange(self.heads, device=template.device, dtype=template.dtype)
        constant = {"eta": torch.zeros_like(head), "alpha": (2 ** (5 + head) - 1).log()}
        return Start(
            weights={MEMORY: weights},
            bias=constant | {name: wide(b) for name, b in self.bias.items()},
            momentum=None if self.momentum is None else wide(self.momentum).sigmoid(),
        )

    def prepare(
        self, inputs: dict[str, Tensor], state: MemoryState | None, lengths: Tensor | None
    ) -> tuple[dict[str, Tensor], AttentionState | None]:
        """The projections, raw gates of zero where a gate is constant, and perhaps the query that attention makes."""
        q, k, v = (inputs[name] for name in ("q", "k", "v"))
        constant = {name: torch.zeros_like(k[..., 0]) for name in ("eta", "alpha") if name not in inputs}
        attention = None
        if self.design.attention:
            q, attention = attend(q, k, v, None if state is None else state.attention, lengths, self.rope_theta)
        return inputs | constant | {"q": q}, attention

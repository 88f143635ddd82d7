"""Self-referential Titans (section 8, Eq. 83-93): a sequence layer whose projections are memories that
rewrite themselves while they read."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from nestlearn.errors import UserError, nearest
from nestlearn.memory import LinearMemory, MLPMemory
from nestlearn.nn.mixer import MemoryMixer, MemoryState, lifetime_bias, wide
from nestlearn.ops import GATES, MEMORY, Start, WriteRule

# Where the sigmoids of a head start: 1 - 1e-6 retained or erased, 1e-6 written or erased, all but everything erased. A
# share of 1e-4 erased with every token is too much: after 300 tokens a count of 100 is wrong by several. And a head
# that turns a sign with 0.993 of the erasure loses 1.3 percent of it with every token.
ALWAYS, NEVER, FULLY = 14.0, -14.0, 5.0
# Of a step size: with the stretch 1.998, which all but turns the sign along the key. From 2.4 on it is cut to 2 and has
# no slope, so that the head cannot learn at which tokens not to turn.
TURN = 2.39
STRETCH = 0.1  # of the step sizes of a layer with heads that count, so that they reach 0 and 2


class SelfReferentialTitans(MemoryMixer):
    """Self-modifying sequence layer of Eq. 83-90, (B, T, dim) -> (B, T, dim), with state in and out.

    Per head of width d = dim / heads, memories generate the key, the value, the step size and the retained
    fraction of every token, and each memory, the main one included, is written with the value that it
    generates itself. ``nn.Parameter``s are the memories' *initial* states: the outer loss trains them through
    all the writes. Around the core stand a causal convolution, static projections that make the query and the
    memories' inputs, a norm per head, an output gate and the output projection.

    Args:
        dim: width of the input and output.
        heads: independent cores; must divide ``dim``.
        chunk_size: tokens between two anchors of the main memory (Eq. 90).
        chunk_size_other: the same for the projection memories; None means ``chunk_size``.
        memory: structure of every memory, ``"linear"`` (Eq. 92, 93) or ``"mlp"`` (Eq. 89, 91).
        memory_hidden: hidden width of an MLP memory; None means d.
        conv_size: tokens that the causal depthwise convolution sees; 1 leaves it out.
        momentum: whether the inner update has a momentum (the paper's table 6 ablates one), retained fraction b
            learned per head. It is a mean: writes are scaled by ``1 - b``, so that they add up to what they are
            without it. As a plain sum, which they are with ``write_scale=None``, it costs a language model a lot.
        inner_k, inner_v, inner_q, inner_gates: whether a memory generates k, v, q, and eta with alpha; else a
            static linear projection does.
        shared_input: whether the memories of k, v and q read one static projection of x in place of one each. The
            paper has neither (all read x, one head); heads need it to see all of x.
        write_scale: initial factor on what the projection memories write, learned per head through a sigmoid,
            in (0, 1); None writes in full as printed.
        retained: initial retained fractions alpha per token of the first and the last head, spaced evenly in
            the logarithm of the memory's lifetime; heads that accumulate start at 1 - 1e-6.
        accumulators: the last so many heads start as accumulators: they keep what they are given, erase nothing and
            leave their projections as they are; the head before them alternates: it is written with values as they
            are given too, erases fully and starts with steps of all but ``eta_max``, which all of the layer's heads can
            then reach. They can count and sum, which a memory that erases cannot, and cost a language model some of its
            quality (`docs/results.md`). Of linear memories only.
        gate: whether a static sigmoid gate multiplies the output.
        objective: ``"dot"``, ``"l2"`` or an Lp one such as ``"l3"``; None means what held up by measurement, dot for
            linear memories and l2 for MLP memories.
        eta_max: upper end of the step size, in units of alpha; None means 2 (erasure may turn a sign) for linear
            memories and 0.1 for MLP memories, whose last layer has no erasure.
        stretch: as in :class:`nestlearn.ops.WriteRule`; None means 0, and 0.1 in a layer with accumulators.
        read, delta, decay, self_values, retention, bounded, normalize_v, clip_values, norm_limit: as in
            :class:`nestlearn.ops.WriteRule`.

    Raises:
        UserError: ``heads`` does not divide ``dim``, an unknown memory, or a value outside its range.

    >>> layer = SelfReferentialTitans(dim=16, heads=2, chunk_size=4)
    >>> y, state = layer(torch.zeros(1, 6, 16)); y.shape
    torch.Size([1, 6, 16])
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        chunk_size: int = 64,
        *,
        chunk_size_other: int | None = None,
        memory: Literal["linear", "mlp"] = "linear",
        memory_hidden: int | None = None,
        conv_size: int = 4,
        objective: str | None = None,
        read: Literal["anchor", "inclusive"] = "inclusive",
        delta: bool = True,
        decay: bool = True,
        momentum: bool = False,
        inner_k: bool = True,
        inner_v: bool = True,
        inner_q: bool = False,
        inner_gates: bool = True,
        self_values: bool = True,
        shared_input: bool = False,
        retention: Literal["zero", "start"] = "start",
        write_scale: float | None = 0.05,
        eta_max: float | None = None,
        stretch: float | None = None,
        bounded: bool = True,
        normalize_v: bool = True,
        clip_values: bool = True,
        norm_limit: float | None = 2.0,
        retained: tuple[float, float] = (0.98, 0.998),
        accumulators: int = 0,
        gate: bool = True,
    ) -> None:
        if memory not in ("linear", "mlp"):
            raise UserError(f"unknown memory {memory!r}: {nearest(memory, ('linear', 'mlp'))}")
        if memory_hidden is not None and memory_hidden < 1:
            raise UserError(f"memory_hidden must be at least 1, got {memory_hidden}")
        if write_scale is not None and not 0 < write_scale < 1:
            raise UserError(f"write_scale must lie between 0 and 1, got {write_scale}; None writes in full")
        rule = WriteRule(
            chunk_size=chunk_size,
            chunk_size_other=chunk_size_other,
            objective=objective if objective is not None else ("dot" if memory == "linear" else "l2"),
            read=read,
            delta=delta,
            decay=decay,
            self_values=self_values,
            retention=retention,
            eta_max=eta_max if eta_max is not None else (2.0 if memory == "linear" else 0.1),
            stretch=stretch if stretch is not None else STRETCH if accumulators else 0.0,
            bounded=bounded,
            normalize_v=normalize_v,
            clip_values=clip_values,
            norm_limit=norm_limit,
        )
        inner = {"eta": inner_gates, "alpha": inner_gates, "k": inner_k, "v": inner_v, "q": inner_q}
        if not decay:  # everything is retained: nothing to generate
            del inner["alpha"]
        adaptive = tuple(name for name, on in inner.items() if on)
        # Static projections: of a name without a memory, the projection itself; of one with a memory, that memory's
        # input, by which every head sees all of x. The gates' memories read what the key's does.
        reads = {name: "k" if name in GATES or shared_input else name for name in adaptive}
        static = {name for name in inner if name not in adaptive}
        super().__init__(dim, heads, rule, static | set(reads.values()), conv_size, gate)
        if type(accumulators) is not int or not 0 <= accumulators <= (heads if memory == "linear" else 0):
            raise UserError(
                f"accumulators={accumulators!r}: it must be a number of heads from 0 to {heads}"
                + ("" if memory == "linear" else "; MLP memories have none, so 0")
            )
        self.accumulators = accumulators
        self.adaptive, self.reads = adaptive, reads
        self.retained, self.initial_write_scale = retained, write_scale
        d, hidden = self.width, self.width if memory_hidden is None else memory_hidden
        self.memories = {
            name: LinearMemory(d, 1 if name in GATES else d)
            if memory == "linear"
            else MLPMemory(d, 1 if name in GATES else d, hidden, skip=name not in GATES)
            for name in (*self.adaptive, MEMORY)
        }
        self.start = nn.ModuleDict({name: nn.ParameterList(m.init((heads,))) for name, m in self.memories.items()})
        self.bias = nn.ParameterDict({name: nn.Parameter(torch.zeros(heads)) for name in GATES if name in inner})
        scaled = self.adaptive if write_scale is not None else ()
        self.write_scale = nn.ParameterDict({name: nn.Parameter(torch.zeros(heads)) for name in scaled})
        self.momentum = nn.Parameter(torch.zeros(heads)) if momentum else None
        self.erase = nn.Parameter(torch.zeros(heads)) if accumulators and delta else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew from the global random generator."""
        super().reset_parameters()
        for name, memory in self.memories.items():
            for parameter, drawn in zip(self._weights(name), memory.init((self.heads,)), strict=True):
                parameter.copy_(drawn)
            if name in GATES:  # gates start at their bias: a memory that is not yet trained should not erase
                self._weights(name)[0].mul_(0.1)
            elif isinstance(memory, LinearMemory) and self.reads.get(name, name) == name:
                # M(x) = x: the main memory stores values as they are, the others pass their own projection on.
                self._weights(name)[0].copy_(torch.eye(self.width))
        alternating, counting = self._apart()
        if self.rule.decay:
            self.bias["alpha"][: counting.start] = lifetime_bias(self.retained, counting.start)
            self.bias["alpha"][counting] = ALWAYS
        nn.init.zeros_(self.bias["eta"])
        self.bias["eta"][alternating] = TURN
        for scale in self.write_scale.values():
            assert self.initial_write_scale is not None
            nn.init.constant_(scale, math.log(self.initial_write_scale / (1 - self.initial_write_scale)))
            scale[counting] = NEVER
        if self.erase is not None:
            nn.init.constant_(self.erase, FULLY)
            self.erase[alternating] = ALWAYS
            self.erase[counting] = NEVER
        if self.momentum is not None:
            nn.init.zeros_(self.momentum)

    def _weights(self, name: str) -> list[nn.Parameter]:
        return list(_own(self.start[name]).values())

    def initial(self) -> Start:
        """The learned start of the core, in float32 or wider."""
        scale = {name: wide(s).sigmoid() for name, s in _own(self.write_scale).items()}
        momentum = None if self.momentum is None else wide(self.momentum).sigmoid()
        if momentum is not None and self.initial_write_scale is not None:
            scale = {name: (1 - momentum) * scale.get(name, 1.0) for name in self.memories}
        return Start(
            weights={name: tuple(wide(w) for w in self._weights(name)) for name in self.memories},
            bias={name: wide(b) for name, b in _own(self.bias).items()},
            write_scale=scale,
            momentum=momentum,
            erase=None if self.erase is None else wide(self.erase).sigmoid(),
            accumulates=self._given(),
        )

    def _apart(self) -> tuple[slice, slice]:
        """The head that alternates and those that count, the last ones, both empty in a layer without accumulators.
        Without one that alternates a period would be told from counts, as far as was trained."""
        first = self.heads - self.accumulators
        return slice(max(0, first - 1) if self.accumulators else first, first), slice(first, self.heads)

    def _given(self) -> Tensor | None:
        """Which heads (H,) are written with values as they are given: generated by what is turned, they grow."""
        if not self.accumulators:
            return None
        head = torch.arange(self.heads, device=self.norm.weight.device)
        return head >= self._apart()[0].start

    def prepare(
        self, inputs: dict[str, Tensor], state: MemoryState | None, lengths: Tensor | None
    ) -> tuple[dict[str, Tensor], None]:
        """Every memory's own input beside the static projections."""
        return inputs | {name: inputs[read] for name, read in self.reads.items()}, None


def _own(parameters: nn.Module) -> dict[str, nn.Parameter]:
    """Those of a ParameterList or ParameterDict, whose own iterators are slow: a decoded token looks them up too."""
    return {name: p for name, p in parameters._parameters.items() if p is not None}

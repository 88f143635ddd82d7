"""Self-referential Titans (section 8, Eq. 83-93): a sequence layer whose projections are memories that
rewrite themselves while they read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.errors import UserError, nearest
from nestlearn.memory import LinearMemory, MLPMemory
from nestlearn.nn.convolution import CausalConv
from nestlearn.ops import GATES, MEMORY, CoreState, Start, WriteRule, self_modify


@dataclass(frozen=True)
class TitansState:
    """What the layer carries along a sequence: the convolution's last inputs and the core's memories."""

    conv: Tensor
    core: CoreState

    def index_select(self, rows: Tensor) -> TitansState:
        """The state of the sequences ``rows`` (int64), in that order; a row may repeat."""
        return TitansState(self.conv.index_select(0, rows.to(self.conv.device)), self.core.index_select(rows))

    def detach(self) -> TitansState:
        """The state cut from the graph that made it."""
        return TitansState(self.conv.detach(), self.core.detach())


class SelfReferentialTitans(nn.Module):
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
        momentum: whether the inner update has a momentum (the paper's table 6 ablates one), retained fraction
            learned per head.
        inner_k, inner_v, inner_q, inner_gates: whether a memory generates k, v, q, and eta with alpha; else a
            static linear projection does.
        shared_input: whether the memories of k, v and q read one static projection of x in place of one each. The
            paper has neither (all read x, one head); heads need it to see all of x.
        write_scale: initial factor on what the projection memories write, learned per head through a sigmoid,
            in (0, 1); None writes in full as printed.
        retained: initial retained fractions alpha per token of the first and the last head, spaced evenly in
            the logarithm of the memory's lifetime.
        gate: whether a static sigmoid gate multiplies the output.
        objective: ``"dot"`` or ``"l2"``; None means what held up by measurement, dot for linear memories and
            l2 for MLP memories.
        eta_max: upper end of the step size, in units of alpha; None means 2 (erasure may turn a sign) for linear
            memories and 0.1 for MLP memories, whose last layer has no erasure.
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
        objective: Literal["dot", "l2"] | None = None,
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
        bounded: bool = True,
        normalize_v: bool = True,
        clip_values: bool = True,
        norm_limit: float | None = 2.0,
        retained: tuple[float, float] = (0.98, 0.998),
        gate: bool = True,
    ) -> None:
        super().__init__()
        if dim < 1 or heads < 1 or dim % heads:
            raise UserError(f"heads={heads} must divide dim={dim}")
        if memory not in ("linear", "mlp"):
            raise UserError(f"unknown memory {memory!r}: {nearest(memory, ('linear', 'mlp'))}")
        if memory_hidden is not None and memory_hidden < 1:
            raise UserError(f"memory_hidden must be at least 1, got {memory_hidden}")
        if write_scale is not None and not 0 < write_scale < 1:
            raise UserError(f"write_scale must lie between 0 and 1, got {write_scale}; None writes in full")
        if len(retained) != 2 or not all(0 < r < 1 for r in retained):
            raise UserError(f"retained must be two fractions between 0 and 1 (first and last head), got {retained}")
        self.dim, self.heads, self.width = dim, heads, dim // heads
        self.retained, self.initial_write_scale = retained, write_scale
        self.rule = WriteRule(
            chunk_size=chunk_size,
            chunk_size_other=chunk_size_other,
            objective=objective if objective is not None else ("dot" if memory == "linear" else "l2"),
            read=read,
            delta=delta,
            decay=decay,
            self_values=self_values,
            retention=retention,
            eta_max=eta_max if eta_max is not None else (2.0 if memory == "linear" else 0.1),
            bounded=bounded,
            normalize_v=normalize_v,
            clip_values=clip_values,
            norm_limit=norm_limit,
        )
        inner = {"eta": inner_gates, "alpha": inner_gates, "k": inner_k, "v": inner_v, "q": inner_q}
        if not decay:  # everything is retained: nothing to generate
            del inner["alpha"]
        self.adaptive = tuple(name for name, on in inner.items() if on)
        self.conv = CausalConv(dim, conv_size)
        # Static projections: of a name without a memory, the projection itself; of one with a memory, that memory's
        # input, by which every head sees all of x. The gates' memories read what the key's does.
        self.reads = {name: "k" if name in GATES or shared_input else name for name in self.adaptive}
        static = {name for name in inner if name not in self.adaptive}
        self.project = nn.ModuleDict(
            {
                name: nn.Linear(dim, heads if name in GATES else dim, bias=False)
                for name in sorted(static | set(self.reads.values()))
            }
        )
        self.out = nn.Linear(dim, dim, bias=False)
        self.gate = nn.Linear(dim, dim, bias=False) if gate else None
        self.norm = nn.RMSNorm(self.width, eps=1e-6)

        d = self.width
        self.memories = {
            name: LinearMemory(d, 1 if name in GATES else d)
            if memory == "linear"
            else MLPMemory(d, 1 if name in GATES else d, d if memory_hidden is None else memory_hidden)
            for name in (*self.adaptive, MEMORY)
        }
        self.start = nn.ModuleDict({name: nn.ParameterList(m.init((heads,))) for name, m in self.memories.items()})
        self.bias = nn.ParameterDict({name: nn.Parameter(torch.zeros(heads)) for name in GATES if name in inner})
        scaled = self.adaptive if write_scale is not None else ()
        self.write_scale = nn.ParameterDict({name: nn.Parameter(torch.zeros(heads)) for name in scaled})
        self.momentum = nn.Parameter(torch.zeros(heads)) if momentum else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew from the global random generator."""
        for linear in (self.gate, *self.project.values()):
            if linear is not None:
                nn.init.normal_(linear.weight, std=1 / math.sqrt(self.dim))  # type: ignore[arg-type]
        nn.init.normal_(self.out.weight, std=0.02)  # a fresh layer adds little to the residual stream
        self.conv.reset_parameters()
        nn.init.ones_(self.norm.weight)
        for name, memory in self.memories.items():
            for parameter, drawn in zip(self._weights(name), memory.init((self.heads,)), strict=True):
                parameter.copy_(drawn)
            if name in GATES:  # gates start at their bias: a memory that is not yet trained should not erase
                self._weights(name)[0].mul_(0.1)
            elif isinstance(memory, LinearMemory) and self.reads.get(name, name) == name:
                # M(x) = x: the main memory stores values as they are, the others pass their own projection on.
                self._weights(name)[0].copy_(torch.eye(self.width))
        if self.rule.decay:
            shortest, longest = (math.log(1 / (1 - r)) for r in self.retained)
            lifetimes = torch.linspace(shortest, longest, self.heads).exp()
            self.bias["alpha"].copy_((lifetimes - 1).log())  # sigmoid(log(L - 1)) = 1 - 1/L
        nn.init.zeros_(self.bias["eta"])
        for scale in self.write_scale.values():
            assert self.initial_write_scale is not None
            nn.init.constant_(scale, math.log(self.initial_write_scale / (1 - self.initial_write_scale)))
        if self.momentum is not None:
            nn.init.zeros_(self.momentum)

    def _weights(self, name: str) -> list[nn.Parameter]:
        return list(cast(nn.ParameterList, self.start[name]))

    def initial(self) -> Start:
        """The learned start of the core, in float32 or wider."""
        wide = lambda t: t.to(torch.promote_types(t.dtype, torch.float32))  # noqa: E731
        return Start(
            weights={name: tuple(wide(w) for w in self._weights(name)) for name in self.memories},
            bias={name: wide(b) for name, b in self.bias.items()},
            write_scale={name: wide(s).sigmoid() for name, s in self.write_scale.items()},
            momentum=None if self.momentum is None else wide(self.momentum).sigmoid(),
        )

    def forward(
        self, x: Tensor, state: TitansState | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, TitansState]:
        """Read and write along ``x`` (B, T, dim); ``lengths`` (B,) says how many tokens of each row count.

        Raises:
            UserError: an input of another shape, or a state of another batch or layer.
        """
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise UserError(f"the input has shape {tuple(x.shape)}: it must be (batch, tokens, {self.dim})")
        if state is not None and state.conv.shape[0] != x.shape[0]:
            raise UserError(f"the state holds {state.conv.shape[0]} sequences, the input {x.shape[0]}: they must agree")
        u, conv_state = self.conv(x, None if state is None else state.conv, lengths)
        split = lambda t: t.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731
        inputs = {name: split(project(u)) for name, project in self.project.items()}
        inputs = {name: t.squeeze(-1) if name in GATES else t for name, t in inputs.items()}
        inputs |= {name: inputs[read] for name, read in self.reads.items()}
        with torch.autocast(x.device.type, enabled=False):  # states stay in float32
            start = self.initial()
            dtype = start.bias["eta"].dtype
            y, core = self_modify(
                {name: t.to(dtype) for name, t in inputs.items()},
                start,
                self.rule,
                None if state is None else state.core,
                lengths,
            )
            y = F.rms_norm(y, (self.width,), self.norm.weight.to(dtype), self.norm.eps)
        y = y.transpose(1, 2).flatten(-2).to(u.dtype)
        if self.gate is not None:
            y = y * torch.sigmoid(self.gate(u))
        return self.out(y), TitansState(conv_state, core)

"""What stands around every recurrent memory: convolution, static projections, norm per head, gate, output."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.errors import UserError
from nestlearn.nn.attention import AttentionState
from nestlearn.nn.convolution import CausalConv
from nestlearn.nn.decoding import inside_chunk, write_token
from nestlearn.ops import GATES, CoreState, Start, WriteRule, self_modify


@dataclass(frozen=True)
class MemoryState:
    """What the layer carries along a sequence: the convolution's last inputs, the core's memories, and, where
    attention makes the query, its keys and values."""

    conv: Tensor
    core: CoreState
    attention: AttentionState | None = None

    def index_select(self, rows: Tensor) -> MemoryState:
        """The state of the sequences ``rows`` (int64), in that order; a row may repeat."""
        attention = None if self.attention is None else self.attention.index_select(rows.to(self.conv.device))
        conv = self.conv.index_select(0, rows.to(self.conv.device))
        return MemoryState(conv, self.core.index_select(rows), attention)

    def detach(self) -> MemoryState:
        """The state cut from the graph that made it."""
        attention = None if self.attention is None else self.attention.detach()
        return MemoryState(self.conv.detach(), self.core.detach(), attention)


class MemoryMixer(nn.Module):
    """A sequence layer around :func:`nestlearn.ops.self_modify`, (B, T, dim) -> (B, T, dim), state in and out.

    A subclass says what the core starts from, :meth:`initial`, and may make more of the projections, :meth:`prepare`.

    Args:
        dim: width of the input and output.
        heads: independent cores; must divide ``dim``.
        rule: how the core is written.
        projections: names of the static projections; one number a head for a gate, a vector otherwise.
        conv_size: tokens that the causal depthwise convolution sees; 1 leaves it out.
        gate: whether a static sigmoid gate multiplies the output.

    Raises:
        UserError: ``heads`` does not divide ``dim``.
    """

    def __init__(
        self, dim: int, heads: int, rule: WriteRule, projections: Iterable[str], conv_size: int, gate: bool
    ) -> None:
        super().__init__()
        if dim < 1 or heads < 1 or dim % heads:
            raise UserError(f"heads={heads} must divide dim={dim}")
        self.dim, self.heads, self.width, self.rule = dim, heads, dim // heads, rule
        self.conv = CausalConv(dim, conv_size)
        self.project = nn.ModuleDict(
            {name: nn.Linear(dim, heads if name in GATES else dim, bias=False) for name in sorted(projections)}
        )
        self.out = nn.Linear(dim, dim, bias=False)
        self.gate = nn.Linear(dim, dim, bias=False) if gate else None
        self.norm = nn.RMSNorm(self.width, eps=1e-6)
        self.told: list[Tensor] | None = None  # of `step_sizes`

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw all parameters anew from the global random generator."""
        for linear in (self.gate, *self.project.values()):
            if linear is not None:
                nn.init.normal_(linear.weight, std=1 / math.sqrt(self.dim))  # type: ignore[arg-type]
        nn.init.normal_(self.out.weight, std=0.02)  # a fresh layer adds little to the residual stream
        self.conv.reset_parameters()
        nn.init.ones_(self.norm.weight)

    def initial(self) -> Start:
        """The start of the core, in float32 or wider."""
        raise NotImplementedError

    def prepare(
        self, inputs: dict[str, Tensor], state: MemoryState | None, lengths: Tensor | None
    ) -> tuple[dict[str, Tensor], AttentionState | None]:
        """What the core reads, from the projections, (B, H, T, d) each or (B, H, T) of a gate; and a state."""
        return inputs, None

    def forward(
        self, x: Tensor, state: MemoryState | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, MemoryState]:
        """Read and write along ``x`` (B, T, dim); ``lengths`` (B,) says how many tokens of each row count.

        Raises:
            UserError: an input of another shape, or a state of another batch or layer.
        """
        if x.ndim != 3 or x.shape[-1] != self.dim:
            raise UserError(f"the input has shape {tuple(x.shape)}: it must be (batch, tokens, {self.dim})")
        if state is not None and not isinstance(state, MemoryState):
            raise UserError(f"the state is a {type(state).__name__}: give what an earlier call returned, or None")
        if state is not None and state.conv.shape[0] != x.shape[0]:
            raise UserError(f"the state holds {state.conv.shape[0]} sequences, the input {x.shape[0]}: they must agree")
        u, conv_state = self.conv(x, None if state is None else state.conv, lengths)
        split = lambda t: t.view(*t.shape[:2], self.heads, t.shape[2] // self.heads).transpose(1, 2)  # noqa: E731
        inputs = {name: split(project(u)) for name, project in self.project.items()}
        inputs = {name: t.squeeze(-1) if name in GATES else t for name, t in inputs.items()}
        inputs, attention = self.prepare(inputs, state, lengths)
        with torch.autocast(x.device.type, enabled=False):  # states stay in float32
            start = self.initial()
            dtype = start.bias["eta"].dtype
            inputs = {name: t.to(dtype) for name, t in inputs.items()}
            before = None if state is None else state.core
            alone = before is not None and x.shape[1] == 1 and lengths is None and self.told is None
            if alone and inside_chunk(start, self.rule, before):
                y, core = write_token(inputs, start, self.rule, before)
            else:
                y, core = self_modify(inputs, start, self.rule, before, lengths, self.told)
            y = normed(self.norm, y)
        y = y.transpose(1, 2).flatten(-2).to(u.dtype)
        if self.gate is not None:
            y = y * torch.sigmoid(self.gate(u))
        return self.out(y), MemoryState(conv_state, core, attention)


@contextmanager
def step_sizes(model: nn.Module) -> Iterator[list[Float[Tensor, "B H T"]]]:
    """Inside, every recurrent layer of ``model`` adds the step sizes eta that it writes its tokens with to a list, in
    the order in which the layers run, zero for tokens that do not count. A loss may be made of them: what each write
    costs teaches a model to leave its memories alone where there is nothing to keep. Not for layers that are
    recomputed in the backward pass, which runs outside.

    >>> from nestlearn.nn import SelfReferentialTitans
    >>> layer = SelfReferentialTitans(16, heads=2, chunk_size=4)
    >>> with step_sizes(layer) as steps:
    ...     _ = layer(torch.zeros(1, 6, 16))
    >>> steps[0].shape
    torch.Size([1, 2, 6])
    """
    layers = [module for module in model.modules() if isinstance(module, MemoryMixer)]
    found: list[Tensor] = []
    for layer in layers:
        layer.told = found
    try:
        yield found
    finally:
        for layer in layers:
            layer.told = None


def wide(t: Tensor) -> Tensor:
    """``t`` in float32, or wider if it is."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def normed(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(x)`` in the precision of ``x``, which is float32 or wider, whatever that of an RMS norm's weight.

    What PEFT has put in a norm's place is called: its ``weight`` is that of the norm before tuning.
    """
    if type(norm) is not nn.RMSNorm:
        return norm(x)
    return F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)  # pyrefly: ignore


def lifetime_bias(retained: tuple[float, float], heads: int) -> Tensor:
    """Biases (heads,) of the raw ``alpha``: retained fractions per token from that of the first head to that of the
    last, spaced evenly in the logarithm of the memory's lifetime ``1 / (1 - alpha)``.

    Raises:
        UserError: not two fractions between 0 and 1.
    """
    if len(retained) != 2 or not all(0 < r < 1 for r in retained):
        raise UserError(f"retained must be two fractions between 0 and 1 (first and last head), got {retained}")
    shortest, longest = (math.log(1 / (1 - r)) for r in retained)
    lifetimes = torch.linspace(shortest, longest, heads).exp()
    return (lifetimes - 1).log()  # sigmoid(log(L - 1)) = 1 - 1/L

"""One block of a Hope model (Eq. 94 to 97): which layers a configuration makes it of, and how they follow one another.

Shapes: B rows, T tokens, D channels.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from nestlearn.errors import UserError
from nestlearn.models.hope.cache_hope import BlockState, HopeCacheLayer
from nestlearn.models.hope.configuration_hope import HopeConfig
from nestlearn.nn import (
    DESIGNS,
    CausalAttention,
    CausalConv,
    ContinuumMemory,
    LevelUpdate,
    MemoryLayer,
    MemoryMixer,
    SelfReferentialTitans,
)

# Arguments of SelfReferentialTitans that HopeConfig has under the same name.
TITANS_OPTIONS = ("chunk_size", "chunk_size_other", "conv_size", "objective", "read", "delta", "decay", "momentum")
TITANS_OPTIONS += ("inner_k", "inner_v", "inner_q", "inner_gates", "self_values", "retention", "write_scale")
TITANS_OPTIONS += ("eta_max", "stretch", "bounded", "normalize_v", "clip_values", "norm_limit", "retained")
TITANS_OPTIONS += ("accumulators", "gate", "shared_input")


def make_titans(config: HopeConfig) -> SelfReferentialTitans:
    """The token mixer of a "hope" block."""
    return SelfReferentialTitans(
        config.hidden_size,
        config.num_attention_heads,
        memory=config.memory_type,  # type: ignore[arg-type]  # the layer checks the name
        memory_hidden=config.memory_hidden_size,
        **{name: getattr(config, name) for name in TITANS_OPTIONS},
    )


def make_mixer(config: HopeConfig, block_type: str) -> MemoryMixer | CausalAttention:
    """The token mixer of a block."""
    if block_type == "hope":
        return make_titans(config)
    if block_type in DESIGNS:
        return make_design(config, block_type)
    window = config.attention_window if block_type == "sliding-window" else None
    dim, heads = config.hidden_size, config.num_attention_heads
    return CausalAttention(dim, heads, rope_theta=config.rope_theta, window=window)


def make_design(config: HopeConfig, name: str) -> MemoryLayer:
    """The token mixer of a block that is named after a design."""
    design = DESIGNS[name]
    changes: dict[str, Any] = {}
    for option in ("eta_max", "stretch") if "eta" in design.gates else ():
        if getattr(config, option) is not None:
            changes[option] = getattr(config, option)
    if design.at_anchor:
        changes["norm_limit"] = config.norm_limit
    if name == "omega":
        changes["window"] = config.omega_window
    if name == "miras":
        changes["objective"] = f"l{config.lp_power:g}"
    return MemoryLayer(
        config.hidden_size,
        config.num_attention_heads,
        config.chunk_size,
        design=design,
        memory_hidden=config.memory_hidden_size,
        conv_size=config.conv_size,
        retained=config.retained,  # type: ignore[arg-type]
        gate=config.gate,
        rope_theta=config.rope_theta,
        **changes,
    )


def make_memory(config: HopeConfig, block_type: str) -> ContinuumMemory:
    """The continuum memory of a block; that of a Transformer++ block is its one SwiGLU MLP."""
    plain = block_type == "attention"
    return ContinuumMemory(
        config.hidden_size,
        config.cms_chunk_sizes[-1:] if plain else config.cms_chunk_sizes,
        "sequential" if plain else config.cms_variant,  # type: ignore[arg-type]
        hidden=config.intermediate_size,
        activation="swiglu" if plain else config.cms_activation,  # type: ignore[arg-type]
        norm_eps=config.rms_norm_eps,
        online=None if plain else config.cms_online,  # type: ignore[arg-type]
        update=None if plain or config.cms_online is None else make_updates(config),
        objective=config.cms_objective,  # type: ignore[arg-type]
    )


def make_updates(config: HopeConfig) -> list[LevelUpdate]:
    """The learning rule of every level of a continuum memory that learns along the sequence."""
    levels = len(config.cms_chunk_sizes)
    each = {"cms_rule": config.cms_rule, "cms_lr": config.cms_lr}
    lists = {name: value if isinstance(value, list) else [value] * levels for name, value in each.items()}
    for name, values in lists.items():
        if len(values) != levels:
            raise UserError(f"{name} names {len(values)} levels, but cms_chunk_sizes {levels}: give one for each level")
    limits = dict(clip=config.cms_clip, norm_limit=config.cms_norm_limit, reduction=config.cms_reduction)
    return [LevelUpdate(rule, lr, **limits) for rule, lr in zip(*lists.values(), strict=True)]  # type: ignore[arg-type]


class HopeBlock(GradientCheckpointingLayer):
    """One block: ``h = x + mixer(norm(x))``, then the continuum memory ``y = CMS(h)`` (Eq. 94 to 97).

    Args:
        config: shape and switches.
        layer_idx: which block this is; ``config.block_types`` says of what type.
    """

    def __init__(self, config: HopeConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.block_types is not None
        block_type = config.block_types[layer_idx]
        self.layer_idx = layer_idx
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # Recurrent memories bring their own convolution.
        convolved = block_type in ("hope-attention", "sliding-window")
        self.conv = CausalConv(config.hidden_size, config.conv_size) if convolved else None
        self.mixer = make_mixer(config, block_type)
        self.memory = make_memory(config, block_type)

    def forward(
        self,
        hidden_states: Float[Tensor, "B T D"],
        lengths: Int[Tensor, " B"] | None = None,
        past_key_values: Cache | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Apply the block to right-compacted rows; ``past_key_values`` is read and updated in place."""
        layer = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        assert layer is None or isinstance(layer, HopeCacheLayer)
        y, state = self.read(hidden_states, None if layer is None else layer.state, lengths)
        if layer is not None:
            layer.store(state, hidden_states)
        return y

    def read(
        self, hidden_states: Float[Tensor, "B T D"], past: BlockState | None, lengths: Int[Tensor, " B"] | None
    ) -> tuple[Float[Tensor, "B T D"], BlockState]:
        """The same from a state to the next one."""
        u, conv = self.norm(hidden_states), None
        if self.conv is not None:
            u, conv = self.conv(u, None if past is None else past.conv, lengths)
        mixed, state = self.mixer(u, None if past is None else past.mixer, lengths)  # type: ignore[arg-type]
        y, memory = self.memory(hidden_states + mixed, None if past is None else past.memory, lengths)
        return y, BlockState(state, conv, memory)

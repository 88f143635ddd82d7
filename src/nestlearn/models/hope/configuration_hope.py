"""The configuration of a Hope language model."""

from __future__ import annotations

from dataclasses import field
from importlib import import_module
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

from nestlearn.errors import UserError, nearest

BLOCK_TYPES = ("hope", "hope-attention", "attention")
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
SIZES += ("conv_size", "chunk_size", "max_position_embeddings")
CACHE_LAYER_TYPE = "hope_state"  # names our cache layer in transformers' mapping


@strict
class HopeConfig(PreTrainedConfig):
    """Shape and switches of :class:`HopeForCausalLM`.

    Args:
        vocab_size: tokens in the vocabulary.
        hidden_size: width of the residual stream, in channels; a multiple of ``num_attention_heads``.
        num_hidden_layers: blocks.
        num_attention_heads: heads of every token mixer, attention or Titans.
        intermediate_size: hidden width of a block's MLPs, in channels, all levels of the continuum memory together.
        block_types: one of "hope", "hope-attention", "attention" for each block; None makes all of them "hope".
            "hope" mixes tokens by self-referential Titans, "hope-attention" by softmax attention behind the same
            short convolution; both end in the continuum memory. "attention" is a Transformer++ block.
        conv_size: taps of the causal convolution, in tokens.
        chunk_size, chunk_size_other, objective, read, delta, decay, momentum, inner_k, inner_v, inner_q,
            inner_gates, self_values, retention, write_scale, eta_max, bounded, normalize_v, clip_values,
            norm_limit, retained, gate, shared_input: as in :class:`nestlearn.nn.SelfReferentialTitans`.
        memory_type, memory_hidden_size: its ``memory`` and ``memory_hidden``.
        cms_chunk_sizes: tokens between two updates of each level of the continuum memory, fast to slow.
        cms_variant, cms_activation: as in :class:`nestlearn.nn.ContinuumMemory`.
        rms_norm_eps: added to the mean square inside each norm.
        rope_theta: base of the rotary wavelengths of the attention blocks.
        max_position_embeddings: training length in tokens, for the record; nothing in the model depends on it.
        initializer_range: standard deviation of fresh embedding, attention and MLP weights.
        tie_word_embeddings: whether the output head shares the input embedding.
        use_cache: whether a forward pass outside training returns its state.

    Raises:
        UserError: an unknown block type, a list of the wrong length, a size below 1, or heads that do not divide
            the width. Switches of a layer are checked by the layer when the model is built.

    >>> HopeConfig(num_hidden_layers=2, block_types=["hope", "attention"]).block_types
    ['hope', 'attention']
    """

    model_type = "hope"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 512
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 768
    block_types: list[str] | None = None
    conv_size: int = 4

    chunk_size: int = 64
    chunk_size_other: int | None = None
    memory_type: str = "linear"
    memory_hidden_size: int | None = None
    objective: str | None = None
    read: str = "inclusive"
    delta: bool = True
    decay: bool = True
    momentum: bool = False
    inner_k: bool = True
    inner_v: bool = True
    inner_q: bool = False
    inner_gates: bool = True
    self_values: bool = True
    retention: str = "start"
    write_scale: float | None = 0.05
    eta_max: float | int | None = None
    bounded: bool = True
    normalize_v: bool = True
    clip_values: bool = True
    norm_limit: float | int | None = 4.0
    retained: list[float] = field(default_factory=lambda: [0.98, 0.998])
    gate: bool = True
    shared_input: bool = False

    cms_chunk_sizes: list[int] = field(default_factory=lambda: [64, 512, 4096])
    cms_variant: str = "sequential"
    cms_activation: str = "swiglu"

    rms_norm_eps: float = 1e-6
    rope_theta: float | int = 10_000.0
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in SIZES:
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"hidden_size={self.hidden_size} is not a multiple of num_attention_heads="
                f"{self.num_attention_heads}: change one of them"
            )
        if self.block_types is None:
            self.block_types = ["hope"] * self.num_hidden_layers
        for name in self.block_types:
            if name not in BLOCK_TYPES:
                raise UserError(f"unknown block type {name!r}: {nearest(name, BLOCK_TYPES)}")
        if len(self.block_types) != self.num_hidden_layers:
            raise UserError(
                f"block_types names {len(self.block_types)} blocks, but num_hidden_layers="
                f"{self.num_hidden_layers}: give one type per block"
            )
        # A configuration is of use only with its models; importing them makes the auto classes know them.
        import_module("nestlearn.models.hope.modeling_hope")
        super().__post_init__(**kwargs)

    @property
    def layer_types(self) -> list[str]:
        """The cache layer of each block, as ``DynamicCache(config=...)`` asks for it.

        A property and not a field: transformers checks a field of this name against its own list, and resuming a
        ``Trainer`` run fails.
        """
        return [CACHE_LAYER_TYPE] * self.num_hidden_layers

    def validate_layer_type(self) -> None:
        """Replaces transformers' check of ``layer_types`` against its own list."""


AutoConfig.register("hope", HopeConfig)

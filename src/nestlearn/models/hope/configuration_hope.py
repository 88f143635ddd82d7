"""The configuration of a Hope language model."""

# No `from __future__ import annotations`: @strict checks no type that is a string.
import inspect
import math
import reprlib
from collections.abc import Callable
from dataclasses import field, fields
from importlib import import_module
from typing import Any, ClassVar, TypeVar

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

from nestlearn.errors import UserError, nearest
from nestlearn.nn.zoo import DESIGNS

BLOCK_TYPES = ("hope", "hope-attention", "attention", "sliding-window", *DESIGNS)
GROWING = ("hope-attention", "attention", *(name for name, design in DESIGNS.items() if design.attention))
"""Blocks whose state grows with the text."""
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
SIZES += ("conv_size", "chunk_size", "memory_hidden_size", "max_position_embeddings")
SIZES += ("attention_window", "omega_window", "lp_power")
MOST_LAYERS = 10_000  # each is a Python object, so more would fill the memory before any weight does
POSITIVE = ("rms_norm_eps", "rope_theta", "initializer_range", "eta_max", "norm_limit")
CACHE_LAYER_TYPE = "hope_state"  # names our cache layer in transformers' mapping

T = TypeVar("T", bound=type)


def plain_type_errors(cls: T) -> T:
    """A strict dataclass whose refusal of a type is a `UserError` of one line."""
    assign: Any = cls.__setattr__
    types = {f.name: inspect.formatannotation(f.type).replace(" | ", " or ") for f in fields(cls)}

    def __setattr__(self: Any, name: str, value: Any) -> None:
        try:
            assign(self, name, value)
        except StrictDataclassFieldValidationError:
            raise UserError(f"{name}={reprlib.repr(value)}: must be {types[name]}") from None

    cls.__setattr__ = __setattr__  # type: ignore[assignment]
    return cls


@plain_type_errors
@strict
class HopeConfig(PreTrainedConfig):
    """Shape and switches of :class:`HopeForCausalLM`.

    Args:
        vocab_size: tokens in the vocabulary.
        hidden_size: width of the residual stream, in channels; a multiple of ``num_attention_heads``.
        num_hidden_layers: blocks.
        num_attention_heads: heads of every token mixer, attention or Titans.
        intermediate_size: hidden width of a block's MLPs, in channels, all levels of the continuum memory together.
        block_types: one of ``BLOCK_TYPES`` for each block; None makes all of them "hope". If ``num_hidden_layers`` is
            lowered afterwards, a model is made of the first ones and the others are forgotten.
            "hope" mixes tokens by self-referential Titans, "hope-attention" by softmax attention behind the same
            short convolution, "sliding-window" by attention over a window behind it, and a name of
            :data:`nestlearn.nn.DESIGNS`, such as "gated-deltanet", by that :class:`nestlearn.nn.MemoryLayer`; all
            end in the continuum memory, which is one MLP if it has one level. "attention" is a Transformer++ block.
        conv_size: taps of the causal convolution, in tokens.
        chunk_size, chunk_size_other, objective, read, delta, decay, momentum, inner_k, inner_v, inner_q,
            inner_gates, self_values, retention, write_scale, eta_max, stretch, bounded, normalize_v, clip_values,
            norm_limit, retained, accumulators, gate, shared_input: as in :class:`nestlearn.nn.SelfReferentialTitans`.
            Of these a layer of ``DESIGNS`` takes chunk_size, retained, gate, eta_max and stretch where its step size
            is learned, norm_limit where it takes gradients at the anchor; the rest is its name's choice.
        memory_type, memory_hidden_size: its ``memory`` and ``memory_hidden``.
        attention_window: tokens that a query of "sliding-window" sees, itself included.
        omega_window: pairs in each step of "omega", in tokens.
        lp_power: p of the Lp objective of "miras", at least 1.
        cms_chunk_sizes: tokens between two updates of each level of the continuum memory, fast to slow.
        cms_variant, cms_activation, cms_online, cms_objective: as in :class:`nestlearn.nn.ContinuumMemory`.
            "next-token" needs rows without filler.
        cms_rule, cms_lr: rule and learning rate of the levels where ``cms_online`` is set, one for all or a list.
        cms_reduction, cms_clip, cms_norm_limit: as in :class:`nestlearn.nn.LevelUpdate`.
        rms_norm_eps: added to the mean square inside each norm.
        rope_theta: base of the rotary wavelengths of the attention blocks.
        max_position_embeddings: training length in tokens, for the record; nothing in the model depends on it.
        initializer_range: standard deviation of fresh embedding, attention and MLP weights.
        tie_word_embeddings: whether the output head shares the input embedding.
        use_cache: whether a forward pass outside training returns its state.

    Raises:
        UserError: a value of the wrong type, an unknown block type, a list of the wrong length, a number outside
            its range, or heads that do not divide the width. Other switches of a layer are checked by the layer
            when the model is built.

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
    write_scale: float | int | None = 0.05
    eta_max: float | int | None = None
    stretch: float | int | None = None
    bounded: bool = True
    normalize_v: bool = True
    clip_values: bool = True
    norm_limit: float | int | None = 2.0
    retained: list[float | int] = field(default_factory=lambda: [0.98, 0.998])
    accumulators: int = 0
    gate: bool = True
    shared_input: bool = False
    attention_window: int = 256
    omega_window: int = 8
    lp_power: float | int = 3.0

    cms_chunk_sizes: list[int] = field(default_factory=lambda: [64, 512, 4096])
    cms_variant: str = "sequential"
    cms_activation: str = "swiglu"
    cms_online: str | None = None
    cms_objective: str = "l2"
    cms_rule: str | list[str] = "sgd"
    cms_lr: float | int | list[float | int] = 0.1
    cms_reduction: str = "sum"
    cms_clip: float | int | None = 1.0
    cms_norm_limit: float | int | None = 1.0

    rms_norm_eps: float | int = 1e-6
    rope_theta: float | int = 10_000.0
    max_position_embeddings: int = 2048
    initializer_range: float | int = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_numbers()
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
        self.validate_layer_type()
        # A configuration is of use only with its models; importing them makes the auto classes know them.
        import_module("nestlearn.models.hope.modeling_hope")
        super().__post_init__(**kwargs)

    def _check_numbers(self) -> None:
        def require(name: str, holds: Callable[[Any], bool], what: str) -> None:
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise UserError(f"{name}={value}: must be {what}")

        for name in SIZES:
            require(name, lambda value: value >= 1, "at least 1")
        for name in POSITIVE:
            require(name, lambda value: 0 < value < math.inf, "positive and finite")
        require("num_hidden_layers", lambda value: value <= MOST_LAYERS, f"at most {MOST_LAYERS}")
        require("write_scale", lambda value: 0 < value < 1, "between 0 and 1")
        require(
            "retained", lambda value: len(value) == 2 and all(0 < v < 1 for v in value), "two numbers between 0 and 1"
        )

    @property
    def layer_types(self) -> list[str]:
        """The cache layer of each block, as ``DynamicCache(config=...)`` asks for it.

        A property and not a field: transformers checks a field of this name against its own list, and resuming a
        ``Trainer`` run fails.
        """
        return [CACHE_LAYER_TYPE] * self.num_hidden_layers

    def validate_layer_type(self) -> None:
        """One block type per block, also when transformers writes the configuration. It replaces transformers' check of
        ``layer_types`` against its own list."""
        if self.block_types is not None and len(self.block_types) != self.num_hidden_layers:
            raise UserError(
                f"block_types names {len(self.block_types)} blocks, but num_hidden_layers="
                f"{self.num_hidden_layers}: give one type per block"
            )


AutoConfig.register("hope", HopeConfig)

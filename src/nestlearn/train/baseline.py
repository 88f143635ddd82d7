"""Transformer++ as the yardstick: Hugging Face's Llama with the parameters of the model beside it.

RMSNorm, rotary positions, SwiGLU and no biases are what the literature calls Transformer++. Hidden size, layers,
heads and tied embeddings are those of the other model; the width of the SwiGLU takes up the difference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nestlearn.errors import UserError
from nestlearn.train.model import parameter_count

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedConfig

TOLERANCE = 0.02  # of the other model's parameters
EQUAL = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings")
# Equal where the other model has them; else Llama's own values hold.
OPTIONAL = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "rms_norm_eps", "initializer_range"),
    *("max_position_embeddings", "rope_theta", "rope_parameters"),
)


def matching_config(config: PreTrainedConfig, parameters: int) -> LlamaConfig:
    """The Transformer++ beside ``config`` whose count is within 2 % of ``parameters``.

    Raises `UserError` if no width of the SwiGLU gets there (the attention alone has more parameters).

    >>> from transformers import LlamaConfig
    >>> beside = LlamaConfig(vocab_size=256, hidden_size=8, num_hidden_layers=2, num_attention_heads=2)
    >>> matching_config(beside, 6000).intermediate_size
    28
    """
    from transformers import LlamaConfig

    shared = {name: getattr(config, name) for name in EQUAL}
    shared |= {name: getattr(config, name) for name in OPTIONAL if getattr(config, name, None) is not None}

    def at_width(width: int) -> LlamaConfig:
        return LlamaConfig(intermediate_size=width, **shared)

    # The count is linear in the width, so two counts give the line.
    one, two = parameter_count(at_width(1)), parameter_count(at_width(2))
    width = max(1, round(1 + (parameters - one) / (two - one)))
    matched = at_width(width)
    count = parameter_count(matched)
    if abs(count - parameters) > TOLERANCE * parameters:
        raise UserError(
            f"no Transformer++ of {parameters} parameters with hidden_size {config.hidden_size}: the nearest has "
            f'{count}; give the model a larger intermediate_size, or set baseline.kind = "none"'
        )
    return matched

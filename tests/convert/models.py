"""Tiny random models of every family, with weights large enough that a mistake in one shows in the logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCAB, LAYERS = 60, 4
ROPE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 28,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _gpt2() -> PreTrainedConfig:
    sizes = {"vocab_size": VOCAB, "n_embd": 16, "n_inner": 28, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}
    return GPT2Config(**sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**ROPE),
    "llama with biases": lambda: LlamaConfig(**ROPE, mlp_bias=True),
    "qwen2": lambda: Qwen2Config(**ROPE),
    "qwen3": lambda: Qwen3Config(**ROPE),
    "mistral": lambda: MistralConfig(**ROPE),
    "gemma": lambda: GemmaConfig(**ROPE),
    "gemma2": lambda: Gemma2Config(**ROPE),
    "gemma3": lambda: Gemma3TextConfig(**ROPE),
    "gpt2": _gpt2,
}


def make(family: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A model for inference in fp32."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]())
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def tokens(rows: int = 3, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))

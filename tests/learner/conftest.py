"""A tiny Llama of random weights that reads bytes."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from nestlearn.convert import ContinualModel, Level, LevelsConfig, convert
from nestlearn.data import load_tokenizer

WINDOW = 16
LEVELS = (Level(WINDOW, 1e-2), Level(2 * WINDOW, 1e-2), Level(4 * WINDOW, 1e-2))


def tiny(seed: int = 0, dtype: torch.dtype = torch.float32, layers: int = 3, **levels: object) -> ContinualModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
    )
    return convert(LlamaForCausalLM(config).to(dtype), LevelsConfig(**{"levels": LEVELS, "layers": "all", **levels}))


def words(count: int, seed: int = 0) -> str:
    """Text that can be learned: few words, many times."""
    choose = random.Random(seed).choice
    return " ".join(choose(["level", "memory", "fast", "slow", "of", "a", "chunk"]) for _ in range(count))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer("bytes")


@pytest.fixture
def model() -> ContinualModel:
    return tiny()


@pytest.fixture(scope="session")
def make() -> Callable[..., ContinualModel]:
    return tiny

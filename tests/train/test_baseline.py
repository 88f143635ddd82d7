"""The baseline has the parameters of the model beside it, within 2 %, and shares its outer shape."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.errors import UserError
from nestlearn.train.baseline import TOLERANCE, matching_config
from nestlearn.train.model import build, check_options, count_parameters, parameter_count
from nestlearn.train.recipe import ModelRecipe


@settings(max_examples=15, deadline=None)
@given(
    hidden=st.sampled_from([16, 32, 48]),
    layers=st.integers(1, 3),
    levels=st.integers(1, 3),
    memory=st.sampled_from(["linear", "mlp"]),
    tied=st.booleans(),
)
def test_counts_match_hope(hidden: int, layers: int, levels: int, memory: str, tied: bool) -> None:
    config = HopeConfig(
        vocab_size=258,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=6 * hidden,
        memory_type=memory,
        cms_chunk_sizes=[8 * 4**level for level in range(levels)],
        tie_word_embeddings=tied,
    )
    parameters = count_parameters(HopeForCausalLM(config))
    assert parameter_count(config) == parameters
    beside = matching_config(config, parameters)
    assert abs(count_parameters(LlamaForCausalLM(beside)) - parameters) <= TOLERANCE * parameters
    for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "tie_word_embeddings"):
        assert getattr(beside, name) == getattr(config, name)
    assert beside.rope_parameters["rope_theta"] == config.rope_theta


def test_a_llama_matches_itself() -> None:
    config = LlamaConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=77
    )
    assert matching_config(config, parameter_count(config)).intermediate_size == 77


def test_no_match_is_one_line() -> None:
    config = LlamaConfig(vocab_size=10, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
    with pytest.raises(UserError, match=r"no Transformer.. of 1000 parameters with hidden_size 64: the nearest has"):
        matching_config(config, 1000)


def test_counting_allocates_nothing() -> None:
    config = LlamaConfig(vocab_size=1000, hidden_size=8192, intermediate_size=65536, num_hidden_layers=100)
    assert parameter_count(config) > 1e11


@pytest.mark.parametrize("sizes", [{"hidden_size": 10**11}, {"vocab_size": 10**11}, {"hidden_size": 10**30}])
def test_a_model_that_cannot_be_allocated_is_one_line(sizes: dict[str, int]) -> None:
    with pytest.raises(UserError, match="does not fit into the memory") as error:
        build(HopeConfig(num_hidden_layers=1, **sizes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["hope", "transformer++"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"hidden_size": "16"}, "hidden_size='16': "),
        ({"tie_word_embeddings": None}, "tie_word_embeddings=None: "),
        ({"num_attention_heads": 0}, "num_attention_heads=0: must be at least 1"),
        ({"rms_norm_eps": [1]}, "rms_norm_eps="),
    ],
)
def test_options_of_the_wrong_type_or_size_are_one_line(kind: str, options: dict[str, object], said: str) -> None:
    with pytest.raises(UserError) as error:
        check_options(ModelRecipe(kind, options))
    assert str(error.value).startswith(f"[model] of the recipe: {said}")
    assert "\n" not in str(error.value)
    assert "Field" not in str(error.value)


def test_models_start_in_float32() -> None:
    config = LlamaConfig(
        vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, dtype="bfloat16"
    )
    assert {parameter.dtype for parameter in build(config).parameters()} == {torch.float32}

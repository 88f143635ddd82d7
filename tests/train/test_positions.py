"""A table of positions that is too short is said before anything is read."""

import pytest
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nestlearn.data import load_tokenizer
from nestlearn.errors import UserError
from nestlearn.train.evaluate import evaluate_text
from nestlearn.train.generate import generate_text

BYTES = load_tokenizer("bytes")


def test_a_learned_table_ends_and_rotary_positions_do_not() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=258, n_positions=16, n_embd=8, n_layer=1, n_head=1)).eval()
    generate_text(gpt2, BYTES, "x" * 10, max_new_tokens=7)
    with pytest.raises(UserError, match=r"a prompt of 10 tokens with max_new_tokens=8 takes 17 tokens: .* 16 in all"):
        generate_text(gpt2, BYTES, "x" * 10, max_new_tokens=8)
    evaluate_text(gpt2, BYTES, ["x" * 40], context_length=16)
    with pytest.raises(UserError, match="the context length takes 17 tokens: the model has positions for 16 in all"):
        evaluate_text(gpt2, BYTES, ["x" * 40], context_length=17)
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=258, max_position_embeddings=16, **sizes)).eval()
    generate_text(llama, BYTES, "x" * 10, max_new_tokens=8)
    evaluate_text(llama, BYTES, ["x" * 40], context_length=17)

"""Text that is given out as it comes."""

from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.convert import Level, LevelsConfig, convert
from nestlearn.data import load_tokenizer
from nestlearn.errors import UserError
from nestlearn.train.generate import _Relay, generate_text

BYTES = load_tokenizer("bytes")


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def relayed(data: bytes) -> list[str]:
    """What is given out when the bytes come one by one, the prompt first."""
    pieces: list[str] = []
    relay = _Relay(BYTES, pieces.append)
    relay.put(torch.tensor([[1, 2, 3]]))
    for byte in data:
        relay.put(torch.tensor([byte]))
    relay.end()
    return pieces


@pytest.mark.parametrize("text", ["naïve é\nü x", "日本語の文 と 日", "a 日\n", "emoji 👩‍🔬 end", "é", "한국어 글", ""])
def test_no_piece_ends_inside_a_character(text):
    pieces = relayed(text.encode())
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_text_comes_before_the_end():
    assert relayed(b"one two\nthree four") == ["one ", "two\n", "three ", "four"]


def test_a_character_cut_off_by_the_end_is_dropped():
    assert "".join(relayed("ab 日".encode()[:-1])) == "ab "


def test_pieces_add_up_to_what_the_model_generates(llama):
    pieces: list[str] = []
    text = generate_text(llama, BYTES, "def ", max_new_tokens=60, temperature=0, on_text=pieces.append)
    inputs = torch.tensor([list(b"def ")])
    expected = llama.generate(inputs, max_new_tokens=60, do_sample=False, eos_token_id=256, pad_token_id=257)
    decoded = BYTES.decode(expected[0, 4:], skip_special_tokens=True)
    assert text == "".join(pieces) == decoded.rstrip("\N{REPLACEMENT CHARACTER}")
    assert len(text) > 0


def test_same_seed_same_text_and_the_random_state_is_left_alone(llama):
    before = torch.get_rng_state()
    texts = [generate_text(llama, BYTES, "x", max_new_tokens=40, seed=seed) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_small_top_p_is_greedy(llama):
    greedy = generate_text(llama, BYTES, "x", max_new_tokens=30, temperature=0)
    assert generate_text(llama, BYTES, "x", max_new_tokens=30, top_p=1e-6, seed=0) == greedy
    for temperature in (1e-3, 1e-5, 1e-300):
        assert generate_text(llama, BYTES, "x", max_new_tokens=30, temperature=temperature, seed=0) == greedy


def test_the_generation_config_of_the_folder_has_no_effect(llama, monkeypatch):
    options = [{"temperature": 0}, {"seed": 0}]
    plain = [generate_text(llama, BYTES, "x", max_new_tokens=20, **option) for option in options]
    own = GenerationConfig(num_beams=3, repetition_penalty=9.0, min_new_tokens=25, no_repeat_ngram_size=1)
    monkeypatch.setattr(llama, "generation_config", own)
    assert [generate_text(llama, BYTES, "x", max_new_tokens=20, **option) for option in options] == plain
    assert llama.generation_config is own
    converted = convert(llama, LevelsConfig(levels=(Level(16, 1e-3),), layers="all"))
    assert [generate_text(converted, BYTES, "x", max_new_tokens=20, **option) for option in options] == plain
    assert converted.unload().generation_config is own


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(llama, temperature, value):
    class Broken(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits[..., 5] = value
            return output

    with pytest.raises(UserError, match="not finite"):
        generate_text(Broken(llama.config).eval(), BYTES, "x", max_new_tokens=3, temperature=temperature)


@pytest.mark.filterwarnings("ignore:Using the model-agnostic default")
def test_hope_is_not_warned_of_its_training_length(monkeypatch):
    from transformers.generation import stopping_criteria

    said: list[str] = []
    monkeypatch.setattr(stopping_criteria.logger, "warning_once", lambda text, *args: said.append(text))
    config = HopeConfig(
        vocab_size=258,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=6,
        max_position_embeddings=4,
    )
    model = HopeForCausalLM(config).eval()
    generate_text(model, BYTES, "long prompt", max_new_tokens=3, seed=0)
    assert model.generate(torch.arange(9)[None]).shape[1] > 9
    assert said == []


def test_the_end_of_the_document_ends_it(llama):
    class Ending(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits[..., 256] = 1e4
            return output

    assert generate_text(Ending(llama.config).eval(), BYTES, "x", max_new_tokens=30) == ""


def test_an_empty_prompt_begins_a_document(llama, monkeypatch):
    given = {}
    stub = SimpleNamespace(device=llama.device, generation_config=None, generate=lambda **inputs: given.update(inputs))
    stub.named_modules = llama.named_modules
    generate_text(stub, BYTES, "")
    assert given["input_ids"].tolist() == [[256]]


def test_prompt_that_is_no_text(llama):
    with pytest.raises(UserError, match="not UTF-8"):
        generate_text(llama, BYTES, b"caf\xe9".decode("utf-8", "surrogateescape"))


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"temperature": float("nan")},
        {"seed": -1},
        {"seed": 2**64},
    ],
)
def test_values_out_of_range(llama, bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        generate_text(llama, BYTES, "x", **bad)

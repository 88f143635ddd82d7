"""Perplexity and bits per byte against sums by hand, Hugging Face's formula, and one pass over everything."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.data import load_tokenizer, stream_documents, streams
from nestlearn.errors import UserError
from nestlearn.models.hope.configuration_hope import BLOCK_TYPES, GROWING
from nestlearn.train.evaluate import NotFinite, evaluate_text

BYTES = load_tokenizer("bytes")
TEXT = "def f(x):\n    return 'é日' + x\n" * 4


class Bigram(nn.Module):
    """Logits that depend on the last token alone, and on a state that sums what came before it."""

    def __init__(self, block_types: list[str] | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(258, 258)
        self.config = SimpleNamespace(block_types=block_types or ["hope"], model_type="bigram")
        self.device = torch.device("cpu")
        self.seen: list[int] = []

    def forward(self, input_ids, past_key_values, use_cache):
        self.seen.append(input_ids.shape[1])
        rows = self.table(input_ids)
        before = torch.zeros_like(rows[:, :1]) if past_key_values is None else past_key_values
        total = before + rows.cumsum(1)
        logits = rows + 0.1 * torch.sin(total)
        return SimpleNamespace(logits=logits, past_key_values=total[:, -1:] if use_cache else None)


@pytest.fixture
def bigram() -> Bigram:
    torch.manual_seed(0)
    return Bigram()


@pytest.fixture
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def hope() -> HopeForCausalLM:
    torch.manual_seed(0)
    config = HopeConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        chunk_size=4,
        cms_chunk_sizes=[4, 8],
        initializer_range=0.5,
    )
    return HopeForCausalLM(config).eval()


def hugging_face(model: LlamaForCausalLM, stream: torch.Tensor, max_length: int, stride: int) -> float:
    """The loop of the guide to perplexity, with sums in place of its means of means."""
    nats, previous_end = 0.0, 1
    for begin in range(0, len(stream), stride):
        end = min(begin + max_length, len(stream))
        ids = stream[None, begin:end]
        labels = ids.clone()
        labels[:, : -(end - previous_end)] = -100
        with torch.no_grad():
            loss = model(ids, labels=labels).loss
        nats += float(loss) * (end - previous_end)
        previous_end = end
        if end == len(stream):
            break
    return nats


def test_by_hand():
    """A model that gives every byte the same chance, and eos twice the logit of the others."""
    model = Bigram()
    nn.init.zeros_(model.table.weight)
    with torch.no_grad():
        model.table.weight[:, 256] = 1.0
    model.forward = lambda input_ids, **_: SimpleNamespace(logits=model.table(input_ids))
    result = evaluate_text(model, BYTES, ["né", "x"], context_length=3)
    total = math.log(257 + math.e)
    nats = 4 * total + (total - 1)  # four bytes, and the eos between the documents
    assert result["nats"] == pytest.approx(nats, rel=1e-6)
    assert (result["tokens"], result["bytes"]) == (5, 4)
    assert result["perplexity"] == pytest.approx(math.exp(nats / 5), rel=1e-6)
    assert result["bits_per_byte"] == pytest.approx(nats / 4 / math.log(2), rel=1e-6)
    assert result["nats_per_token"] == pytest.approx(nats / 5, rel=1e-6)


@pytest.mark.parametrize(("context", "stride"), [(16, 16), (16, 5), (16, 1), (300, 300), (7, 7), (1, 1)])
def test_windows_are_hugging_faces(llama, context, stride):
    result = evaluate_text(llama, BYTES, [TEXT], context_length=context, stride=stride, batch_size=3)
    stream = torch.tensor([256, *TEXT.encode()])
    assert result["nats"] == pytest.approx(hugging_face(llama, stream, context + 1, stride), rel=1e-5)
    assert result["tokens"] == result["bytes"] == len(TEXT.encode())


@settings(max_examples=30)
@given(st.integers(1, 60), st.integers(1, 20), st.data())
def test_every_token_is_scored_once_with_the_stated_context(length, context, data):
    stride = data.draw(st.integers(1, context))
    stream = iter([torch.arange(0, 1).numpy(), torch.arange(1, length + 1).numpy()])
    from nestlearn.train.evaluate import _windows

    windows = list(_windows(stream, context, stride))
    scored = [int(i) for window in windows for i in window.ids[window.known :]]
    assert scored == list(range(1, length + 1))
    for window in windows:
        assert window.ids[0] == window.start
        assert len(window.ids) <= context + 1
    assert all(after.start - before.start == stride for before, after in pairwise(windows))


@pytest.mark.parametrize("name", ["bigram", "hope"])
def test_carried_state_equals_one_pass_whatever_the_pieces(name, request):
    model = request.getfixturevalue(name)
    size = len(TEXT.encode())
    whole = evaluate_text(model, BYTES, [TEXT], context_length=size)
    for pieces in (1, 4, 7, 64, size + 10):
        carried = evaluate_text(model, BYTES, [TEXT], context_length=pieces, carry_state=True)
        assert carried["nats"] == pytest.approx(whole["nats"], rel=1e-5)
        assert carried["tokens"] == whole["tokens"]
    fresh = evaluate_text(model, BYTES, [TEXT], context_length=7)
    assert abs(fresh["nats"] / whole["nats"] - 1) > 1e-4  # the state does matter


def test_every_block_of_bounded_state_carries_it():
    torch.manual_seed(0)
    kinds = [kind for kind in BLOCK_TYPES if kind not in GROWING]
    assert {"hope", "deltanet", "titans", "sliding-window"} <= set(kinds)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": len(kinds)}
    options = {"cms_chunk_sizes": [4], "attention_window": 6, "initializer_range": 0.2}
    model = HopeForCausalLM(HopeConfig(vocab_size=258, block_types=kinds, **sizes, **options)).eval()
    whole = evaluate_text(model, BYTES, [TEXT], context_length=len(TEXT.encode()))
    carried = evaluate_text(model, BYTES, [TEXT], context_length=7, carry_state=True)
    assert carried["nats"] == pytest.approx(whole["nats"], rel=1e-5)


def test_models_whose_state_grows_are_refused(llama):
    with pytest.raises(UserError, match="that of llama grows"):
        evaluate_text(llama, BYTES, [TEXT], context_length=8, carry_state=True)
    mixed = Bigram(["hope", "hope-attention", "attention"])
    with pytest.raises(UserError, match="that of attention, hope-attention grows"):
        evaluate_text(mixed, BYTES, [TEXT], context_length=8, carry_state=True)
    assert mixed.seen == []


def test_a_file_is_read_as_it_is_scored(bigram, tmp_path):
    """The first pieces have been scored before the file is found to be bad at its end."""
    path = tmp_path / "long.txt"
    path.write_bytes(b"some words of text\n" * 40_000 + b"\xff")
    _, documents = stream_documents(path)
    with pytest.raises(UserError, match=f"bad byte at offset {40_000 * 19}"):
        evaluate_text(bigram, BYTES, documents, context_length=1024, carry_state=True)
    assert sum(bigram.seen) > 250_000
    assert set(bigram.seen) == {1024}


def test_max_tokens_stops_at_a_unit(bigram, monkeypatch):
    monkeypatch.setattr(streams, "LEAST", 10)
    units = list(streams.text_units([TEXT]))
    limit = len("".join(units[:3]).encode()) + 1
    result = evaluate_text(bigram, BYTES, iter([TEXT]), context_length=8, max_tokens=limit)
    assert result["tokens"] == result["bytes"] == limit - 1
    assert evaluate_text(bigram, BYTES, [TEXT], context_length=8, max_tokens=1)["tokens"] == len(units[0].encode())


@pytest.mark.parametrize("mode", [{"stride": 3}, {"stride": 8}, {"carry_state": True}])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_is_named_by_position(bigram, mode, value):
    with torch.no_grad():
        bigram.table.weight[ord("q"), 0] = value
    text = "abc" * 9 + "q!" + "abc" * 9
    with pytest.raises(UserError, match="loss of token 29 is not finite") as error:
        evaluate_text(bigram, BYTES, [text], context_length=8, **mode)
    assert "\n" not in str(error.value)


def test_a_perplexity_beyond_float64_is_refused_with_its_nats(bigram):
    with torch.no_grad():
        bigram.table.weight[:, 0] = 5000.0
    with pytest.raises(NotFinite, match=r"perplexity of 4\d{3}\.?\d* nats per token is too large") as error:
        evaluate_text(bigram, BYTES, [TEXT], context_length=8)
    assert "\n" not in str(error.value)


def test_bad_lengths_and_no_text(bigram):
    for arguments, said in [
        ({"context_length": 0}, "context length 0"),
        ({"context_length": 4, "stride": 5}, "give 1 to 4"),
        ({"context_length": 4, "stride": 0}, "stride 0"),
        ({"context_length": 4, "stride": 2, "carry_state": True}, "no meaning"),
    ]:
        with pytest.raises(UserError, match=said):
            evaluate_text(bigram, BYTES, [TEXT], **arguments)
    with pytest.raises(UserError, match="no text to score"):
        evaluate_text(bigram, BYTES, [], context_length=4)


def test_the_model_keeps_its_mode_and_the_protocol_is_stated(llama):
    llama.train()
    result = evaluate_text(llama, BYTES, [TEXT], context_length=8, stride=4)
    assert llama.training
    assert all(parameter.grad is None for parameter in llama.parameters())
    assert result["protocol"] == "windows of 8 tokens every 4, the last 4 of each scored, state fresh"
    assert (result["context_length"], result["stride"], result["carry_state"]) == (8, 4, False)

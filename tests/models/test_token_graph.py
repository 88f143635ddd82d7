"""Decoding through recorded tokens gives what decoding gives. Without a GPU the recording is replayed in Python."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from nestlearn.errors import UserError
from nestlearn.models.hope import HopeConfig, HopeForCausalLM
from nestlearn.models.hope.token_graph import Run, TokenGraph

CONFIG = dict(
    vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, chunk_size=4, initializer_range=0.3
)


def make(**changes: object) -> HopeForCausalLM:
    torch.manual_seed(0)
    return HopeForCausalLM(HopeConfig(**{**CONFIG, **changes})).double().eval()


class Recorder:
    """As a CUDA graph: what was recorded runs again on the same tensors and writes the same tensors."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, run: Run) -> tuple[Callable[[], None], list[Tensor]]:
        self.recorded += 1
        made = [t.clone() for t in run()]

        def replay() -> None:
            self.replayed += 1
            for out, new in zip(made, run(), strict=True):
                out.copy_(new)

        return replay, made


def recorded(model: HopeForCausalLM) -> Recorder:
    recorder = Recorder()
    model.model.token_graph = TokenGraph(list(model.model.layers), recorder)
    return recorder


def generate(model: HopeForCausalLM, prompt: Tensor, mask: Tensor | None = None) -> Tensor:
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt) if mask is None else mask,
        max_new_tokens=21,
        min_new_tokens=21,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    return torch.stack(out.logits)


@pytest.mark.parametrize("types", [["hope", "hope"], ["deltanet", "hope"]])
def test_generating_is_the_same(types: list[str]) -> None:
    model = make(block_types=types)
    prompt = torch.randint(32, (3, 6), generator=torch.Generator().manual_seed(1))
    expected = generate(model, prompt)
    recorder = recorded(model)
    torch.testing.assert_close(generate(model, prompt), expected, rtol=0, atol=0)
    assert recorder.recorded == 1
    assert (
        recorder.replayed == 15
    )  # of the 20 tokens that are read one by one, those at 8, 12, 16, 20, 24 begin a chunk
    torch.testing.assert_close(generate(model, prompt[:1]), expected[:, :1])  # another number of rows
    assert recorder.recorded == 2


def test_rows_with_filler_begin_their_chunks_at_other_times() -> None:
    model = make()
    prompt = torch.randint(32, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(prompt)
    mask[0, :2] = 0
    expected = generate(model, prompt, mask)
    recorder = recorded(model)
    torch.testing.assert_close(generate(model, prompt, mask), expected, rtol=0, atol=0)
    assert recorder.replayed > 5


@torch.no_grad()
def test_a_state_is_a_value() -> None:
    model = make()
    recorded(model)
    cache = DynamicCache(config=model.config)
    model(torch.tensor([[1, 2, 3, 4, 5]]), past_key_values=cache)
    other = copy.deepcopy(cache)
    first = model(torch.tensor([[6]]), past_key_values=cache).logits
    model(torch.tensor([[7]]), past_key_values=cache)
    torch.testing.assert_close(model(torch.tensor([[6]]), past_key_values=other).logits, first, rtol=0, atol=0)


@torch.no_grad()
def test_weights_that_change_are_read() -> None:
    model = make()
    recorder = recorded(model)
    prompt = torch.tensor([[1, 2, 3, 4, 5]])
    generate(model, prompt)
    for change in ("in place", "another tensor"):
        for parameter in model.parameters():
            if change == "in place":
                parameter.mul_(1.1)
            else:
                parameter.data = parameter.data * 0.9
        mine = generate(model, prompt)
        graph, model.model.token_graph = model.model.token_graph, None
        torch.testing.assert_close(mine, generate(model, prompt), rtol=0, atol=0)
        model.model.token_graph = graph
    assert recorder.recorded == 2  # tensors elsewhere need a new recording


@pytest.mark.parametrize(
    "changes",
    [
        {"memory_type": "mlp"},
        {"momentum": True},
        {"block_types": ["hope", "attention"]},
        {"block_types": ["hope", "hope-attention"]},
        {"cms_online": "local"},
        {"cms_online": "next-token"},
    ],
)
def test_what_has_no_short_way_goes_the_general_one(changes: dict[str, object]) -> None:
    model = make(**changes)
    prompt = torch.tensor([[1, 2, 3, 4, 5]])
    expected = generate(model, prompt)
    recorder = recorded(model)
    torch.testing.assert_close(generate(model, prompt), expected, rtol=0, atol=0)
    assert recorder.replayed == 0


def test_a_gradient_goes_the_general_way() -> None:
    model = make()
    recorder = recorded(model)
    cache = DynamicCache(config=model.config)
    model(torch.tensor([[1, 2, 3, 4, 5]]), past_key_values=cache)
    model(torch.tensor([[6]]), past_key_values=cache).logits.sum().backward()
    assert recorder.recorded == 0
    assert model.model.layers[0].norm.weight.grad is not None


def test_it_needs_a_gpu_and_a_copy_has_none() -> None:
    model = make()
    with pytest.raises(UserError, match="the model is on cpu"):
        model.use_cuda_graph()
    recorded(model)
    assert copy.deepcopy(model).model.token_graph is None
    model.use_cuda_graph(False)
    assert model.model.token_graph is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu() -> None:
    model = make(chunk_size=16).to("cuda")
    prompt = torch.randint(32, (2, 20), device="cuda")
    expected = generate(model, prompt)
    model.use_cuda_graph()
    torch.testing.assert_close(generate(model, prompt), expected)

"""Levels that learn from the model's own next-token loss: against a plain loop, in pieces, and differentiated."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F
from transformers import DynamicCache

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.errors import UserError
from nestlearn.nn.continuum.memory import ContinuumMemory

VOCABULARY = 31
CASES: dict[str, dict[str, Any]] = {
    "hope": {},
    "attention": {"block_types": ["hope-attention", "attention"]},
    "nested": {"cms_variant": "nested", "cms_rule": ["delta-momentum", "m3"]},
    "independent": {"cms_variant": "independent", "cms_rule": "dgd", "cms_activation": "mlp"},
    "mean": {"cms_reduction": "mean", "cms_clip": None, "cms_lr": [1.0, 0.5]},
}


def make(online: str | None = "next-token", **options: Any) -> HopeForCausalLM:
    torch.manual_seed(0)
    config = HopeConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        chunk_size=4,
        initializer_range=0.3,
        cms_online=online,
        **{"cms_chunk_sizes": [4, 8], **options},
    )
    return HopeForCausalLM(config).double().eval()


def ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def plain_loop(model: HopeForCausalLM, tokens: Tensor, sizes: list[int], lr: float) -> Tensor:
    """Eq. 71 with an ordinary static model, one row and SGD: the logits (T, V), differentiable in its parameters."""
    names = {
        level: [n for n, _ in model.named_parameters() if f".levels.{level}." in n and "norm" not in n]
        for level in range(len(sizes))
    }
    weights = dict(model.named_parameters())
    error = {name: torch.zeros_like(weights[name]) for level in names.values() for name in level}
    cache, outputs, start = DynamicCache(config=model.config), [], 0
    while start < len(tokens):
        stop = min(start + sizes[0], len(tokens))
        alias = {name: w.view_as(w) for name, w in weights.items()}
        inputs = dict(input_ids=tokens[None, start:stop], past_key_values=cache, use_cache=True)
        logits = functional_call(model, alias, (), inputs).logits[0]
        outputs.append(logits)
        if stop < len(tokens):
            loss = F.cross_entropy(logits, tokens[start + 1 : stop + 1], reduction="sum")
            grads = torch.autograd.grad(loss, [alias[name] for name in error], create_graph=True)
            error = {name: e + g for (name, e), g in zip(error.items(), grads, strict=True)}
            for level, size in enumerate(sizes):
                if stop % size == 0:
                    for name in names[level]:
                        weights[name] = weights[name] - lr * error[name]
                        error[name] = torch.zeros_like(error[name])
        start = stop
    return torch.cat(outputs)


def test_is_the_plain_loop_with_outputs_and_gradients() -> None:
    learning = make(cms_lr=0.05, cms_clip=None, cms_norm_limit=None)
    static = make(None)
    static.load_state_dict(learning.state_dict(), strict=False)
    tokens = ids(23)
    ours, theirs = learning(tokens[None]).logits[0], plain_loop(static, tokens, [4, 8], 0.05)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    assert not torch.allclose(ours, static(tokens[None]).logits[0])
    probe = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = dict(static.named_parameters())
    a = torch.autograd.grad((ours * probe).sum(), [p for n, p in learning.named_parameters() if n in expected])
    b = torch.autograd.grad((theirs * probe).sum(), list(expected.values()))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("case", CASES)
@given(cuts=st.lists(st.integers(0, 27), max_size=6), rows=st.integers(1, 2))
@settings(max_examples=6, deadline=None)
def test_pieces_of_any_size_equal_one_pass(case: str, cuts: list[int], rows: int) -> None:
    model, tokens = make(**CASES[case]), ids(rows, 27)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        whole = model(tokens).logits
        bounds = [0, *sorted(set(cuts) - {0, 27}), 27]
        pieces = [tokens[:, i:j] for i, j in pairwise(bounds)]
        logits = torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], dim=1)
    torch.testing.assert_close(logits, whole, rtol=1e-8, atol=1e-9)
    assert cache.get_seq_length() == 27


@pytest.mark.parametrize("case", CASES)
def test_learning_under_no_grad_is_learning_with_a_graph(case: str) -> None:
    model, tokens = make(**CASES[case]), ids(2, 19)
    with_graph = model(tokens)
    with torch.no_grad():
        without = model(tokens)
    torch.testing.assert_close(with_graph.logits, without.logits, rtol=1e-8, atol=1e-9)
    assert with_graph.logits.requires_grad
    for layer in without.past_key_values.layers:
        if layer.state.memory is not None:
            assert not any(w.requires_grad for level in layer.state.memory.levels for w in level.weights)


def test_rows_do_not_see_one_another() -> None:
    model, tokens = make(), ids(3, 21)
    with torch.no_grad():
        together = model(tokens).logits
        alone = torch.cat([model(row[None]).logits for row in tokens])
    torch.testing.assert_close(together, alone, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("block", ["hope", "hope-attention"])
def test_the_start_and_the_rates_are_meta_learned(block: str) -> None:
    """In float32, in which PyTorch has attention kernels without a second derivative."""
    model, tokens = make(block_types=[block] * 2).float(), ids(2, 21)
    model(tokens, labels=tokens).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all()
    assert all(level.log_rate.grad.abs() > 0 for block in model.model.layers for level in block.memory.levels)


def test_no_future_token_has_influence() -> None:
    model, tokens = make(), ids(1, 21)
    changed = tokens.clone()
    changed[:, 13:] = ids(1, 8, seed=7)
    with torch.no_grad():
        a, b = model(tokens).logits, model(changed).logits
    assert torch.equal(a[:, :12], b[:, :12])
    torch.testing.assert_close(a[:, 12], b[:, 12])  # the last token before the change, by another path
    assert not torch.allclose(a[:, 13:], b[:, 13:])


def test_a_repeated_text_is_learned_while_it_is_read() -> None:
    model = make(cms_lr=0.3, cms_chunk_sizes=[8, 16], block_types=["hope-attention"] * 2)
    tokens = ids(1, 16).repeat(1, 12)
    with torch.no_grad():
        logits = model(tokens).logits
    loss = F.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none")
    assert loss[-32:].mean() < 0.5 * loss[:16].mean()


def test_generate_and_beam_search_go_on_learning() -> None:
    model, tokens = make(), ids(1, 6)
    with torch.no_grad():
        out = model.generate(tokens, max_new_tokens=12, do_sample=False)
        again = torch.stack([model(out[:, :t]).logits[0, -1].argmax() for t in range(6, 18)])
        beams = model.generate(ids(2, 6), max_new_tokens=12, do_sample=False, num_beams=3)
    assert torch.equal(out[0, 6:], again)
    assert beams.shape[0] == 2


def test_filler_embeddings_and_checkpointing_are_refused() -> None:
    model, tokens = make(), ids(2, 9)
    mask = torch.ones_like(tokens)
    model(tokens, attention_mask=mask)
    mask[0, 0] = 0
    with pytest.raises(UserError, match="rows without filler"):
        model(tokens, attention_mask=mask)
    with pytest.raises(UserError, match="need the tokens"):
        model(inputs_embeds=torch.zeros(1, 3, 16, dtype=torch.float64))
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(UserError, match="gradient checkpointing"):
        model(tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cms_rule": ["sgd"]}, "cms_rule names 1 levels, but cms_chunk_sizes 2"),
        ({"cms_rule": "sgdd"}, "did you mean 'sgd'"),
        ({"online": "next"}, "did you mean 'next-token'"),
        ({"cms_variant": "nested", "cms_chunk_sizes": [4, 6]}, "6 must be a multiple of 4"),
        ({"cms_lr": -1.0}, "lr=-1.0"),
    ],
)
def test_rejects_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        make(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("online", ["local", "next-token"])
def test_saved_and_loaded_it_reads_the_same(tmp_path: Any, online: str) -> None:
    model, tokens = make(online, cms_variant="independent").float(), ids(1, 21)
    with torch.no_grad():
        for memory in (m for m in model.modules() if isinstance(m, ContinuumMemory)):
            memory.mix.add_(0.1)
            for level in memory.levels:
                level.log_rate.add_(0.2)
                if level.value is not None:
                    level.value.normal_(std=0.3)
        expected = model(tokens).logits
        model.save_pretrained(tmp_path)
        loaded = HopeForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded(tokens).logits, expected)


def test_a_fresh_model_starts_its_levels_as_the_layer_does() -> None:
    model = make("local", cms_variant="independent")
    for memory in (m for m in model.modules() if isinstance(m, ContinuumMemory)):
        assert torch.equal(memory.mix, torch.full_like(memory.mix, 0.5))
        for level in memory.levels:
            assert level.value.count_nonzero() == 0
            assert level.log_rate == 0
            assert 0.2 < level.up.weight.std() < 0.4  # initializer_range


@pytest.mark.parametrize("memory", ["linear", "mlp"])
def test_it_learns_under_autocast_where_no_outer_gradient_is_taken(memory: str) -> None:
    model = make(memory_type=memory, block_types=["hope-attention", "hope"]).float()
    x = ids(2, 12)
    with torch.no_grad():
        exact = model(x).logits
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(x).logits
            model.generate(x, max_new_tokens=6, do_sample=False)
    assert (rounded - exact).abs().max() < 0.1 * exact.abs().max()


def test_no_tokens_and_inference_mode() -> None:
    model = make()
    assert model(ids(2, 0)).logits.shape == (2, 0, VOCABULARY)
    with torch.inference_mode(), pytest.raises(UserError, match="use no_grad in place of inference_mode"):
        model(ids(1, 12))


@pytest.mark.parametrize("online", ["local", "next-token"])
def test_an_adapter_that_a_learning_level_would_leave_out_is_refused(online: str) -> None:
    peft = pytest.importorskip("peft")
    model = make(online).float()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up"]))
    with pytest.raises(UserError, match="a level that learns along the sequence writes to plain linear layers"):
        adapted(ids(1, 12))
    peft.get_peft_model(make(None).float(), peft.LoraConfig(target_modules=["up"]))(ids(1, 12))


@pytest.mark.parametrize("grad", [True, False])
def test_hidden_states_are_of_the_new_tokens_however_the_text_is_cut(grad: bool) -> None:
    model, tokens = make(), ids(2, 14)
    with torch.set_grad_enabled(grad):
        whole = model(tokens, output_hidden_states=True)
        cache, parts = DynamicCache(config=model.config), []
        for piece in tokens.split([3, 2, 1, 8], dim=1):
            parts.append(model(piece, past_key_values=cache, output_hidden_states=True).hidden_states)
    assert len(whole.hidden_states) == model.config.num_hidden_layers + 1
    torch.testing.assert_close(model.lm_head(whole.hidden_states[-1]), whole.logits)
    for number, states in enumerate(whole.hidden_states):
        torch.testing.assert_close(torch.cat([part[number] for part in parts], 1), states)
        assert states.requires_grad == grad
    assert model(tokens).hidden_states is None

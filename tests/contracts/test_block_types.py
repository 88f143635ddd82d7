"""What every block type of a Hope model must do, and every mixture: one suite."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.errors import UserError
from nestlearn.nn import DESIGNS, SelfReferentialTitans

BLOCKS = {
    "hope": ["hope", "hope"],
    "hope-mlp-anchor": ["hope", "hope"],
    "hope-attention": ["hope-attention", "hope-attention"],
    "learning-levels": ["hope", "hope-attention"],
    "attention": ["attention", "attention"],
    "mixture": ["hope", "attention"],
    "all": ["hope-attention", "hope", "attention"],
    **{name: [name, name] for name in ("sliding-window", *DESIGNS)},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "learning-levels": {
        "cms_online": "local",
        "cms_variant": "nested",
        "cms_objective": "l2",
        "cms_chunk_sizes": [2, 4],
    },
    "sliding-window": {"attention_window": 5},
    "omega": {"omega_window": 6},
    "hope-mlp-anchor": {"memory_type": "mlp", "read": "anchor", "chunk_size_other": 2, "momentum": True},
}
VOCABULARY = 48


def make(kind: str, **options: Any) -> HopeForCausalLM:
    torch.manual_seed(0)
    blocks = BLOCKS[kind]
    config = HopeConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=len(blocks),
        num_attention_heads=2,
        intermediate_size=24,
        block_types=blocks,
        chunk_size=4,
        # The large range lets a wrong token or position show.
        **{"initializer_range": 0.3, "cms_chunk_sizes": [4, 16], **OPTIONS.get(kind, {}), **options},
    )
    return HopeForCausalLM(config).eval()


def ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def tensors_of(state: Any) -> list[Tensor]:
    """All tensors in a tree of dataclasses, containers and tensors."""
    if isinstance(state, Tensor):
        return [state]
    if dataclasses.is_dataclass(state):
        state = [getattr(state, field.name) for field in dataclasses.fields(state)]
    if isinstance(state, dict):
        state = list(state.values())
    return [t for part in state for t in tensors_of(part)] if isinstance(state, list | tuple) else []


def bytes_of(cache: DynamicCache) -> int:
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in tensors_of(layer.state))


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Rows of tokens as one batch, filled up with noise on the given side or in the middle."""
    width = max(len(row) for row in rows) + 2
    batch, mask = ids(len(rows), width, seed=7), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        columns = torch.arange(width)
        if side == "left":
            columns = columns[width - len(row) :]
        elif side == "right":
            columns = columns[: len(row)]
        else:
            columns = torch.randperm(width, generator=torch.Generator().manual_seed(i))[: len(row)].sort().values
        batch[i, columns], mask[i, columns] = row, 1
    return batch, mask


each_kind = pytest.mark.parametrize("kind", BLOCKS)
each_side = pytest.mark.parametrize("side", ["left", "right", "middle"])


# Sequences


@each_kind
def test_sees_no_future(kind: str) -> None:
    model, x = make(kind), ids(1, 11)
    changed = x.clone()
    changed[0, 6] = (x[0, 6] + 1) % VOCABULARY
    before, after = model(x).logits[0], model(changed).logits[0]
    torch.testing.assert_close(before[:6], after[:6])
    assert ((before - after).abs().amax(-1) > 1e-4)[6:8].all()


@each_kind
@pytest.mark.parametrize("pieces", [[11], [1] * 11, [3, 1, 4, 3], [8, 3]])
def test_pieces_through_the_cache_equal_one_pass(kind: str, pieces: list[int]) -> None:
    model, x = make(kind), ids(2, 11)
    cache, outputs = None, []
    for piece in x.split(pieces, dim=1):
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        outputs.append(out.logits)
    torch.testing.assert_close(torch.cat(outputs, 1), model(x).logits, rtol=1e-4, atol=1e-5)
    assert cache.get_seq_length() == 11


@each_kind
@each_side
def test_padding_changes_no_logits(kind: str, side: str) -> None:
    model, rows = make(kind), [ids(9), ids(5, seed=2), ids(1, seed=3)]
    batch, mask = padded(rows, side)
    logits = model(batch, attention_mask=mask).logits
    for i, row in enumerate(rows):
        torch.testing.assert_close(logits[i, mask[i].bool()], model(row[None]).logits[0], rtol=1e-4, atol=1e-5)
    assert logits.isfinite().all()


@each_kind
@each_side
def test_padding_in_every_piece_of_a_cached_sequence(kind: str, side: str) -> None:
    model = make(kind)
    pieces = [[ids(6), ids(2, seed=2)], [ids(1, seed=3), ids(4, seed=4)], [ids(0), ids(3, seed=5)]]
    cache, masks, outputs = None, [], [[], []]
    for rows in pieces:
        batch, mask = padded(rows, side)
        masks.append(mask)
        out = model(batch, attention_mask=torch.cat(masks, 1), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        for i in range(2):
            outputs[i].append(out.logits[i, mask[i].bool()])
    for i in range(2):
        alone = model(torch.cat([rows[i] for rows in pieces])[None]).logits[0]
        torch.testing.assert_close(torch.cat(outputs[i]), alone, rtol=1e-4, atol=1e-5)


@each_kind
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_loss_and_no_gradients(kind: str, side: str) -> None:
    model, rows = make(kind).double(), [ids(9), ids(4, seed=2)]
    batch, mask = padded(rows, side)
    labels = batch.masked_fill(mask == 0, -100)
    parameters = dict(model.named_parameters())
    count = (labels[:, 1:] != -100).sum()  # as the Trainer counts: with the label that a column of filler would predict
    model(batch, attention_mask=mask, labels=labels, num_items_in_batch=count).loss.backward()
    together = {name: p.grad.clone() for name, p in parameters.items()}
    model.zero_grad()
    for row in rows:
        model(row[None], labels=row[None], num_items_in_batch=11).loss.backward()
    for name, p in parameters.items():
        torch.testing.assert_close(together[name], p.grad, rtol=1e-7, atol=1e-9, msg=name)
        assert p.grad.any(), f"{name} has no gradient"


@each_kind
def test_hidden_states_of_padded_rows_stand_in_their_columns(kind: str) -> None:
    model, row = make(kind), ids(5)
    batch, mask = padded([row, ids(7, seed=2)], "left")
    ours = model(batch, attention_mask=mask, output_hidden_states=True).hidden_states
    alone = model(row[None], output_hidden_states=True).hidden_states
    assert len(ours) == len(alone) == len(BLOCKS[kind]) + 1
    for a, b in zip(ours, alone, strict=True):
        torch.testing.assert_close(a[0, mask[0].bool()], b[0], rtol=1e-4, atol=1e-5)
    # Each is what the next one came from, and not a copy beside it.
    assert all(gradient.any() for gradient in torch.autograd.grad(ours[-1].square().sum(), ours))


# Generation


@each_kind
def test_greedy_cached_equals_uncached_on_a_padded_batch(kind: str) -> None:
    model, rows = make(kind), [ids(9), ids(4, seed=2)]
    batch, mask = padded(rows, "left")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(batch, attention_mask=mask, **options)
    assert torch.equal(cached, model.generate(batch, attention_mask=mask, use_cache=False, **options))
    for i, row in enumerate(rows):
        alone = model.generate(row[None], **options)[0, len(row) :]
        assert torch.equal(cached[i, batch.shape[1] :], alone)


@each_kind
def test_beams_and_samples_cached_equal_uncached(kind: str) -> None:
    model, x = make(kind), ids(2, 5)
    beams = {"max_new_tokens": 8, "num_beams": 3, "num_return_sequences": 2, "do_sample": False}
    cached = model.generate(x, **beams)
    assert cached.shape == (4, 13)
    assert torch.equal(cached, model.generate(x, use_cache=False, **beams))
    samples = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        samples.append(model.generate(x, do_sample=True, num_return_sequences=3, max_new_tokens=8, use_cache=use_cache))
    assert samples[0].shape == (6, 13)
    assert torch.equal(*samples)


@each_kind
def test_several_turns_on_one_cache(kind: str) -> None:
    model, text = make(kind), ids(1, 5)
    cache = DynamicCache(config=model.config)
    for turn in range(3):
        options = {"max_new_tokens": 4, "do_sample": False}
        reply = model.generate(text, past_key_values=cache, **options)
        assert torch.equal(reply, model.generate(text, use_cache=False, **options))
        assert cache.get_seq_length() == reply.shape[1] - 1
        text = torch.cat([reply, ids(1, 3, seed=turn)], dim=1)


@each_kind
def test_a_copied_cache_continues_twice_and_rows_can_be_repeated(kind: str) -> None:
    model, x, more = make(kind), ids(2, 6), ids(2, 3, seed=2)
    cache = model(x, use_cache=True).past_key_values  # with gradients, as outside generate()
    copied = copy.deepcopy(cache)
    with torch.no_grad():
        first = model(more, past_key_values=cache).logits
        assert (copied.get_seq_length(), cache.get_seq_length()) == (6, 9)
        assert torch.equal(model(more, past_key_values=copied).logits, first)
        cache = model(x, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        repeated = model(more.repeat_interleave(2, 0), past_key_values=cache).logits
        torch.testing.assert_close(repeated, first.repeat_interleave(2, 0), rtol=1e-4, atol=1e-5)
        cache.reset()
        assert cache.get_seq_length() == 0
        torch.testing.assert_close(model(x, past_key_values=cache).logits, model(x).logits)


GROWING = ("hope-attention", "learning-levels", "attention", "mixture", "all", "ada-transformer")


@pytest.mark.parametrize("kind", [kind for kind in BLOCKS if kind not in GROWING])
def test_the_cache_of_recurrent_blocks_does_not_grow(kind: str) -> None:
    model, sizes, cache = make(kind), set(), None
    with torch.no_grad():
        for _ in range(4):
            cache = model(ids(1, 13), past_key_values=cache, use_cache=True).past_key_values
            sizes.add(bytes_of(cache))
    assert len(sizes) == 1
    assert sizes.pop() > 0


@each_kind
def test_taking_tokens_back_is_refused(kind: str) -> None:
    model, x = make(kind), ids(1, 5)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(x, assistant_model=make(kind), max_new_tokens=4)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(x, prompt_lookup_num_tokens=2, max_new_tokens=4)
    with pytest.raises(UserError, match=r"cannot take tokens back.*copy\.deepcopy"):
        model(x, use_cache=True).past_key_values.crop(2)


# Training


@each_kind
def test_loss_is_the_shifted_cross_entropy(kind: str) -> None:
    model, x = make(kind), ids(2, 9)
    labels = x.clone()
    labels[0, 3] = -100
    out = model(x, labels=labels)
    expected = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(model(x, labels=labels, num_items_in_batch=30).loss, expected * 15 / 30)


@each_kind
def test_logits_to_keep(kind: str) -> None:
    model, x = make(kind), ids(2, 9)
    whole = model(x).logits
    torch.testing.assert_close(model(x, logits_to_keep=2).logits, whole[:, -2:])
    torch.testing.assert_close(model(x, logits_to_keep=torch.tensor([0, 4])).logits, whole[:, [0, 4]])


@each_kind
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradients(kind: str, reentrant: bool) -> None:
    model, x = make(kind).train(), ids(2, 9)
    model(x, labels=x).loss.backward()
    plain = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    out = model(x, labels=x, use_cache=True)
    assert out.past_key_values is None
    out.loss.backward()
    for a, p in zip(plain, model.parameters(), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-5, atol=1e-7)
    with pytest.raises(UserError, match="gradient checkpointing"):
        model(x, past_key_values=DynamicCache(config=model.config))


@each_kind
def test_learns_a_repeated_text(kind: str) -> None:
    model, x = make(kind, initializer_range=0.02).train(), ids(4, 16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    losses = []
    for _ in range(60):
        loss = model(x, labels=x).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@each_kind
def test_bfloat16_autocast_keeps_the_memories_in_float32(kind: str) -> None:
    model, x = make(kind), ids(2, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x, labels=x, use_cache=True)
    out.loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())
    exact = model(x).logits
    assert (out.logits.float() - exact).norm() < 0.1 * exact.norm()
    for name, layer in zip(BLOCKS[kind], out.past_key_values.layers, strict=True):
        if name == "hope" or name in DESIGNS:
            floats = [t for t in tensors_of(layer.state.mixer.core) if t.is_floating_point()]
            assert floats
            assert {t.dtype for t in floats} == {torch.float32}


@each_kind
def test_bfloat16_weights_run_and_generate(kind: str) -> None:
    model = make(kind).to(torch.bfloat16)
    assert model.generate(ids(1, 5), max_new_tokens=3, do_sample=False).shape == (1, 8)


# Saving and starting


@each_kind
@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded_bit_for_bit(kind: str, tied: bool, tmp_path: Path) -> None:
    model, x = make(kind, tie_word_embeddings=tied), ids(2, 9)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is HopeForCausalLM
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(model(x).logits, loaded(x).logits)


@each_kind
def test_missing_weights_are_drawn_and_the_others_kept(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    weights = model.state_dict()
    mixer = [name for name in weights if "layers.0.mixer" in name]
    for name in weights:
        torch.nn.init.constant_(weights[name], 7.0)  # nothing that would be drawn
    for missing in (mixer[0], mixer[-1]):
        kept = {name: value for name, value in weights.items() if name != missing}
        model.save_pretrained(tmp_path, state_dict=kept)
        loaded = HopeForCausalLM.from_pretrained(tmp_path).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in kept.items())
        assert loaded[missing].abs().max() < 6


def test_fresh_mixers_draw_their_own_start() -> None:
    """Every weight of the Titans layer has the scale that the layer alone would give it."""
    model = make("hope", initializer_range=0.001)
    torch.manual_seed(3)
    alone = SelfReferentialTitans(16, 2, chunk_size=4).state_dict()
    for name, value in model.model.layers[1].mixer.state_dict().items():
        expected = alone[name].square().mean().sqrt()
        torch.testing.assert_close(value.square().mean().sqrt(), expected, rtol=0.7, atol=1e-6, msg=name)


@each_kind
def test_fresh_weights_follow_the_seed_and_the_range(kind: str) -> None:
    first, second = make(kind), make(kind)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    torch.manual_seed(1)
    other = HopeForCausalLM(first.config)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.lm_head.weight.std().item() == pytest.approx(0.3, rel=0.1)
    logits = make(kind, initializer_range=0.02)(ids(2, 9)).logits
    assert logits.isfinite().all()
    assert logits.std() < 1


@each_kind
def test_eager_transformers_interface(kind: str) -> None:
    model, x = make(kind), ids(2, 5)
    embeddings = model.get_input_embeddings()(x)
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, model(x).logits)
    assert isinstance(model(x, return_dict=False), tuple)
    model.resize_token_embeddings(VOCABULARY + 3)
    assert model(x).logits.shape[-1] == VOCABULARY + 3

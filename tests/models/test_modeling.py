"""HopeForCausalLM beside what it must equal: Llama, and Hope-Attention reduced to a Transformer."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.errors import UserError
from nestlearn.nn import DESIGNS

SHAPE: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 32,
    "initializer_range": 0.3,
    "rope_theta": 500.0,
}


def hope(block_types: list[str], **options: Any) -> HopeForCausalLM:
    torch.manual_seed(0)
    return HopeForCausalLM(HopeConfig(**{**SHAPE, "block_types": block_types, "chunk_size": 4, **options})).eval()


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 40, shape, generator=torch.Generator().manual_seed(1))


def llama_from(model: HopeForCausalLM, **options: Any) -> LlamaForCausalLM:
    """Llama with the same weights as a model of "attention" blocks."""
    rope = {"rope_type": "default", "rope_theta": SHAPE["rope_theta"]}
    llama = LlamaForCausalLM(LlamaConfig(**SHAPE, rope_parameters=rope, **options)).eval()
    names = {
        "mixer": "self_attn",
        "memory.levels.0.norm": "post_attention_layernorm",
        "memory.levels.0.gate": "mlp.gate_proj",
        "memory.levels.0.up": "mlp.up_proj",
        "memory.levels.0.down": "mlp.down_proj",
    }
    weights = {}
    for name, value in model.state_dict().items():
        if name.startswith("model.layers"):
            name = name.replace(".norm.", ".input_layernorm.") if "memory" not in name else name
            for ours, theirs in names.items():
                name = name.replace(ours, theirs)
        weights[name] = value
    llama.load_state_dict(weights)
    return llama


@pytest.mark.parametrize("tied", [False, True])
def test_attention_blocks_are_llama(tied: bool) -> None:
    model = hope(["attention"] * 2, tie_word_embeddings=tied)
    llama = llama_from(model, tie_word_embeddings=tied)
    x = ids(2, 17)
    ours, theirs = model(x, labels=x), llama(x, labels=x)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(
        model(x, labels=x, num_items_in_batch=7).loss, llama(x, labels=x, num_items_in_batch=7).loss
    )
    mask = torch.ones_like(x)
    mask[1, :5] = 0
    padded, expected = model(x, attention_mask=mask).logits, llama(x, attention_mask=mask).logits
    torch.testing.assert_close(padded[1, 5:], expected[1, 5:], rtol=1e-5, atol=1e-5)
    options = {"max_new_tokens": 10, "do_sample": False, "attention_mask": mask, "pad_token_id": 0}
    assert torch.equal(model.generate(x, **options), llama.generate(x, **options))
    assert model.num_parameters() == llama.num_parameters()


def test_attention_blocks_have_the_gradients_of_llama() -> None:
    model, x = hope(["attention"] * 2), ids(2, 17)
    llama = llama_from(model)
    model(x, labels=x).loss.backward()
    llama(x, labels=x).loss.backward()
    ours = model.model.layers[0].mixer.k_proj.weight.grad
    torch.testing.assert_close(ours, llama.model.layers[0].self_attn.k_proj.weight.grad, rtol=1e-4, atol=1e-7)


def test_a_window_that_holds_everything_is_hope_attention() -> None:
    levels: dict[str, Any] = {"cms_chunk_sizes": [4, 8]}
    ours, full = hope(["sliding-window"] * 2, **levels), hope(["hope-attention"] * 2, **levels)
    ours.load_state_dict(full.state_dict())
    torch.testing.assert_close(ours(ids(2, 17)).logits, full(ids(2, 17)).logits, rtol=1e-4, atol=1e-5)
    narrow = hope(["sliding-window"] * 2, attention_window=3, **levels)
    narrow.load_state_dict(full.state_dict())
    assert not torch.allclose(narrow(ids(2, 17)).logits, full(ids(2, 17)).logits, atol=1e-3)


def test_options_reach_the_designs() -> None:
    names = ["omega", "miras", "gated-deltanet", "linear-attention", "titans"]
    options: dict[str, Any] = {"eta_max": 0.05, "norm_limit": None, "omega_window": 5, "lp_power": 1.5}
    shape: dict[str, Any] = {"num_hidden_layers": 5, "memory_hidden_size": 6, "chunk_size": 3, "cms_chunk_sizes": [4]}
    model = hope(names, **options, **shape)
    omega, miras, gated, linear, titans = (block.mixer for block in model.model.layers)
    assert (omega.rule.window, omega.rule.eta_max, omega.rule.norm_limit) == (5, 0.05, None)
    assert (miras.rule.objective, miras.rule.chunk_size) == ("l1.5", 3)
    assert gated.rule.eta_max == 0.05
    assert linear.rule.eta_max == 2.0  # constant steps of 1
    assert titans.start["memory"][0].shape == (3, 8, 6)
    usual = hope(["omega", "gated-deltanet"], cms_chunk_sizes=[4])
    assert [block.mixer.rule.norm_limit for block in usual.model.layers] == [2.0, None]


@pytest.mark.parametrize("name", DESIGNS)
def test_every_design_ends_in_the_continuum_memory(name: str) -> None:
    for levels in ([4], [4, 8]):
        (block,) = hope([name], num_hidden_layers=1, cms_chunk_sizes=levels).model.layers
        assert len(block.memory.levels) == len(levels)


def test_hope_attention_with_one_level_and_no_convolution_is_a_transformer() -> None:
    ours = hope(["hope-attention"] * 2, cms_chunk_sizes=[64])
    plain = hope(["attention"] * 2)
    weights = ours.state_dict()
    for name in [name for name in weights if "conv" in name]:
        torch.nn.init.zeros_(weights[name])[-1] = 1.0  # in place: the convolution becomes the identity
    plain.load_state_dict({name: value for name, value in weights.items() if "conv" not in name})
    x = ids(2, 17)
    torch.testing.assert_close(ours(x).logits, plain(x).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(), "either input_ids or inputs_embeds"),
        (lambda m: m(ids(1, 4), position_ids=torch.arange(4)[None]), "no position_ids"),
        (lambda m: m(ids(1, 4), output_attentions=True), "no output_attentions"),
        (lambda m: m(ids(1, 4), attention_mask=torch.ones(1, 1, 4, 4)), "two-dimensional"),
        (lambda m: m(ids(2, 4), attention_mask=torch.ones(1, 4)), "one row per sequence"),
        (lambda m: m(ids(1, 4), attention_mask=torch.ones(1, 3)), "at least the new tokens"),
        (lambda m: m(ids(1, 4), past_key_values=DynamicCache()), "does not fit this model"),
        (lambda m: m(ids(2, 4), past_key_values=m(ids(1, 4)).past_key_values), "holds 1 rows, but the input has 2"),
    ],
)
def test_rejects_in_one_line(call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        call(hope(["attention", "hope-attention"], cms_chunk_sizes=[4, 8]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("implementation", ["static", "offloaded", "quantized"])
def test_other_cache_implementations_are_refused(implementation: str) -> None:
    with pytest.raises(ValueError, match=r"[cC]ache"):
        hope(["hope", "attention"], cms_chunk_sizes=[4, 8]).generate(
            ids(1, 4), max_new_tokens=2, cache_implementation=implementation
        )


def test_prefill_in_chunks_generates_the_same() -> None:
    model, options = hope(["hope", "attention"], cms_chunk_sizes=[4, 8]), {"max_new_tokens": 8, "do_sample": False}
    x = ids(2, 11)
    assert torch.equal(model.generate(x, prefill_chunk_size=3, **options), model.generate(x, **options))


def test_a_row_of_filler_only_is_finite_and_leaves_the_state() -> None:
    model = hope(["hope", "hope-attention"], cms_chunk_sizes=[4, 8])
    first, new = ids(2, 6), ids(2, 3)
    mask = torch.ones(2, 9)
    mask[1, 6:] = 0
    with torch.no_grad():
        cache = model(first).past_key_values
        out = model(new, attention_mask=mask, past_key_values=cache)
        assert out.logits.isfinite().all()
        later = model(new, past_key_values=cache).logits[1]
        untouched = model(new, past_key_values=model(first).past_key_values).logits[1]
    torch.testing.assert_close(later, untouched, rtol=1e-4, atol=1e-5)


class Copies(torch.utils.data.Dataset):
    """Two sequences in turn."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        x = torch.randint(0, 40, (12,), generator=torch.Generator().manual_seed(index % 2))
        return {"input_ids": x, "labels": x}


def trainer(folder: Path, model: HopeForCausalLM, steps: int, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=3,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
        **options,
    )
    return Trainer(model=model, args=arguments, train_dataset=Copies(), eval_dataset=Copies())


def test_the_trainer_smooths_labels_of_the_next_token(tmp_path: Path) -> None:
    """Where it takes the loss itself, it has to know that a Hope model's labels are to be shifted."""
    model, tokens = hope(["hope", "attention"], cms_chunk_sizes=[4, 8]).train(), ids(2, 12)
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True, label_smoothing_factor=1e-6)
    loss = Trainer(model, args).compute_loss(model, {"input_ids": tokens, "labels": tokens.clone()})
    torch.testing.assert_close(loss, model(tokens, labels=tokens).loss, rtol=1e-4, atol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_trainers_count_of_labels_is_that_of_the_loss(side: str) -> None:
    """It divides by the labels that it gave, of which the first of a row behind filler is predicted by nothing."""
    model, x = hope(["hope", "attention"], cms_chunk_sizes=[4, 8]), ids(3, 9)
    mask = torch.ones_like(x)
    for row, filler in enumerate((0, 2, 5)):
        mask[row, slice(0, filler) if side == "left" else slice(9 - filler, 9)] = 0
    labels = x.masked_fill(mask == 0, -100)
    count = (labels[:, 1:] != -100).sum()
    loss = model(x, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(model(x, attention_mask=mask, labels=labels, num_items_in_batch=count).loss, loss)


def test_filler_tells_nothing_of_the_tokens_that_follow_it() -> None:
    """A loss taken outside of the model, as by the Trainer that smooths labels, may look at it."""
    model, x = hope(["hope", "hope-attention"], cms_chunk_sizes=[4, 8]), ids(2, 9)
    mask = torch.ones(2, 9)
    mask[0, :3] = 0
    out = model(x, attention_mask=mask, output_hidden_states=True)
    other = x.clone()
    other[0, 5:] = x[1, 5:]
    assert not torch.equal(x, other)
    again = model(other, attention_mask=mask)
    assert torch.equal(out.logits[0, :3], again.logits[0, :3])
    assert out.hidden_states[-1][0, :3].abs().max() == 0


def test_trainer_fits_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    kinds = {"block_types": ["hope", "hope-attention"], "cms_chunk_sizes": [4, 8], "initializer_range": 0.02}
    whole = trainer(tmp_path / "whole", hope(**kinds).train(), 5)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert len(losses) == 5
    assert losses[-1] < losses[0]
    assert whole.evaluate()["eval_loss"] < losses[0]
    trainer(tmp_path / "halves", hope(**kinds).train(), 3).train()
    resumed = trainer(tmp_path / "halves", hope(**kinds).train(), 5)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 5
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


COMPILED = """
import torch
from nestlearn import HopeConfig, HopeForCausalLM
torch.manual_seed(0)
x = torch.randint(0, 32, (2, 8))
for kind in ("attention", "hope-attention", "hope"):
    torch.compiler.reset()
    sizes = dict(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    config = HopeConfig(**sizes, block_types=[kind], cms_chunk_sizes=[4, 8], chunk_size=4)
    model = HopeForCausalLM(config)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=kind != "hope")
    torch.testing.assert_close(compiled(x, use_cache=False).logits, model(x).logits, rtol=1e-4, atol=1e-5)
"""


def test_compiled_forward_equals_eager() -> None:
    """In a process of its own: the compiler cannot trace the checks of shapes that tests switch on."""
    run = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("online", [None, "local"])
def test_peft_tunes_every_norm_and_the_projections_by_name(online: str | None) -> None:
    peft, x = pytest.importorskip("peft"), ids(2, 9)
    for adapters, parts in (
        (peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["norm"]), ["norm", "mixer.norm", "levels.1.norm"]),
        (peft.LoraConfig(r=2, target_modules=["project.k", "project.v"], init_lora_weights=False), ["project.v"]),
    ):
        model = hope(["hope", "hope"], cms_chunk_sizes=[4, 8], cms_online=online)
        before = model(x, use_cache=False).logits
        adapted = peft.get_peft_model(model, adapters)
        trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
        assert all(any(f"{part}." in name for name in trained) for part in parts)
        with torch.no_grad():
            for p in trained.values():
                p.mul_(1.5)
        out = adapted(input_ids=x, use_cache=False).logits
        out.square().sum().backward()
        assert all(p.grad.abs().sum() > 0 for p in trained.values())
        assert (out - before).abs().max() > 1e-3
        torch.testing.assert_close(adapted.merge_and_unload()(x, use_cache=False).logits, out, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="ParameterList"):
        peft.get_peft_model(hope(["hope", "hope"], cms_chunk_sizes=[4, 8]), peft.LoraConfig(target_modules=["k"]))


EXPORTED = """
import torch
from nestlearn import HopeConfig, HopeForCausalLM
sizes = dict(vocab_size=40, hidden_size=24, num_attention_heads=3, intermediate_size=32, initializer_range=0.3)
x = torch.randint(0, 40, (3, 7), generator=torch.Generator().manual_seed(1))
models = []
for limit in (0.05, None):
    torch.manual_seed(0)
    kinds = dict(num_hidden_layers=2, block_types=["hope", "ttt-mlp"], cms_chunk_sizes=[4, 8], chunk_size=4)
    models.append(HopeForCausalLM(HopeConfig(**sizes, **kinds, norm_limit=limit)).eval())
rows = {"input_ids": {0: torch.export.Dim("rows", min=2, max=64)}, "use_cache": None}
with torch.no_grad():
    made = torch.export.export(models[0], (x[:2],), {"use_cache": False}, dynamic_shapes=rows).module()
    found, expected, unlimited = (model(x, use_cache=False).logits for model in (made, *models))
torch.testing.assert_close(found, expected)
assert (expected - unlimited).abs().max() > 1e-3
"""


def test_what_torch_export_makes_is_the_model_on_any_tokens() -> None:
    """With any number of rows, and where memories are past their norm limit. In a process of its own, as above."""
    run = subprocess.run([sys.executable, "-c", EXPORTED], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr

"""A converted model is the pretrained one until it has learned, and then the model with the learned weights in it."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from nestlearn.convert import ContinualModel, Level, LevelsConfig, base_hash, convert
from nestlearn.errors import UserError
from tests.convert.models import CONFIGS, LAYERS, VOCAB, make, tokens

KINDS = ["depthwise", "split"]
families = pytest.mark.parametrize("family", list(CONFIGS))
kinds = pytest.mark.parametrize("kind", KINDS)


def start_of(model: ContinualModel) -> dict[str, Tensor]:
    return {name: weight for level in model.levels for name, weight in level.start.items()}


def moved(model: ContinualModel, rows: int | None = None, seed: int = 0, std: float = 0.1) -> dict[str, Tensor]:
    """Learned weights: the pretrained ones and noise, one set or one for every row."""
    noise = torch.Generator().manual_seed(seed)
    shapes = {name: weight.shape if rows is None else (rows, *weight.shape) for name, weight in start_of(model).items()}
    return {
        name: (weight + std * torch.randn(shapes[name], generator=noise)).requires_grad_()
        for name, weight in start_of(model).items()
    }


def assembled(kind: str, family: str, learned: dict[str, Tensor]) -> PreTrainedModel:
    """The oracle: an unconverted model whose parameters are the learned ones, put together by hand."""
    model = make(family)
    whole: dict[str, list[Tensor]] = {}
    for name in sorted(learned):
        whole.setdefault(name.rpartition(".level")[0] if kind == "split" else name, []).append(learned[name].detach())
    for name, pieces in whole.items():
        parameter = model.get_parameter(name)
        is_output = "down_proj" in name or "c_proj" in name
        axis = int(is_output != (family == "gpt2")) if parameter.dim() == 2 else 0
        parameter.data = pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)
    return model


@families
@kinds
def test_before_learning_the_logits_are_the_originals(family: str, kind: str) -> None:
    model, x = make(family), tokens()
    with torch.no_grad():
        before = model(x).logits
        converted = convert(model, LevelsConfig(kind=kind))
        assert torch.equal(converted(x).logits, before)
        with converted.using(start_of(converted)):  # no learning yet, but by the parts
            parts = converted(x).logits
    if kind == "depthwise":
        assert torch.equal(parts, before)
    assert (parts - before).abs().max() <= 1e-5


@families
@kinds
def test_learned_weights_give_the_model_that_has_them(family: str, kind: str) -> None:
    """Outputs, and gradients of every learned weight, as of an ordinary model with these parameters."""
    x = tokens()
    converted = convert(make(family), LevelsConfig(kind=kind, layers="all"))
    learned = moved(converted)
    with converted.using(learned):
        out = converted(x, labels=x)
    out.loss.backward()
    oracle = assembled(kind, family, learned)
    expected = oracle(x, labels=x)
    expected.loss.backward()
    torch.testing.assert_close(out.logits, expected.logits, atol=2e-5, rtol=1e-5)
    assert (out.logits - converted(x).logits).abs().max() > 1e-2
    for name, piece in ((n, p) for level in converted.levels for n, p in level.start.pieces.items()):
        whole = name.rpartition(".level")[0] if kind == "split" else name
        gradient = oracle.get_parameter(whole).grad
        cut = gradient if piece.axis is None else gradient.narrow(piece.axis, piece.start, piece.length)
        torch.testing.assert_close(learned[name].grad, cut, atol=2e-5, rtol=1e-4)


@families
@kinds
def test_weights_of_every_row_are_a_loop_of_models(family: str, kind: str) -> None:
    x = tokens()
    converted = convert(make(family), LevelsConfig(kind=kind))
    learned = moved(converted, rows=len(x))
    with converted.using(learned):
        together = converted(x).logits
    together.square().sum().backward()
    for row in range(len(x)):
        own = {name: weight[row].detach().requires_grad_() for name, weight in learned.items()}
        with converted.using(own):
            alone = converted(x[row : row + 1]).logits
        alone.square().sum().backward()
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=1e-5)
        for name, weight in own.items():
            torch.testing.assert_close(learned[name].grad[row], weight.grad, atol=1e-3, rtol=1e-4)


@settings(max_examples=25, deadline=None)
@given(row=st.integers(0, 3), length=st.integers(1, 20), kind=st.sampled_from(KINDS), gpt2=st.booleans())
def test_a_row_never_sees_another(row: int, length: int, kind: str, gpt2: bool) -> None:
    """With another text and other weights in one row, outputs and gradients of the others stay the same bits."""
    family = "gpt2" if gpt2 else "llama with biases"
    converted = convert(make(family), LevelsConfig(kind=kind))

    def run(x: Tensor, learned: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        with converted.using(learned):
            logits = converted(x).logits
        logits.square().sum().backward()
        return logits.detach(), {name: weight.grad for name, weight in learned.items()}

    x, learned = tokens(4, length), moved(converted, rows=4)
    changed = {name: weight.detach().clone() for name, weight in learned.items()}
    for name, weight in moved(converted, seed=1).items():
        changed[name][row] = weight.detach()
    other = x.clone()
    other[row] = tokens(1, length, seed=9)
    logits, grads = run(x, learned)
    logits2, grads2 = run(other, {name: weight.requires_grad_() for name, weight in changed.items()})
    rest = [index for index in range(4) if index != row]
    assert torch.equal(logits[rest], logits2[rest])
    assert not torch.equal(logits[row], logits2[row])
    for name in grads:
        assert torch.equal(grads[name][rest], grads2[name][rest])


def test_shared_and_own_weights_may_be_mixed_and_absent_ones_are_pretrained() -> None:
    x = tokens()
    converted = convert(make("llama with biases"))
    learned = {name: weight.detach() for name, weight in moved(converted).items()}
    fast, slow = converted.levels[0].start, converted.levels[2].start
    own = {name: torch.stack([learned[name], start_of(converted)[name], learned[name]]) for name in fast}
    with torch.no_grad():
        with converted.using({**own, **{name: learned[name] for name in slow}}):
            mixed = converted(x).logits
        for row, names in enumerate([{*fast, *slow}, {*slow}, {*fast, *slow}]):
            with converted.using({name: learned[name] for name in names}):
                torch.testing.assert_close(
                    converted(x[row : row + 1]).logits, mixed[row : row + 1], atol=1e-5, rtol=1e-5
                )


@kinds
def test_every_number_of_a_chosen_mlp_belongs_to_one_level(kind: str) -> None:
    model = make("llama with biases")
    inside = sum(p.numel() for index in (1, 3) for p in model.model.layers[index].mlp.parameters())
    levels = (Level(4, 0.1), Level(8, 0.1))
    converted = convert(model, LevelsConfig(kind=kind, levels=levels, layers=[1, 3]))
    assert sum(level.parameters for level in converted.levels) == inside
    assert [level.number for level in converted.levels] == [0, 1]
    assert [level.config for level in converted.levels] == list(levels)
    assert [level.layers for level in converted.levels] == ([(3,), (1,)] if kind == "depthwise" else [(1, 3)] * 2)
    names = [name for level in converted.levels for name in level.start]
    assert len(set(names)) == len(names)
    if kind == "split":
        holders = [lv.number for lv in converted.levels for name in lv.start if "down_proj.bias" in name]
        assert holders == [1, 1]


def test_consecutive_layers_go_together_and_late_ones_are_fast() -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=8, num_attention_heads=2)
    converted = convert(LlamaForCausalLM(config), LevelsConfig(layers="all"))
    assert [level.layers for level in converted.levels] == [(6, 7), (3, 4, 5), (0, 1, 2)]


@families
def test_unload_gives_the_very_modules_back(family: str) -> None:
    model = make(family)
    frozen = next(iter(model.parameters()))
    frozen.requires_grad_(False)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    modules, state = dict(model.named_modules()), copy.deepcopy(model.state_dict())
    converted = convert(model)
    assert not any(parameter.requires_grad for parameter in converted.parameters())
    assert list(converted.base.state_dict()) == list(state)
    converted.weights = moved(converted)
    converted.train()
    back = converted.unload()
    assert back is model
    found = dict(model.named_modules())
    assert list(found) == list(modules)
    assert all(found[name] is module and module.training for name, module in modules.items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(torch.equal(weight, state[name]) for name, weight in model.state_dict().items())


def test_no_gradient_is_computed_below_the_earliest_learning_layer() -> None:
    converted = convert(make(), LevelsConfig(layers=[2, 3], levels=[Level(4, 0.1)]))
    for enable in (False, True):
        if enable:
            converted.gradient_checkpointing_enable()
            converted.train()
        with converted.using(moved(converted)):
            states = converted(tokens(), output_hidden_states=True, use_cache=False).hidden_states
        assert [state.requires_grad for state in states] == [False, False, False, True, True]


@kinds
def test_checkpointing_recomputes_with_the_weights_of_the_forward_pass(kind: str) -> None:
    """Even when the backward pass comes after the context, twice, and other weights are in use by then."""
    x = tokens()
    converted = convert(make(), LevelsConfig(kind=kind)).train()

    def gradients() -> dict[str, Tensor]:
        learned = moved(converted)
        with converted.using(learned):
            loss = converted(x, labels=x, use_cache=False).loss
        with converted.using({name: weight.detach() for name, weight in moved(converted, seed=5).items()}):
            loss.backward(retain_graph=True)
        loss.backward()
        return {name: weight.grad for name, weight in learned.items()}

    plain = gradients()
    converted.gradient_checkpointing_enable()
    assert all(torch.equal(gradient, plain[name]) for name, gradient in gradients().items())
    twin = copy.deepcopy(converted)
    assert all(torch.equal(gradient, plain[name]) for name, gradient in gradients().items())
    assert twin.scope is not converted.scope
    with pytest.raises(UserError, match="use_reentrant"):
        converted.gradient_checkpointing_enable({"use_reentrant": True})


def test_a_base_that_checkpoints_already() -> None:
    x, model = tokens(), make().train()
    model.activation_checkpointing_enable()
    gradients = []
    for converted in (convert(model), convert(make().train())):
        learned = moved(converted)
        with converted.using(learned):
            loss = converted(x, labels=x, use_cache=False).loss
        loss.backward()
        gradients.append({name: weight.grad for name, weight in learned.items()})
        converted.unload()
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
    assert model.model.layers[0]._gradient_checkpointing_func.keywords == {"use_reentrant": False}


@families
def test_generation_with_a_cache_is_that_without(family: str) -> None:
    """And of the model that has the weights; with a row's own weights and left padding as of the row alone."""
    x = tokens(3, 6)
    converted = convert(make(family), LevelsConfig(kind="split"))
    learned = {name: weight.detach() for name, weight in moved(converted).items()}
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with converted.using(learned):
        cached = converted.generate(x, attention_mask=torch.ones_like(x), **options)
        plain = converted.generate(x, attention_mask=torch.ones_like(x), use_cache=False, **options)
    oracle = assembled("split", family, learned).generate(x, attention_mask=torch.ones_like(x), **options)
    assert torch.equal(cached, plain)
    assert torch.equal(cached, oracle)
    own = {name: weight.detach() for name, weight in moved(converted, rows=3).items()}
    mask = torch.ones_like(x)
    mask[0, :2], mask[2, :3] = 0, 0
    padded = x * mask
    with converted.using(own):
        together = converted.generate(padded, attention_mask=mask, **options)
    for row in range(3):
        text = x[row, 6 - int(mask[row].sum()) :][None]
        with converted.using({name: weight[row] for name, weight in own.items()}):
            alone = converted.generate(text, attention_mask=torch.ones_like(text), **options)
        assert torch.equal(together[row, 6:], alone[0, text.shape[1] :])


def test_a_bf16_base_with_weights_in_fp32() -> None:
    x = tokens()
    model = make().to(torch.bfloat16)
    before = model(x).logits
    converted = convert(model)
    start = start_of(converted)
    assert {weight.dtype for weight in start.values()} == {torch.float32}
    assert converted.dtype == torch.bfloat16
    learned = moved(converted, std=1e-5)  # below what bf16 can hold beside the weight
    with converted.using(start):
        assert torch.equal(converted(x).logits, before)
    with converted.using(learned):
        converted(x, labels=x).loss.backward()
    assert {weight.grad.dtype for weight in learned.values()} == {torch.float32}
    assert all(weight.grad.abs().sum() > 0 for weight in learned.values())
    # What is cast once for generation is cast again when the weight is written to, or is another one.
    plain = {name: weight.detach().clone() for name, weight in learned.items()}
    with torch.inference_mode(), converted.using(plain):
        first = converted(x).logits
        assert torch.equal(converted(x).logits, first)
        for weight in plain.values():
            weight.add_(0.5)
        second = converted(x).logits
    assert not torch.equal(first, second)
    with torch.no_grad(), converted.using({name: weight.clone() for name, weight in plain.items()}):
        assert torch.equal(converted(x).logits, second)
    embedded = converted.get_input_embeddings()(x).detach().requires_grad_()
    with converted.using(plain):  # the cast weight is of use in a backward pass, though it was made in inference mode
        converted(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad.abs().sum() > 0


def test_of_an_fp32_base_the_start_is_no_copy() -> None:
    converted = convert(make())
    weight = converted.levels[0].start["model.layers.3.mlp.up_proj.weight"]
    assert weight.data_ptr() == converted.base.model.layers[3].mlp.up_proj.weight.data_ptr()
    assert not weight.requires_grad


def test_weights_are_read_outside_the_context_too_and_contexts_nest() -> None:
    x = tokens()
    converted = convert(make())
    a, b = ({n: w.detach() for n, w in moved(converted, seed=seed).items()} for seed in (1, 2))
    with torch.no_grad():
        pretrained = converted(x).logits
        with converted.using(a):
            of_a = converted(x).logits
            with converted.using(b):
                of_b = converted(x).logits
                with converted.using({}):
                    assert torch.equal(converted(x).logits, pretrained)
                with pytest.raises(IndexError), converted.using({}):
                    converted(x + VOCAB)
                assert torch.equal(converted(x).logits, of_b)
            assert torch.equal(converted(x).logits, of_a)
        assert torch.equal(converted(x).logits, pretrained)
        converted.weights = a
        assert torch.equal(converted(x).logits, of_a)
        a.clear()  # the model keeps its own mapping
        assert torch.equal(converted(x).logits, of_a)
        converted.weights = {}
        assert torch.equal(converted(x).logits, pretrained)


def test_a_thread_does_not_see_the_weights_of_another() -> None:
    x = tokens()
    converted = convert(make())
    seeds = range(3)
    learned = [{n: w.detach() for n, w in moved(converted, seed=seed).items()} for seed in seeds]
    with torch.no_grad():
        expected = []
        for weights in learned:
            with converted.using(weights):
                expected.append(converted(x).logits)
    barrier, wrong = threading.Barrier(len(seeds)), []

    def work(seed: int) -> None:
        for _ in range(10):
            with torch.no_grad(), converted.using(learned[seed]):
                barrier.wait()
                if not torch.equal(converted(x).logits, expected[seed]):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in seeds]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_wrong_weights_are_refused() -> None:
    converted = convert(make())
    name = "model.layers.3.mlp.up_proj.weight"
    right = start_of(converted)[name]
    for weights, says in [
        ({"model.layers.3.mlp.up.weight": right}, f"did you mean '{name}'"),
        ({name: right[:, :3]}, r"give floating point of shape \(28, 16\)"),
        ({name: right.long()}, "floating point"),
        (
            {name: right[None].repeat(2, 1, 1), name.replace("up", "down"): right.T[None].repeat(3, 1, 1)},
            r"\[2, 3\] rows",
        ),
    ]:
        with pytest.raises(UserError, match=says):
            converted.using(weights)
        with pytest.raises(UserError, match=says):
            converted.weights = weights
    with (
        converted.using({name: right[None].repeat(2, 1, 1)}),
        pytest.raises(UserError, match="2 rows and a batch of 3"),
    ):
        converted(tokens(3))


class Strange(nn.Module):
    """Familiar names, another function."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        for name, child in mlp.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x))


def test_wrong_models_are_refused() -> None:
    with pytest.raises(UserError, match="cannot convert a Linear"):
        convert(nn.Linear(2, 2))
    with pytest.raises(UserError, match="give a LevelsConfig"):
        convert(make(), {"kind": "split"})
    converted = convert(make())
    for again in (converted, converted.base):
        with pytest.raises(UserError, match="converted already"):
            convert(again)
    model = make()
    model.model.layers[3].mlp = Strange(model.model.layers[3].mlp)
    with pytest.raises(UserError, match=r"model\.layers\.3\.mlp: it is no MLP as in"):
        convert(model)
    model.model.layers[3].mlp = nn.Identity()
    with pytest.raises(UserError, match=f"3 of its {LAYERS} layers"):
        convert(model)
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1}
    mixture = MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    with pytest.raises(UserError, match="0 of its 1 layers"):
        convert(mixture)
    with torch.device("meta"):
        nowhere = LlamaModel(LlamaConfig(**sizes, num_attention_heads=2))
    with pytest.raises(UserError, match="on no device"):
        convert(nowhere)
    with pytest.raises(UserError, match="28 neurons for 29 levels"):
        convert(make(), LevelsConfig(kind="split", levels=[Level(4, 0.1)] * 29))


@pytest.mark.parametrize("kind", ["depthwise", "split"])
def test_a_base_whose_weights_have_gone_is_refused(kind: str) -> None:
    """accelerate's offload leaves them on the meta device, by which PyTorch multiplies without a word."""
    model = convert(make(), LevelsConfig(kind=kind))
    learned = moved(model)
    model.base.to("meta")
    with model.using(learned), pytest.raises(UserError, match="on no device"):
        model.base.model.layers[-1].mlp(torch.ones(1, 3, 16))


def test_a_converted_model_can_be_pickled() -> None:
    model = convert(make())
    model.weights = moved(model)
    again = pickle.loads(pickle.dumps(model))  # noqa: S301
    x = tokens(1, 5)
    assert torch.equal(again(x).logits, model(x).logits)


def test_the_hash_names_the_base() -> None:
    model = make()
    before = base_hash(model)
    converted = convert(model)
    converted.weights = moved(converted)
    assert base_hash(converted) == base_hash(converted.base) == before == base_hash(make())
    assert base_hash(make(seed=1)) != before
    assert base_hash(make("mistral")) != before  # the same shapes and names
    assert base_hash(make().to(torch.bfloat16)) != before
    with torch.no_grad():
        model.model.norm.weight[3] += 1e-6
    assert base_hash(model) != before


def test_convert_is_the_function_however_it_is_imported() -> None:
    import nestlearn

    assert isinstance(nestlearn.convert(make()), ContinualModel)
    assert nestlearn.LevelsConfig is LevelsConfig


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_in_an_mlp_that_learns_is_refused_and_one_beside_it_counts(family: str) -> None:
    peft = pytest.importorskip("peft")
    targets = {"llama": ("q_proj", "down_proj"), "gpt2": ("attn.c_attn", "mlp.c_proj")}[family]
    for target, refused in zip(targets, (False, True), strict=True):
        converted, x = convert(make(family), LevelsConfig(layers="all")), tokens(2)
        config = peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
        adapted = peft.get_peft_model(converted, config)
        if refused:
            with pytest.raises(UserError, match="put adapters on layers that do not learn"):
                adapted(input_ids=x)
            continue
        adapted(input_ids=x).logits.sum().backward()
        assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
        before = adapted(input_ids=x).logits
        torch.testing.assert_close(adapted.merge_and_unload()(input_ids=x).logits, before, rtol=1e-4, atol=1e-4)

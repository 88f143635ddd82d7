"""describe(): every model, known or not, whole and in the right order."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import nestlearn
from nestlearn.convert import LevelsConfig, convert
from nestlearn.convert.config import PERIODS
from nestlearn.errors import UserError
from nestlearn.levels import FROZEN, NON_PARAMETRIC, Box, Description, UpdateFrequency, describe
from nestlearn.levels.describe.grouping import group
from nestlearn.nn import DESIGNS, ContinuumLevel, ContinuumMemory, MemoryLayer, SelfReferentialTitans
from tests.levels.models import Nothing, Oddity, hope, llama, residual_net

STEP, TOKEN = UpdateFrequency.every(1), UpdateFrequency.every(1, "token")


def boxes(found: Description) -> dict[str, Box]:
    return {box.name: box for box in found.system.boxes}


def levels(found: Description) -> list[tuple[str, ...]]:
    return [level.names for level in found.system.levels]


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3)


def check_whole(model: nn.Module, found: Description) -> None:
    """Parameters add up, nothing is dropped, and the text fits a terminal."""
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert max(map(len, str(found).splitlines())) <= 140
    text = found.to_json()
    inside = {
        id(linear) for level in model.modules() if isinstance(level, ContinuumLevel) for linear in level.modules()
    }
    for module in model.modules():
        name = type(module).__name__
        # The linear layers of a level are its one MLP; containers of parameters are rows themselves.
        if id(module) not in inside and not isinstance(module, (nn.ParameterList, nn.ParameterDict)):
            assert name in text, name
    result = json.loads(text)
    assert sum(box["parameters"] for level in result["levels"] for box in level["boxes"]) == found.parameters
    count = sum(len(level.boxes) for level in found.system.levels)
    assert count == len(found.system.boxes)


# Plain PyTorch


def test_sequential() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    found = describe(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert levels(found) == [("0,2",)]
    box = found.system["0,2"]
    assert (box.parameters, box.count, box.frequency) == (58, 2, STEP)
    assert (box.structure, box.objective, box.context) == ("matrix (Linear)", "<W x, dL/dy>", "x -> -dL/dy")
    assert box.rule == "SGD, lr 0.1"
    assert found.notes == ("functions: ReLU", "joined by: Sequential")
    check_whole(model, found)


def test_a_residual_net_it_has_never_seen() -> None:
    model = residual_net()
    found = describe(model, adamw(model))
    check_whole(model, found)
    assert len(found.system.levels) == 2
    first, second = map(set, levels(found))
    assert {"AdamW m", "AdamW v", "bn1: running statistics", "layer1-4.0-1.bn1-2: running statistics"} <= first
    assert {"layer1-4.0-1.conv1-2", "layer2-4.0.downsample.0", "fc"} <= second
    statistics = found.system["layer1-4.0-1.bn1-2: running statistics"]
    assert (statistics.count, statistics.parameters, statistics.frequency) == (16, 0, STEP)
    assert statistics.state == 16 * 2 * (8 + 16 + 32 + 64) // 4
    assert statistics.rule == "gradient descent, step 0.1"
    frozen = describe(model.eval()).system["bn1: running statistics"]
    assert (frozen.frequency, frozen.rule) == (FROZEN, "none in eval mode")


def test_bare_parameters_buffers_shared_modules_and_unknown_classes() -> None:
    model = Oddity()
    found = describe(model, adamw(model))
    check_whole(model, found)
    rows = boxes(found)
    bare = rows["{temperature,table}"]
    assert (bare.structure, bare.parameters) == ("tensor (Oddity)", 16)
    assert rows["Oddity: average"].structure == "buffer (Oddity)"
    assert (rows["Oddity: average"].state, rows["Oddity: average"].frequency) == (7, FROZEN)
    assert rows["first"].parameters == 30
    assert rows["again"].structure == "the same Linear as first"
    assert rows["tied"].structure == "matrix (Linear), tied to first.weight"
    assert rows["again"].parameters == rows["tied"].parameters == 0
    assert "functions: Nothing" in found.notes


def test_models_that_are_one_layer_or_hold_nothing() -> None:
    linear = nn.Linear(3, 2)
    assert levels(describe(linear, adamw(linear))) == [("AdamW m", "AdamW v"), ("Linear",)]
    nothing = describe(Nothing())
    assert levels(nothing) == [("Nothing",)]
    assert nothing.parameters == 0
    assert "Nothing" in str(nothing)


def test_names_that_others_have_and_buffers_beside_statistics() -> None:
    model = nn.ModuleDict({"SGD m": nn.Linear(2, 2), "norm": nn.BatchNorm1d(2)})
    model["norm"].register_buffer("other", torch.zeros(3))
    found = describe(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    assert {"SGD m", "SGD m (2)", "norm: other", "norm: running statistics"} <= boxes(found).keys()
    check_whole(model, found)


def test_recurrent_layers_have_a_state_that_every_token_writes() -> None:
    model = nn.ModuleDict(
        {"lstm": nn.LSTM(4, 6, 2, bidirectional=True, proj_size=3), "gru": nn.GRU(4, 5), "cell": nn.LSTMCell(4, 2)}
    )
    found = describe(model)
    check_whole(model, found)
    states = {name: box for name, box in boxes(found).items() if name.endswith(": state")}
    assert {name: box.state for name, box in states.items()} == {
        "lstm: state": 4 * (6 + 3),
        "gru: state": 5,
        "cell: state": 4,
    }
    x = torch.zeros(1, 1, 4)
    assert sum(t.numel() for t in model["lstm"](x)[1]) == 36
    assert all(box.frequency == TOKEN for box in states.values())
    assert boxes(found)["lstm"].structure == "matrices of the gates (LSTM)"


def test_attention_of_pytorch() -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 3, enable_nested_tensor=False)
    found = describe(model, adamw(model))
    check_whole(model, found)
    attention = found.system["layers.0-2.self_attn: attention"]
    assert attention.frequency == NON_PARAMETRIC
    assert attention.rule.startswith("Nadaraya-Watson")
    assert attention.count == 3
    assert found.system.level_of(attention.name) == 0
    sources = {t.source for t in found.transfers(attention.name)[0]}
    assert sources == {"layers.0-2.self_attn", "layers.0-2.self_attn.out_proj"}


def test_lazy_modules_count_when_they_have_a_shape() -> None:
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 2))
    assert describe(model).parameters == 8


# Hugging Face


def test_llama_of_30_layers_is_readable() -> None:
    model = llama()
    found = describe(model, adamw(model))
    check_whole(model, found)
    assert found.parameters == 134_515_008
    assert len(found.system.boxes) == 11
    assert levels(found)[0] == ("model.layers.0-29.self_attn: attention",)
    assert levels(found)[1] == ("AdamW m", "AdamW v")
    mlp = found.system["model.layers.0-29.mlp.{gate,up,down}_proj"]
    assert (mlp.count, mlp.parameters) == (90, 30 * 3 * 576 * 1536)
    assert found.system["lm_head"].structure == "matrix (Linear), tied to model.embed_tokens.weight"
    assert levels(found)[-1] == ("model.rotary_emb: inv_freq", "model.rotary_emb: original_inv_freq")


@pytest.mark.parametrize(
    ("kind", "options", "name", "frequency", "words"),
    [
        ("gpt2", dict(n_layer=2), "h.0-1.attn: attention", NON_PARAMETRIC, "GPT2Attention"),
        ("bert", dict(num_hidden_layers=2), "encoder.layer.0-1.attention.self: attention", NON_PARAMETRIC, "Self"),
        ("mistral", dict(num_hidden_layers=2), "layers.0-1.self_attn: attention", NON_PARAMETRIC, "MistralAtt"),
        ("mamba2", dict(num_hidden_layers=2), "layers.0-1.mixer: state", TOKEN, "Mamba2Mixer"),
        ("rwkv", dict(num_hidden_layers=2), "blocks.0-1.attention: state", TOKEN, "RwkvSelfAttention"),
        ("falcon_h1", dict(num_hidden_layers=2), "layers.0-1.mamba: state", TOKEN, "FalconH1Mixer"),
    ],
)
def test_mixers_of_hugging_face(kind: str, options: dict, name: str, frequency: UpdateFrequency, words: str) -> None:
    from transformers import CONFIG_MAPPING, AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(CONFIG_MAPPING[kind](**options))
    found = describe(model)
    check_whole(model, found)
    assert found.system[name].frequency == frequency
    assert words in found.system[name].structure
    assert sum(": attention" in box.name or ": state" in box.name for box in found.system.boxes) <= 2


def test_a_sliding_window_is_told() -> None:
    from transformers import AutoModel, MistralConfig

    with torch.device("meta"):
        model = AutoModel.from_config(MistralConfig(num_hidden_layers=1, sliding_window=512))
    assert describe(model).system["layers.0.self_attn: attention"].context == "last 512 tokens: k -> v"


# Ours


def test_hope() -> None:
    model = hope(cms_chunk_sizes=[8, 32, 128])
    found = describe(model, adamw(model))
    check_whole(model, found)
    core = ("model.layers.0-1.mixer: memories k, v, eta, alpha", "model.layers.0-1.mixer: main memory")
    assert levels(found)[0] == core
    assert found.system[core[0]].frequency == UpdateFrequency.every(8, "token")
    assert "written" in found.system[core[0]].rule
    start = found.system["model.layers.0-1.mixer: start of the main memory"]
    assert found.system[core[1]].state == start.parameters == 2 * 2 * 8 * 8
    kinds = {(t.kind, t.source) for t in found.transfers(core[1])[0]}
    assert kinds == {("initialisation", start.name), ("context generation", core[0])}
    assert found.system["model.layers.0-1.memory.levels.1"].structure == "SwiGLU MLP 16 -> 16 -> 16, chunk 32"
    assert found.system["model.layers.0-1.memory.levels.1"].frequency == STEP  # static: the chunk is only nominal


@pytest.mark.parametrize("variant", ["sequential", "nested", "independent"])
@pytest.mark.parametrize("online", ["local", "next-token"])
def test_a_continuum_memory_that_learns_along_the_sequence(online: str, variant: str) -> None:
    memory = ContinuumMemory(8, [4, 16], variant, online=online)  # type: ignore[arg-type]
    found = describe(memory, adamw(memory))
    check_whole(memory, found)
    fast, slow = "levels.0: weights along the sequence", "levels.1: weights along the sequence"
    assert levels(found)[:2] == [(fast,), (slow,)]
    assert found.system[fast].frequency == UpdateFrequency.every(4, "token")
    assert found.system[slow].state == sum(w.numel() for w in memory.levels[1].weights)
    sources = {t.source for t in found.transfers(fast)[0] if t.kind == "initialisation"}
    assert sources == {"levels.0-1: start"} | ({slow} if variant == "nested" else set())
    assert found.system["levels.0-1: start"].objective == "outer loss, through the updates"


def test_titans_with_momentum_and_two_clocks() -> None:
    layer = SelfReferentialTitans(16, 2, chunk_size=4, chunk_size_other=12, momentum=True)
    found = describe(layer)
    check_whole(layer, found)
    name = "SelfReferentialTitans"
    assert levels(found)[:4] == [
        (f"{name}: momentum of main memory",),
        (f"{name}: main memory",),
        (f"{name}: momentum of memories k, v, eta, alpha",),
        (f"{name}: memories k, v, eta, alpha",),
    ]


@pytest.mark.parametrize(
    ("design", "frequency"),
    [
        ("linear-attention", TOKEN),  # the chunk is a matter of speed alone
        ("gated-deltanet", TOKEN),
        ("ojanet", TOKEN),
        ("ttt-linear", UpdateFrequency.every(8, "token")),  # gradients at the chunk's start
        ("titans", UpdateFrequency.every(8, "token")),
        ("omega", UpdateFrequency.every(8, "token")),
    ],
)
def test_the_zoo(design: str, frequency: UpdateFrequency) -> None:
    layer = MemoryLayer(16, 2, 8, design=design)
    found = describe(layer)
    check_whole(layer, found)
    assert found.system["MemoryLayer: main memory"].frequency == frequency


def test_ada_transformer_is_attention_before_a_linear_memory() -> None:
    found = describe(MemoryLayer(16, 2, design="ada-transformer"))
    attention, memory, *_ = levels(found)
    assert (attention, memory) == (("MemoryLayer: attention",), ("MemoryLayer: main memory",))
    assert ("direct", "MemoryLayer: attention") in {
        (t.kind, t.source) for t in found.transfers("MemoryLayer: main memory")[0]
    }


def test_attention_stays_where_the_memory_has_a_momentum() -> None:
    design = replace(DESIGNS["ada-transformer"], momentum=True)
    names = [name for level in levels(describe(MemoryLayer(16, 2, design=design))) for name in level]
    assert [name for name in names if ":" in name][:3] == [
        "MemoryLayer: attention",
        "MemoryLayer: momentum of main memory",
        "MemoryLayer: main memory",
    ]


def test_tokens_per_step_orders_memories_and_weights() -> None:
    memory = ContinuumMemory(8, [4, 4096], online="local")
    slow = "levels.1: weights along the sequence"
    assert describe(memory, adamw(memory)).system.level_of(slow) == 1
    assert describe(memory, adamw(memory), tokens_per_step=512).system.level_of(slow) == 3
    with pytest.raises(UserError, match="tokens_per_step=0"):
        describe(memory, tokens_per_step=0)


# What is trained


def test_without_an_optimizer_the_frequency_is_not_given() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    model[0].weight.requires_grad_(False)
    found = describe(model)
    assert {name: str(box.frequency) for name, box in boxes(found).items()} == {
        "0.weight": "0 (frozen)",
        "0.bias": "not given",
        "1": "not given",
    }
    assert levels(found) == [("0.bias", "1"), ("0.weight",)]
    assert json.loads(found.to_json())["levels"][0]["period"] is None


def test_mistakes_of_the_caller() -> None:
    with pytest.raises(UserError, match="describe got str as the model: give a torch"):
        describe("tiny")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="describe got list as the optimizer"):
        describe(nn.Linear(1, 1), [])  # type: ignore[arg-type]


def test_it_is_a_name_of_the_package_and_loads_nothing_above_levels() -> None:
    assert nestlearn.describe is describe
    code = (
        "import sys; import nestlearn.levels; upper = ('nestlearn.optim', 'nestlearn.nn', 'nestlearn.models.hope')\n"
        "above = [m for m in sys.modules if m.startswith(upper)]; assert not above, above"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


# Any model at all


LAYERS = [
    *(lambda: nn.Linear(3, 3), lambda: nn.Linear(3, 2, bias=False), lambda: nn.BatchNorm1d(3), lambda: nn.ReLU()),
    *(lambda: nn.Embedding(5, 3), lambda: nn.MultiheadAttention(4, 2), lambda: nn.GRU(3, 2), lambda: Oddity()),
    *(lambda: nn.ParameterList([torch.zeros(2)]), lambda: nn.Conv1d(2, 2, 3), lambda: nn.ModuleList()),
]


@st.composite
def modules(draw: st.DrawFn, depth: int = 2) -> nn.Module:
    """Trees of layers under numbers and names, some of them shared, tied or frozen."""
    root = nn.Module()
    used: list[nn.Module] = []
    for i in range(draw(st.integers(0, 4))):
        name = draw(st.sampled_from(["layer", "0", "1", "norm1", "a_proj", "b_proj", "x12y"])) + str(i) * draw(
            st.integers(0, 1)
        )
        if name in root._modules:
            continue
        if used and draw(st.booleans()) and draw(st.booleans()):
            child = draw(st.sampled_from(used))
        elif depth and draw(st.booleans()):
            child = draw(modules(depth - 1))
        else:
            child = draw(st.sampled_from(LAYERS))()
        used.append(child)
        root.add_module(name, child)
    for p in root.parameters():
        p.requires_grad_(draw(st.booleans()))
    return root


@settings(max_examples=60, deadline=None)
@given(modules(), st.booleans(), st.data())
def test_every_parameter_is_in_exactly_one_box(model: nn.Module, trained: bool, data: st.DataObject) -> None:
    every = list(model.parameters())
    optimizer = None
    if trained and every:
        some = [p for p in every if data.draw(st.booleans())] or every
        optimizer = torch.optim.Adam(some)
    found = describe(model, optimizer)
    assert found.parameters == sum(p.numel() for p in every)
    taught = {id(p) for g in optimizer.param_groups for p in g["params"]} if optimizer else {id(p) for p in every}
    expected = sum(p.numel() for p in every if p.requires_grad and id(p) in taught)
    assert sum(found.system[name].parameters for name in found.trained) == expected
    assert len({box.name for box in found.system.boxes}) == len(found.system.boxes)
    str(found)
    found.to_json()


PATHS = st.lists(
    st.lists(
        st.sampled_from(["0", "1", "2", "layer1", "layer2", "q_proj", "k_proj", "10"]), min_size=1, max_size=3
    ).map(".".join),
    min_size=1,
    max_size=14,
    unique=True,
)


@given(PATHS)
def test_groups_hold_every_path_once(paths: list[str]) -> None:
    groups = group(paths, str, lambda path: path.count("."))
    assert sorted(path for _, found in groups for path in found) == sorted(paths)
    assert len({name for name, _ in groups}) == len(groups)
    for name, found in groups:
        if len(found) == 1:
            assert name == found[0]


@pytest.mark.parametrize("kind", ["depthwise", "split"])
def test_a_converted_model_has_its_levels(kind: str) -> None:
    small = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2)
    model = convert(LlamaForCausalLM(small), LevelsConfig(kind=kind, layers="all"))
    found = describe(model)
    learned = [box for box in found.system.boxes if "learned weights" in box.name]
    assert sorted({str(box.frequency) for box in learned}) == sorted(f"1/{period} per token" for period in PERIODS)
    assert sum(box.state for box in learned) == sum(level.parameters for level in model.levels)
    assert {box.objective for box in learned} == {"next-token loss of the model"}

"""HopeConfig: its complaints, its round trip, and how transformers comes to know it."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import AutoConfig

import nestlearn
from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.errors import UserError
from nestlearn.models.hope.block import TITANS_OPTIONS
from nestlearn.nn import SelfReferentialTitans


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_hidden_layers": 1, "block_types": ["hopp"]}, "'hopp': did you mean 'hope'"),
        ({"num_hidden_layers": 1, "block_types": ["hope-atention"]}, "did you mean 'hope-attention'"),
        ({"num_hidden_layers": 1, "block_types": ["gated-delta-net"]}, "did you mean 'gated-deltanet'"),
        ({"num_hidden_layers": 1, "block_types": ["titan"]}, "did you mean 'titans'"),
        ({"attention_window": 0}, "attention_window=0: must be at least 1"),
        ({"omega_window": 0}, "omega_window=0: must be at least 1"),
        ({"lp_power": 0.5}, "lp_power=0.5: must be at least 1"),
        ({"num_hidden_layers": 3, "block_types": ["hope"]}, "names 1 blocks, but num_hidden_layers=3"),
        ({"hidden_size": 30, "num_attention_heads": 4}, "hidden_size=30 is not a multiple"),
        ({"chunk_size": 0}, "chunk_size=0: must be at least 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"vocab_size": -1}, "vocab_size=-1"),
        ({"num_hidden_layers": 10**11}, "num_hidden_layers=100000000000: must be at most"),
        ({"memory_hidden_size": 0}, "memory_hidden_size=0: must be at least 1"),
        ({"retained": [0.9]}, r"retained=\[0.9\]: must be two numbers between 0 and 1"),
        ({"retained": [0.9, 1]}, "two numbers between 0 and 1"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps=0.0: must be positive and finite"),
        ({"rope_theta": float("nan")}, "rope_theta=nan: must be positive"),
        ({"initializer_range": float("inf")}, "initializer_range=inf: must be positive"),
        ({"eta_max": 0}, "eta_max=0: must be positive"),
        ({"norm_limit": -1.0}, "norm_limit=-1.0: must be positive"),
        ({"write_scale": 1}, "write_scale=1: must be between 0 and 1"),
        # Types come before ranges, which compute with the value.
        ({"bounded": None}, "bounded=None: must be bool"),
        ({"momentum": 1}, "momentum=1: must be bool"),
        ({"use_cache": "yes"}, "use_cache='yes': must be bool"),
        ({"initializer_range": "x"}, "initializer_range='x': must be float or int"),
        ({"vocab_size": 40.0}, "vocab_size=40.0: must be int"),
        ({"hidden_size": "16"}, "hidden_size='16': must be int"),
        ({"chunk_size": True}, "chunk_size=True: must be int"),
        ({"norm_limit": "4"}, "norm_limit='4': must be float or int or None"),
        ({"cms_chunk_sizes": [64, 0.5]}, r"cms_chunk_sizes=\[64, 0.5\]: must be list\[int\]"),
    ],
)
def test_rejects_in_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        HopeConfig(**options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cms_chunk_sizes": [64, 16]}, "fast to slow"),
        ({"cms_chunk_sizes": [0]}, "positive integer"),
        ({"intermediate_size": 100}, "evenly over 3 levels"),
        ({"cms_variant": "neted"}, "did you mean 'nested'"),
        ({"read": "anker"}, "did you mean 'anchor'"),
        ({"memory_type": "liner"}, "did you mean 'linear'"),
        ({"chunk_size_other": 0}, "chunk_size_other"),
    ],
)
def test_layers_reject_their_switches_when_the_model_is_built(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        nestlearn.HopeForCausalLM(HopeConfig(hidden_size=16, num_hidden_layers=1, **options))


def test_types_hold_after_construction_too_and_an_integer_is_a_float() -> None:
    config = HopeConfig(rms_norm_eps=1, write_scale=None, eta_max=None, norm_limit=None)
    with pytest.raises(UserError, match="hidden_size='wide': must be int"):
        config.hidden_size = "wide"


def test_block_types_default_to_hope() -> None:
    assert HopeConfig(num_hidden_layers=3).block_types == ["hope"] * 3


def test_a_model_that_is_cut_by_hand_is_its_first_blocks_and_one_that_is_grown_is_refused(tmp_path: Path) -> None:
    sizes = {"vocab_size": 16, "hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12}
    config = HopeConfig(**sizes, num_hidden_layers=3, block_types=["hope", "attention", "hope"])
    model, x = HopeForCausalLM(config).eval(), torch.arange(6)[None]
    model.save_pretrained(tmp_path / "whole")
    for kept in (2, 1):
        cut = HopeForCausalLM.from_pretrained(tmp_path / "whole", num_hidden_layers=kept).eval()
        assert cut.config.block_types == ["hope", "attention"][:kept]
        cut.save_pretrained(tmp_path / "cut")
        again = HopeForCausalLM.from_pretrained(tmp_path / "cut").eval()
        assert torch.equal(again(x).logits, cut(x).logits)
        first = model(x, output_hidden_states=True).hidden_states[kept]
        assert torch.equal(cut(x).logits, model.lm_head(model.model.norm(first)))
    config.num_hidden_layers = 4
    with pytest.raises(
        UserError, match=r"block_types names 3 blocks, but num_hidden_layers=4: give one type per block"
    ):
        HopeForCausalLM(config)
    config.num_hidden_layers = 2
    with pytest.raises(StrictDataclassClassValidationError, match="block_types names 3 blocks"):  # as of a Qwen
        config.save_pretrained(tmp_path)
    assert len(HopeForCausalLM(config).model.layers) == 2
    config.save_pretrained(tmp_path)
    assert HopeConfig.from_pretrained(tmp_path).block_types == ["hope", "attention"]


def test_layer_types_can_be_read_only() -> None:
    config = HopeConfig(num_hidden_layers=2)
    assert len(config.layer_types) == 2
    with pytest.raises(AttributeError):
        config.layer_types = ["full_attention"] * 2
    assert "layer_types" not in config.to_dict()


def test_round_trip_through_a_file(tmp_path: Path) -> None:
    config = HopeConfig(num_hidden_layers=2, block_types=["hope", "attention"], retained=[0.9, 0.99], norm_limit=None)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is HopeConfig
    ours, theirs = config.to_dict(), loaded.to_dict()
    assert {**ours, "_name_or_path": str(tmp_path)} == theirs


def test_defaults_are_those_of_the_layer() -> None:
    parameters = inspect.signature(SelfReferentialTitans).parameters
    config = HopeConfig()
    ours = {name: getattr(config, name) for name in TITANS_OPTIONS}
    ours |= {"memory": config.memory_type, "memory_hidden": config.memory_hidden_size, "heads": 4}
    ours["retained"] = tuple(ours["retained"])
    assert ours == {name: p.default for name, p in parameters.items() if p.default is not p.empty}


def test_import_is_light_and_reaches_the_auto_classes_in_any_order(tmp_path: Path) -> None:
    nestlearn.HopeForCausalLM(HopeConfig(hidden_size=16, num_hidden_layers=1, vocab_size=8)).save_pretrained(tmp_path)
    auto = "from transformers import AutoModelForCausalLM\n"
    load = f"print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__name__)\n"
    light = "import sys, nestlearn\nprint(any(m in sys.modules for m in ('torch', 'transformers')))\n"
    expected = {
        light + auto + load: ["False", "HopeForCausalLM"],
        "from nestlearn import HopeConfig\n" + auto + load: ["HopeForCausalLM"],
    }
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for code in expected
    ]
    for process, words in zip(started, expected.values(), strict=True):
        output, problems = process.communicate(timeout=120)
        assert output.split() == words, problems


def test_unknown_names_raise_as_in_any_module() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Hope'"):
        _ = nestlearn.Hope
    with pytest.raises(AttributeError, match="no attribute 'Hope'"):
        _ = nestlearn.models.hope.Hope
    assert {"HopeConfig", "HopeForCausalLM"} <= set(dir(nestlearn))

"""A model folder, and one line about each thing that can be wrong with it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.data import load_tokenizer
from nestlearn.errors import UserError
from nestlearn.train.loading import load_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    config = LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    load_tokenizer("bytes").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def message(path: Path | str) -> str:
    with pytest.raises(UserError) as error:
        load_model(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_saved_model_comes_back(folder):
    model, tokenizer = load_model(folder)
    assert isinstance(model, LlamaForCausalLM)
    assert not model.training
    assert tokenizer.encode("é") == [195, 169]


def test_hope_and_tied_weights_come_back(tmp_path):
    config = HopeConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    original = HopeForCausalLM(config).eval()
    original.save_pretrained(tmp_path)
    load_tokenizer("bytes").save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original(ids).logits)


def test_sharded_weights(folder):
    model, _ = load_model(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="5KB")
    assert not (folder / "model.safetensors").exists()
    again, _ = load_model(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert f"has no {shard.name}" in message(folder)
    for content in ("{}", '{"weight_map": []}', '{"weight_map": {"a": 5, "b": "c"}}', '{"weight_map": {"a": []}}'):
        (folder / "model.safetensors.index.json").write_text(content)
        assert "no weight_map" in message(folder)


def test_missing_folder(tmp_path):
    assert "no model folder" in message(tmp_path / "nothing")
    assert "has no config.json" in message(tmp_path)
    assert "cannot be looked up" in message("x" * 300)


@pytest.mark.parametrize("damage", [lambda b: b[:-50], lambda b: b[:5], lambda b: b"<html>" * 99, lambda b: b""])
def test_damaged_weights(folder, damage):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert "model.safetensors is corrupt or truncated" in message(folder)


def test_missing_weights_and_pickles(folder):
    (folder / "model.safetensors").unlink()
    assert "has no model.safetensors: save" in message(folder)
    torch.save({}, folder / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle and is not read" in message(folder)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"model_type": "hoppe"}, "hoppe"),
        ({"model_type": None}, "names no model_type"),
        ({"model_type": "vit"}, "'vit', which is no causal language model"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_size": 32}, "have another shape"),
        ({"num_hidden_layers": 2}, "9 are missing, model.layers.1"),
        ({"model_type": "hope", "block_types": ["hoppe"]}, "did you mean 'hope'"),
        ({"model_type": "hope", "hidden_size": "wide"}, "config.json: hidden_size='wide': must be int"),
        ({"dtype": "foo"}, "'foo'"),
        ({"vocab_size": 100, "eos_token_id": 256}, "eos_token_id=256 is not below vocab_size=100"),
        ({"vocab_size": 100, "bos_token_id": 1, "eos_token_id": [2, 100]}, "is not below vocab_size=100"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "cannot load"),
        ({"auto_map": {"AutoConfig": "code.Config"}, "model_type": "hoppe"}, "custom code"),
    ],
)
def test_foreign_config(folder, values, said, capfd):
    edit_config(folder, **values)
    assert said in message(folder)
    assert str(folder) in message(folder)
    assert "LOAD REPORT" not in capfd.readouterr().err


@pytest.mark.parametrize(("content", "said"), [("{", "cannot read"), ("[]", "no JSON object"), ("\0", "cannot read")])
def test_damaged_config(folder, content, said):
    (folder / "config.json").write_text(content)
    assert said in message(folder)


def test_missing_damaged_and_foreign_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "has no tokenizer" in message(folder)
    (folder / "tokenizer.json").write_text("{")
    assert "damaged tokenizer" in message(folder)
    (folder / "tokenizer.json").unlink()
    tokenizer = load_tokenizer("bytes")
    tokenizer.add_tokens(["extra"])
    tokenizer.save_pretrained(folder)
    assert "259 tokens and the model 258" in message(folder)

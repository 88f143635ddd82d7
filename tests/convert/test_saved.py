"""A converted folder holds the difference alone, and refuses what does not belong to it."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from nestlearn.cli import app
from nestlearn.convert import ContinualModel, Level, LevelsConfig, base_hash, convert, saved
from nestlearn.convert.saved import load_base
from nestlearn.data.tokenizers import load_tokenizer
from nestlearn.errors import UserError
from nestlearn.files import write_atomic
from nestlearn.train.loading import load_model
from tests.convert.models import make, tokens

CONFIG = LevelsConfig("split", (Level(4, 0.1), Level(8, 0.1, retention=0.5)), layers=[1, 3])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def converted_folder(base: Path, folder: Path, dtype: str = "float32") -> tuple[ContinualModel, list[str]]:
    model = convert(load_base(base, dtype), CONFIG)
    start = {name: weight for level in model.levels for name, weight in level.start.items()}
    names = sorted(start)
    generator = torch.Generator().manual_seed(0)
    learned = {n: start[n] + torch.randn(start[n].shape, generator=generator) / 10 for n in names[:3]}
    model.weights = {**learned, names[3]: start[names[3]].clone()}
    model.save_pretrained(folder)
    return model, names


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_the_difference_is_saved_and_comes_back_to_the_bit(base: Path, tmp_path: Path, dtype: str) -> None:
    folder = tmp_path / "learned"
    model, names = converted_folder(base, folder, dtype)
    assert sorted(path.name for path in folder.iterdir()) == ["learned.safetensors", "levels.json"]
    assert set(load_file(folder / "learned.safetensors")) == set(names[:3])
    entries = json.loads((folder / "levels.json").read_text())
    assert entries["base"] == {"path": str(base), "sha256": base_hash(model), "dtype": dtype}
    again = ContinualModel.from_pretrained(folder)
    assert again.config_levels == CONFIG
    assert set(again.weights) == set(names[:3])
    assert all(torch.equal(again.weights[name], model.weights[name]) for name in names[:3])
    with torch.no_grad():
        assert torch.equal(again(tokens()).logits, model(tokens()).logits)
    moved = base.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="no model folder"):
        ContinualModel.from_pretrained(folder)
    for given in (moved, load_base(moved, dtype)):
        assert torch.equal(ContinualModel.from_pretrained(folder, given).weights[names[0]], model.weights[names[0]])


def test_a_model_of_no_folder_needs_its_base(tmp_path: Path) -> None:
    convert(make(), CONFIG).save_pretrained(tmp_path / "learned")
    with pytest.raises(UserError, match="does not say where its base lies"):
        ContinualModel.from_pretrained(tmp_path / "learned")
    assert ContinualModel.from_pretrained(tmp_path / "learned", make()).weights == {}


def test_another_base_and_damaged_files_are_refused_by_name(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "learned"
    converted_folder(base, folder)
    with pytest.raises(UserError, match="give the model that was converted"):
        ContinualModel.from_pretrained(folder, make(seed=1))
    data, entries = (folder / "learned.safetensors").read_bytes(), (folder / "levels.json").read_text()
    for damaged in (data[:-1], data[:-1] + bytes([data[-1] ^ 1]), b""):
        (folder / "learned.safetensors").write_bytes(damaged)
        with pytest.raises(UserError, match=r"learned\.safetensors is damaged"):
            ContinualModel.from_pretrained(folder)
    (folder / "learned.safetensors").unlink()
    with pytest.raises(UserError, match=r"learned\.safetensors is damaged or missing"):
        ContinualModel.from_pretrained(folder)
    (folder / "learned.safetensors").write_bytes(data)
    for text, says in [
        (entries[:50], "levels.json is damaged"),
        (entries.replace('"format": 1', '"format": 2'), "has the format 2"),
        (entries.replace('"base"', '"bass"'), "levels.json is damaged"),
        (entries.replace('"split"', '"splat"'), "did you mean 'split'"),
        (entries.replace('"float32"', '"float31"'), "'float31', which torch does not know"),
    ]:
        (folder / "levels.json").write_text(text)
        with pytest.raises(UserError, match=says):
            ContinualModel.from_pretrained(folder)
    with pytest.raises(UserError, match="no converted model"):
        ContinualModel.from_pretrained(base)


def test_weights_of_several_rows_are_no_one_model(tmp_path: Path) -> None:
    model = convert(make())
    model.weights = {name: weight[None] for name, weight in model.levels[0].start.items()}
    with pytest.raises(UserError, match="differs from row to row"):
        model.save_pretrained(tmp_path / "learned")


def test_the_command(base: Path, tmp_path: Path) -> None:
    run, out = CliRunner(), tmp_path / "learner"
    options = ["--kind", "split", "--layers", "1,3", "--periods", "4,16", "--lr", "1e-3,1e-4", "--rule", "sgd"]
    options += ["--clip", "2", "--retention", "0.5,0.1", "--budget", "0.3"]
    done = run.invoke(app, ["convert", str(base), "--out", str(out), *options, "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    levels = (Level(4, 1e-3, "sgd", 2.0, 0.5, 0.3), Level(16, 1e-4, "sgd", 2.0, 0.1, 0.3))
    assert LevelsConfig.from_dict(said["config"]) == LevelsConfig("split", levels, layers=[1, 3])
    assert [row["layers"] for row in said["levels"]] == [[1, 3], [1, 3]]
    assert ContinualModel.from_pretrained(out).config_levels == LevelsConfig("split", levels, layers=[1, 3])
    done = run.invoke(app, ["convert", str(base), "--out", str(tmp_path / "other")])
    assert done.exit_code == 0
    assert "1,344" in done.stdout
    assert ContinualModel.from_pretrained(tmp_path / "other").config_levels == LevelsConfig()
    for arguments, says in [
        ([str(base), "--out", str(out)], "holds a converted model already"),
        ([str(base), "--out", str(tmp_path / "x"), "--lr", "1,2"], "--lr has 2 numbers for 3 levels"),
        ([str(base), "--out", str(tmp_path / "x"), "--rule", "sgd"], "--rule sgd has no default rate: give --lr"),
        ([str(base), "--out", str(tmp_path / "x"), "--budget", "a"], "--budget 'a': give numbers"),
        ([str(base), "--out", str(tmp_path / "x"), "--retention", "2"], "--retention 2.0 of a level: give a share"),
        ([str(base), "--out", str(tmp_path / "x"), "--budget", "0"], "--budget 0.0 of a level: give the largest"),
        ([str(base), "--out", str(tmp_path / "x"), "--periods", "0"], "--periods 0 of a level: give a whole number"),
        ([str(base), "--out", str(tmp_path / "x"), "--periods", "8,4"], "8,4 of the levels are not ordered"),
        ([str(base), "--out", str(tmp_path / "x"), "--layers", "0,0"], "--layers 0,0: an index stands there twice"),
        ([str(base), "--out", str(tmp_path / "x"), "--layers", "0"], "fewer levels, more layers or --kind split"),
        ([str(base), "--out", str(tmp_path / "x"), "--periods", "4,b"], "--periods '4,b': give whole numbers"),
        ([str(base), "--out", str(tmp_path / "x"), "--layers", "early"], "--layers 'early'"),
        ([str(tmp_path / "y"), "--out", str(tmp_path / "x")], "no model folder"),
        ([str(out), "--out", str(tmp_path / "x")], "is converted already: give its base model"),
    ]:
        failed = run.invoke(app, ["convert", *arguments])
        assert isinstance(failed.exception, UserError)
        assert says in str(failed.exception)
        assert "None" not in str(failed.exception)
        assert not (tmp_path / "x").exists()


def test_a_converted_folder_is_a_model_for_every_command(base: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bytes")
    tokenizer.save_pretrained(base)
    model, _ = converted_folder(base, tmp_path / "learned")
    with pytest.raises(UserError, match="do not belong together"):
        load_model(tmp_path / "learned")
    wide = make()
    wide.resize_token_embeddings(len(tokenizer))
    wide.save_pretrained(base)
    model, _ = converted_folder(base, tmp_path / "wide")
    loaded, found = load_model(tmp_path / "wide")
    assert found.get_vocab() == tokenizer.get_vocab()
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
    done = CliRunner().invoke(app, ["generate", str(tmp_path / "wide"), "--prompt", "ab", "--seed", "0", "--json"])
    assert json.loads(done.stdout)["text"]
    (tmp_path / "text.txt").write_text("some words to read")
    done = CliRunner().invoke(app, ["eval", str(tmp_path / "wide"), "--data", str(tmp_path / "text.txt"), "--json"])
    assert json.loads(done.stdout)["tokens"] == len("some words to read")
    done = CliRunner().invoke(app, ["levels", str(tmp_path / "wide"), "--json"])
    assert json.loads(done.stdout)["model"] == "ContinualModel"


@pytest.mark.parametrize("file", ["learned.safetensors", "kept.safetensors", "levels.json"])
def test_a_full_disk_leaves_nothing_where_nothing_was(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    def full(path: Path, write: Callable[[Path], object]) -> None:
        write_atomic(path, write)
        if path.name == file:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    wide = make()
    wide.resize_token_embeddings(len(load_tokenizer("bytes")))
    wide.save_pretrained(base)
    load_tokenizer("bytes").save_pretrained(base)
    (tmp_path / "keep.txt").write_text("ab" * 50)
    monkeypatch.setattr(saved, "write_atomic", full)
    monkeypatch.setattr(saved, "write_json", lambda path, value: full(path, lambda p: p.write_text("{}")))
    words = ["convert", str(base), "--out", str(tmp_path / "new" / "learner"), "--keep", str(tmp_path / "keep.txt")]
    failed = CliRunner().invoke(app, words)
    assert isinstance(failed.exception, OSError)
    assert not (tmp_path / "new").exists()

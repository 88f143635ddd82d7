"""The examples run, on a tiny model."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from nestlearn.data import load_tokenizer
from nestlearn.learner.store import Store
from tests.conftest import ROOT
from tests.learner.conftest import tiny, words


def test_learn_a_manual(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("learn_a_manual", ROOT / "examples" / "learn_a_manual.py")
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    model = tiny()
    model.base.save_pretrained(tmp_path / "base")
    load_tokenizer("bytes").save_pretrained(tmp_path / "base")
    model.base.config.name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "manual.txt").write_text("\n".join(words(20, seed) for seed in range(40)))
    store = tmp_path / "memory"
    given = ["--model", str(tmp_path / "model"), "--store", str(store), "--question", "What is fast?"]
    example.main([str(tmp_path / "manual.txt"), *given])
    out = capsys.readouterr().out
    before, after, again = (float(loss) for loss in re.findall(r": loss (\d+\.\d+) on what is not read", out))
    assert after < before - 0.5
    assert again == before
    moved = [float(share) for share in re.findall(r"level-\d moved by (\d+\.\d+) %", out)]
    assert len(moved) == 3
    assert min(moved) > 0
    learned = out.split()[-1]
    assert Store(store).get(learned).meta["tokens"] > 0
    assert Store(store).head().meta["tokens"] == 0  # type: ignore[union-attr]

"""docs/levels.md: its code runs, and says what it says."""

import re
from pathlib import Path
from textwrap import dedent

import pytest
import torch

from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "levels.md").read_text()
CODE = [dedent(block) for block in re.findall(r"(?:^ {4}.+\n(?:^\n(?= {4}))*)+", TEXT, re.MULTILINE)]


def test_the_ten_lines_make_the_picture(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs" / "figures").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    code = next(block for block in CODE if "levels-hope.png" in block)
    assert len(code.strip().splitlines()) <= 11
    exec(code, {})
    assert (tmp_path / "docs" / "figures" / "levels-hope.png").read_bytes().startswith(b"\x89PNG")
    assert "HopeForCausalLM: 1,889,644 parameters" in capsys.readouterr().out


def test_a_system_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    code = next(block for block in CODE if "NestedSystem((" in block)
    exec(code, {})
    assert capsys.readouterr().out.strip() == code.strip().rpartition("# ")[2]


def test_the_pieces_of_knowledge_transfer() -> None:
    code = "\n".join(block for block in CODE if "# direct" in block or "functional_call" in block)
    assert all(name in code for name in ("direct(", "descend(", "initialisation(", "generate_weights("))
    scope: dict = {}
    exec(code, scope)
    assert scope["out"].shape == (4, 2)
    assert not torch.equal(scope["after"]["0.weight"], scope["net"][0].weight)

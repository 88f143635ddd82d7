"""docs/levels.md: its code runs, and says what it says."""

import re
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from torch import nn
from torch.func import functional_call

from nestlearn import levels
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
    net = nn.Sequential(nn.Linear(3, 2))
    x, y = torch.ones(4, 3), torch.zeros(4, 2)
    scope = dict(net=net, block=net, x=x, y=y, x_new=x, y_new=y, batches=[(x, y)] * 8, functional_call=functional_call)
    scope |= dict(query=torch.ones(2), memory=torch.ones(2, 2), mse=nn.functional.mse_loss, c=torch.ones(1))
    scope |= dict(generator=nn.Linear(1, 8)) | {name: getattr(levels, name) for name in levels.__all__}
    exec(code, scope)
    assert scope["y"].shape == (4, 2)
    assert not torch.equal(scope["after"]["0.weight"], net[0].weight)

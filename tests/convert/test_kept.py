"""What is kept: the step is that of the least squares, outputs on the text hardly move, and the folder has it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedModel
from typer.testing import CliRunner

from nestlearn.cli import app
from nestlearn.convert import ContinualModel, Level, LevelsConfig, convert
from nestlearn.convert.blocks import Piece
from nestlearn.convert.kept import kept_inputs
from nestlearn.convert.saved import load_base
from nestlearn.data.tokenizers import load_tokenizer
from nestlearn.errors import UserError
from nestlearn.learner.state import LevelState
from nestlearn.learner.update import update
from tests.convert.models import CONFIGS, VOCAB, make


class Letters:
    """A tokenizer of as few tokens as the models have."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % (VOCAB - 3) for letter in text]}


TEXT = "Some pages of what the model should stay good at. " * 20


@given(st.integers(2, 6), st.integers(1, 12), st.floats(0.01, 100), st.integers(0, 1000))
def test_a_step_is_that_of_the_least_squares(d: int, count: int, strength: float, seed: int) -> None:
    torch.manual_seed(seed)
    inputs, step = torch.randn(1, count, d), torch.randn(3, d)
    piece = Piece("w", nn.Linear(d, 3, bias=False), "weight")
    kept = kept_inputs({"w": piece}, {"w": [inputs]}, strength, d)
    x = inputs[0].double()
    size = x.square().sum() / (count * d)  # the mean eigenvalue of the inputs' second moment
    # Rows [I; sqrt(strength / (N s)) X] of one least squares problem, for every row of the step.
    rows = torch.cat([torch.eye(d, dtype=torch.float64), (strength / (count * size)).sqrt() * x])
    targets = torch.cat([step.double(), torch.zeros(3, count, dtype=torch.float64)], 1)
    expected = torch.linalg.lstsq(rows, targets.mT).solution.mT
    torch.testing.assert_close(kept["w"].bend(step).double(), expected, atol=1e-4, rtol=1e-4)


def moved(model: ContinualModel, changes: dict[str, Tensor], ids: Tensor) -> float:
    """How far the logits of a text move by changes of the weights, after they were bent by what is kept."""
    weights = {}
    for level in model.levels:
        for name, start in level.start.items():
            change = changes[name]
            weights[name] = start + (level.kept[name].bend(change) if name in level.kept else change)
    with torch.no_grad():
        before = model(ids).logits
        with model.using(weights):
            return float((model(ids).logits - before).square().mean())


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("kind", ["depthwise", "split"])
def test_outputs_on_the_text_hardly_move(family: str, kind: str) -> None:
    tokenizer = Letters()
    model = convert(make(family), LevelsConfig(kind, (Level(4, 0.1), Level(8, 0.1)), "all"))
    generator = torch.Generator().manual_seed(0)
    names = {name: w.shape for level in model.levels for name, w in level.start.items()}
    changes = {name: torch.randn(shape, generator=generator) / 10 for name, shape in names.items()}
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])[None, :60]
    free = moved(model, changes, ids)
    model.keep(tokenizer, TEXT, strength=1000.0)
    assert {name for level in model.levels for name in level.kept} == set(names)
    assert moved(model, changes, ids) < free / 20
    model.keep(tokenizer, TEXT, strength=0.0)
    assert moved(model, changes, ids) == pytest.approx(free, rel=1e-4)


def test_an_update_is_bent_and_no_other_weight() -> None:
    tokenizer = Letters()
    model = convert(make(), LevelsConfig(levels=(Level(4, 0.5, rule="sgd", clip=1e9),)))
    model.keep(tokenizer, TEXT)
    (level,) = model.levels
    name, other = list(level.start)[:2]
    state = LevelState(gathered={n: torch.ones_like(w) for n, w in level.start.items()}, tokens=4, scored=4)
    after = update(state, level.config, level.start, {name: level.kept[name]})
    free = update(state, level.config, level.start)
    assert after is not None
    assert free is not None
    step = free.weights[name] - level.start[name]
    torch.testing.assert_close(after.weights[name], level.start[name] + level.kept[name].bend(step))
    assert not torch.allclose(after.weights[name], free.weights[name])
    assert torch.equal(after.weights[other], free.weights[other])


@pytest.mark.parametrize("rank", [3, None])
def test_it_is_saved_and_comes_back_to_the_bit(tmp_path: Path, rank: int | None) -> None:
    tokenizer = Letters()
    base: PreTrainedModel = make()
    base.save_pretrained(tmp_path / "base")
    model = convert(base, LevelsConfig("split", (Level(4, 0.1), Level(8, 0.1))))
    model.keep(tokenizer, TEXT, rank=rank)
    model.save_pretrained(tmp_path / "learned")
    again = ContinualModel.from_pretrained(tmp_path / "learned", tmp_path / "base")
    for one, two in zip(model.levels, again.levels, strict=True):
        assert list(one.kept) == list(two.kept) != []
        for name, kept in one.kept.items():
            assert torch.equal(kept.matrix, two.kept[name].matrix)
            assert kept.transposed == two.kept[name].transposed
    file = tmp_path / "learned" / "kept.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"kept\.safetensors is damaged"):
        ContinualModel.from_pretrained(tmp_path / "learned", tmp_path / "base")


def test_the_command_keeps_a_file(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bytes")
    model = make()
    model.resize_token_embeddings(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "empty.txt").write_text("")
    run, base, out = CliRunner(), str(tmp_path / "base"), tmp_path / "out"
    done = run.invoke(app, ["convert", base, "--out", str(out), "--keep", str(tmp_path / "text.txt")])
    assert done.exit_code == 0
    again = ContinualModel.from_pretrained(out)
    model = convert(load_base(base))
    model.keep(tokenizer, TEXT)
    for one, two in zip(model.levels, again.levels, strict=True):
        for name, kept in one.kept.items():
            torch.testing.assert_close(two.kept[name].bend(one.start[name]), kept.bend(one.start[name]))
    for arguments, said in (
        (["--keep", str(tmp_path / "empty.txt")], "is empty"),
        (["--keep", str(tmp_path / "none.txt")], "cannot read"),
        (["--keep-strength", "3"], "give --keep FILE"),
        (["--keep", str(tmp_path / "text.txt"), "--keep-strength", "-1"], "strength=-1"),
    ):
        failed = run.invoke(app, ["convert", base, "--out", str(tmp_path / "x"), *arguments])
        assert isinstance(failed.exception, UserError)
        assert said in str(failed.exception)
        assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [("", {}, "no token"), (TEXT, {"strength": -1.0}, "strength=-1"), (TEXT, {"rank": 0}, "rank=0")],
)
def test_what_makes_no_sense_is_refused(text: str, options: dict[str, float], said: str) -> None:
    tokenizer = Letters()
    model = convert(make())
    with pytest.raises(UserError, match=said):
        model.keep(tokenizer, text, **options)

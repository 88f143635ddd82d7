"""What is kept: the step is that of the least squares, outputs on the text hardly move, and the folder has it."""

from __future__ import annotations

import threading
from pathlib import Path
from unittest.mock import patch

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
from nestlearn.convert.kept import FADE, OPEN, kept_besides, kept_inputs, seen_inputs
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


@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 4), st.floats(0, 30), st.booleans(), st.integers(0, 999))
def test_texts_add_up_and_fade(d: int, texts: int, count: int, strength: float, fixed: bool, seed: int) -> None:
    """Against the sum itself: what was kept before the texts stays whole, older texts weigh less."""
    torch.manual_seed(seed)
    piece = Piece("w", nn.Linear(d, 3, bias=False), "weight")
    i = torch.eye(d, dtype=torch.float64)

    def share(inputs: Tensor, strength: float) -> Tensor:
        x = inputs[0].double()
        return strength * d * x.mT @ x / x.square().sum()

    prose = torch.randn(1, 5, d)
    first = kept_inputs({"w": piece}, {"w": [prose]}, 3.0, None) if fixed else {}
    a_0 = share(prose, 3.0) if fixed else torch.zeros_like(i)
    kept, a = dict(first), torch.zeros_like(i)
    with patch("nestlearn.convert.kept.OPEN", 0.0):
        for _ in range(texts):
            inputs = torch.randn(1, count, d)
            kept = kept_besides({"w": piece}, {"w": [inputs]}, strength, kept, first)
            a = FADE * a + share(inputs, strength)
        one = kept_besides({"w": piece}, {"w": [inputs]}, strength, {}, {})["w"].matrix
    expected = torch.linalg.inv(i + a_0 + a)
    torch.testing.assert_close(kept["w"].matrix.double(), expected, atol=1e-4, rtol=1e-3)
    opened = kept_besides({"w": piece}, {"w": [inputs]}, strength, {}, {})["w"].matrix
    torch.testing.assert_close(opened.double(), (1 - OPEN) * one.double() + OPEN * i, atol=1e-6, rtol=0)


@pytest.mark.parametrize("strength", [0.3, 1e6])
@pytest.mark.parametrize("fixed", [False, True])
def test_a_level_never_closes_however_many_texts(strength: float, fixed: bool) -> None:
    torch.manual_seed(0)
    d = 24
    piece = Piece("w", nn.Linear(d, d, bias=False), "weight")
    scale = 10.0 ** torch.linspace(-3, 3, d)
    first = kept_inputs({"w": piece}, {"w": [torch.randn(1, 40, d)]}, 1e8, None) if fixed else {}
    kept = dict(first)
    for _ in range(200):
        kept = kept_besides({"w": piece}, {"w": [torch.randn(1, 40, d) * scale]}, strength, kept, first)
    passes = torch.linalg.eigvalsh(kept["w"].matrix.double())
    assert passes.min() > OPEN / 2
    assert passes.max() < 1 + 1e-4


def test_inputs_are_seen_as_they_are_with_what_was_learned_and_by_no_other_thread() -> None:
    model = convert(make(), LevelsConfig("split", (Level(4, 0.1), Level(8, 0.1)), "all"))
    names = [name for level in model.levels for name in level.start]
    torch.manual_seed(0)
    weights = {n: w + torch.randn_like(w) for level in model.levels for n, w in level.start.items()}
    ids, other = torch.arange(6)[None], torch.arange(7)[None]

    def read() -> None:
        model(ids)
        thread = threading.Thread(target=lambda: model(other))
        thread.start()
        thread.join()

    plain, learned = (seen_inputs(model.scope, given, [read]) for given in ({}, weights))
    assert set(plain) == {name for name in names if "weight" in name}
    assert all(len(inputs) == 1 and inputs[0].shape[:2] == (1, 6) for inputs in learned.values())
    first, last = (next(n for n in names if f"layers.{layer}." in n and "up_proj" in n) for layer in (0, 1))
    assert torch.equal(plain[first][0], learned[first][0])  # nothing was learned below it
    assert not torch.allclose(plain[last][0], learned[last][0])
    down = first.replace("up_proj", "down_proj")
    x = learned[first][0]
    gate, up = (x @ weights[first.replace("up_proj", f"{name}_proj")].mT for name in ("gate", "up"))
    torch.testing.assert_close(learned[down][0], nn.functional.silu(gate) * up)


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


def test_only_levels_that_consolidate_do_and_what_is_kept_of_the_model_stays() -> None:
    tokenizer = Letters()
    model = convert(make(), LevelsConfig("split", (Level(4, 0.1, consolidation=0.5), Level(8, 0.1)), "all"))
    model.keep(tokenizer, TEXT)
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])[None, :60]
    fast, slow = model.consolidate({}, [{}, {}], [lambda: model(ids)])
    assert fast.keys() == model.levels[0].start.keys()
    assert slow == {}
    for name, own in fast.items():
        step = torch.randn_like(model.levels[0].start[name])
        assert own.bend(step).norm() < model.levels[0].kept[name].bend(step).norm() < step.norm()
    assert model.consolidate({}, [fast, slow], []) == [fast, slow]  # a text of which nothing was read


def test_the_command_keeps_a_file(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("bytes")
    model = make()
    model.resize_token_embeddings(len(tokenizer))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "empty.txt").write_text("")
    run, base, out = CliRunner(), str(tmp_path / "base"), tmp_path / "out"
    given = ["--keep", str(tmp_path / "text.txt"), "--consolidation", "0.1,0.2,0"]
    done = run.invoke(app, ["convert", base, "--out", str(out), *given])
    assert done.exit_code == 0
    again = ContinualModel.from_pretrained(out)
    assert [level.config.consolidation for level in again.levels] == [0.1, 0.2, 0]
    model = convert(load_base(base))
    model.keep(tokenizer, TEXT)
    for one, two in zip(model.levels, again.levels, strict=True):
        for name, kept in one.kept.items():
            torch.testing.assert_close(two.kept[name].bend(one.start[name]), kept.bend(one.start[name]))
    for arguments, said in (
        (["--keep", str(tmp_path / "empty.txt")], "is empty"),
        (["--keep", str(tmp_path / "none.txt")], "cannot read"),
        (["--keep-strength", "3"], "give --keep FILE"),
        (["--consolidation", "-1"], "--consolidation -1"),
        (["--consolidation", "0.1,0.2"], "2 numbers for 3 levels"),
        (["--keep", str(tmp_path / "text.txt"), "--keep-strength", "-1"], "--keep-strength -1"),
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

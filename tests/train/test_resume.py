"""A run that is killed at any step and resumed ends with the weights of one that was not, to the bit."""

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestlearn.errors import UserError
from nestlearn.train import checkpoint
from nestlearn.train.callbacks import read_metrics
from nestlearn.train.recipe import Recipe, dump, load_recipe
from nestlearn.train.run import train
from nestlearn.train.trainer import LanguageModelTrainer

COMMAND = [sys.executable, "-c", "from nestlearn.cli import main; main()", "train"]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def kill_at(command: list[str], metrics: Path, step: int) -> None:
    """Start the command and send SIGKILL as soon as ``metrics`` tells of ``step``."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if max((row["step"] for row in read_metrics(metrics)), default=0) >= step:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors


def test_killed_twice_and_resumed_is_bit_identical(hope_recipe: Recipe, tmp_path: Path) -> None:
    # Steps enough to be killed in the middle of, most of them between two updates of the slow level.
    recipe = hope_recipe.replace("train", tokens=40 * 128, levelwise=True)
    recipe = recipe.replace("model", cms_chunk_sizes=[8, 5 * 128])
    rng = random.Random(2)
    file, out = tmp_path / "recipe.toml", tmp_path / "killed"
    file.write_text(dump(recipe))
    command = [*COMMAND, "--config", str(file), "--out", str(out)]
    kill_at(command, out / "metrics.jsonl", rng.randint(4, 35))
    assert not (out / "model.safetensors").exists()
    kill_at([*command, "--resume"], out / "baseline" / "metrics.jsonl", rng.randint(4, 35))
    assert (out / "model.safetensors").exists()
    assert not (out / "baseline" / "model.safetensors").exists()
    finished = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr

    whole = tmp_path / "whole"
    train(recipe, whole)
    for name in ("model.safetensors", "baseline/model.safetensors"):
        assert digest(out / name) == digest(whole / name)
    for name in ("metrics.jsonl", "baseline/metrics.jsonl"):
        killed, straight = read_metrics(out / name), read_metrics(whole / name)
        assert [row["step"] for row in killed] == [row["step"] for row in straight]
        assert [row.get("loss") for row in killed] == [row.get("loss") for row in straight]
    assert not list(out.rglob("checkpoint-*"))


@pytest.fixture
def ended(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that was killed between its last step, 12, and its result."""
    whole = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("nestlearn.train.run._finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(recipe, whole)
    parent = whole / "checkpoints"
    assert [path.name for path in checkpoint.list_checkpoints(parent)] == ["checkpoint-9", "checkpoint-12"]
    return whole


@pytest.fixture
def stopped(ended: Path) -> Path:
    """A run that stopped after its checkpoint of step 9."""
    shutil.rmtree(ended / "checkpoints" / "checkpoint-12")
    return ended


def test_every_format_is_safetensors_or_json(stopped: Path) -> None:
    suffixes = {path.suffix for path in stopped.rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json", ".jsonl", ".toml"}


def test_resumes_over_what_a_kill_left(recipe: Recipe, straight: bytes, stopped: Path) -> None:
    parent = stopped / "checkpoints"
    shutil.copytree(parent / "checkpoint-9", parent / ".checkpoint-12.partial")
    (parent / ".checkpoint-12.partial" / "optimizer.safetensors").write_bytes(b"half")
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"model": "transformer++", "st')
    train(recipe, stopped, resume=True)
    assert (stopped / "model.safetensors").read_bytes() == straight
    assert [row["step"] for row in read_metrics(stopped / "metrics.jsonl") if "loss" in row] == list(range(1, 13))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "trainer_state.json", "random.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damaged_checkpoint_is_one_line(recipe: Recipe, stopped: Path, name: str, damage: str) -> None:
    path = stopped / "checkpoints" / "checkpoint-9" / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(UserError, match=f"checkpoint-9 is damaged .{name}.*delete this folder") as caught:
        train(recipe, stopped, resume=True)
    assert "\n" not in str(caught.value)


HEAD = f'{{"format": "{checkpoint.FORMAT}"'


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[1]", '{"format": "other"}', HEAD + "}", HEAD + ', "sha256": []}', HEAD + ', "sha256": {}}', None],
)
def test_foreign_checkpoint_is_one_line(recipe: Recipe, stopped: Path, content: str | None) -> None:
    manifest = stopped / "checkpoints" / "checkpoint-9" / "manifest.json"
    if content is None:
        manifest.unlink()
    else:
        manifest.write_text(content)
    with pytest.raises(UserError, match=r"checkpoint-9(/manifest.json)? is (no|damaged).*delete") as caught:
        train(recipe, stopped, resume=True)
    assert "\n" not in str(caught.value)


def test_a_file_that_the_manifest_does_not_list_is_refused(recipe: Recipe, stopped: Path) -> None:
    manifest = stopped / "checkpoints" / "checkpoint-9" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["sha256"]["model.safetensors"]
    manifest.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"manifest\.json is damaged \(it lists no model\.safetensors\)"):
        train(recipe, stopped, resume=True)


def test_a_renamed_checkpoint_is_refused(recipe: Recipe, stopped: Path) -> None:
    parent = stopped / "checkpoints"
    (parent / "checkpoint-9").rename(parent / "checkpoint-12")
    with pytest.raises(UserError, match="checkpoint-12 holds step 9: rename it to checkpoint-9 or delete it"):
        train(recipe, stopped, resume=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("result.json", b"", r"result\.json is damaged \(no valid JSON\): delete it"),
        ("result.json", b"{", r"result\.json is damaged \(no valid JSON\): delete it"),
        ("result.json", b"{}", r"result\.json is damaged \(it describes no model\): delete it"),
        ("result.json", b'{"models": [{}]}', r"result\.json is damaged \(it describes no model\): delete it"),
        ("metrics.jsonl", b"garbage\n", r"metrics\.jsonl is damaged .*: move it away"),
        ("metrics.jsonl", b"\xff\xfe\n", r"metrics\.jsonl is damaged .*: move it away"),
        ("metrics.jsonl", b"[]\n", r"metrics\.jsonl is damaged .*: move it away"),
        ("metrics.jsonl", b'{"step": 1}\n', r"metrics\.jsonl is damaged .*: move it away"),
        ("metrics.jsonl", b'{"step": 1, "tokens": NaN}\n', r"metrics\.jsonl is damaged .*: move it away"),
        ("metrics.jsonl", None, r"metrics\.jsonl is damaged \(Is a directory\): move it away"),
        ("checkpoints", b"", "checkpoints is a file where .* belongs: move it away"),
        ("run.toml", b"", r"run\.toml is no longer the full recipe .*: copy .*checkpoint-9/run\.toml over it"),
        ("run.toml", b"[", r"run\.toml is not valid TOML"),
    ],
)
def test_damaged_side_files_are_one_line(
    recipe: Recipe, stopped: Path, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = stopped / name
    path.rename(tmp_path / "away") if path.exists() else None
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        train(recipe, stopped, resume=True)
    assert "\n" not in str(caught.value)


def test_the_remedies_work(recipe: Recipe, straight: bytes, stopped: Path) -> None:
    (stopped / "metrics.jsonl").unlink()
    (stopped / "run.toml").write_bytes((stopped / "checkpoints" / "checkpoint-9" / "run.toml").read_bytes())
    train(recipe, stopped, resume=True)
    assert (stopped / "model.safetensors").read_bytes() == straight
    (stopped / "result.json").unlink()
    assert train(recipe, stopped, resume=True)["models"][0]["tokens"] == 12 * 128
    assert (stopped / "model.safetensors").read_bytes() == straight


@pytest.mark.parametrize("state", ["stopped", "ended"])
def test_other_data_or_recipe_is_refused(
    recipe: Recipe, state: str, text: Path, request: pytest.FixtureRequest
) -> None:
    stopped: Path = request.getfixturevalue(state)
    with pytest.raises(UserError, match=r"another recipe .train.learning_rate differ"):
        train(recipe.replace("train", learning_rate=1e-4), stopped, resume=True)
    original = text.read_text()
    try:
        text.write_text(original.replace("foxes", "boxes"))
        with pytest.raises(UserError, match="the training data is not what"):
            train(recipe, stopped, resume=True)
    finally:
        text.write_text(original)
    file = stopped / "run.toml"
    file.write_text(file.read_text().replace("hidden_size = 16", "hidden_size = 32"))
    with pytest.raises(UserError, match=r"checkpoint-\d+ .model.hidden_size is 32, was 16.: undo that") as caught:
        train(load_recipe(file), stopped, resume=True)
    assert "\n" not in str(caught.value)


def test_the_logged_loss_is_a_mean_across_a_resume(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 5 to 8 are one line; the run stops at the checkpoint of step 6."""
    recipe = recipe.replace("train", log_every=4)
    original = LanguageModelTrainer.training_step

    def stopping(self: LanguageModelTrainer, *args: object) -> torch.Tensor:
        if self.state.global_step == 7:
            raise KeyboardInterrupt
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(LanguageModelTrainer, "training_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "stopped")
    train(recipe, tmp_path / "stopped", resume=True)
    train(recipe, tmp_path / "whole")
    stopped, whole = (
        [(row["step"], row["loss"]) for row in read_metrics(tmp_path / name / "metrics.jsonl") if "loss" in row]
        for name in ("stopped", "whole")
    )
    assert [step for step, _ in whole] == [4, 8, 12]
    assert stopped == whole


def test_nothing_to_resume_is_one_line(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no run to resume"):
        train(recipe, tmp_path / "absent", resume=True)


def test_finished_run_resumes_to_its_result(recipe: Recipe, tmp_path: Path) -> None:
    first = train(recipe, tmp_path / "run")
    before = digest(tmp_path / "run" / "model.safetensors")
    assert train(recipe, tmp_path / "run", resume=True) == first
    assert digest(tmp_path / "run" / "model.safetensors") == before


leaves = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4)
trees = st.recursive(
    leaves | st.integers(0, 5).map(lambda n: torch.arange(n, dtype=torch.float64) / 3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.integers() | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@settings(max_examples=60, deadline=None)
@given(trees)
def test_state_files_hold_any_tree(tmp_path_factory: pytest.TempPathFactory, tree: object) -> None:
    path = tmp_path_factory.mktemp("state") / "state"
    checkpoint.save_state(path, {"tree": tree})
    assert same(checkpoint.load_state(path), {"tree": tree})


def test_state_files_hold_arrays_and_refuse_objects(tmp_path: Path) -> None:
    state = np.random.get_state()
    checkpoint.save_state(tmp_path / "state", state)
    loaded = checkpoint.load_state(tmp_path / "state")
    assert loaded[0] == state[0]
    assert np.array_equal(loaded[1], state[1])
    assert loaded[1].dtype == state[1].dtype
    with pytest.raises(TypeError, match="a is a set"):
        checkpoint.save_state(tmp_path / "other", {"a": {1}})

"""The processes of torchrun train the model that one process trains, shared or sharded, and stop together."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.errors import UserError
from nestlearn.train import processes
from nestlearn.train.callbacks import read_metrics
from nestlearn.train.recipe import Recipe, dump
from nestlearn.train.run import train
from nestlearn.train.sharding import shard

COMMAND = ["-c", "from nestlearn.cli import main; main()", "train"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]


def two(out: Path, *options: str) -> list[str]:
    return [*TORCHRUN, sys.executable, *COMMAND, "--out", str(out), *options]


def assert_same(out: Path, expected: Path) -> None:
    ours, theirs = load_file(out / "model.safetensors"), load_file(expected / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], atol=2e-6, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    rows = zip(read_metrics(out / "metrics.jsonl"), read_metrics(expected / "metrics.jsonl"), strict=True)
    for row, alone in rows:
        assert row.keys() == alone.keys()
        for key in row.keys() - {"model", "tokens_per_second"}:
            assert row[key] == pytest.approx(alone[key], rel=1e-5), key


@pytest.mark.parametrize("online", [None, "local"])
def test_two_processes_train_what_one_does(online: str | None, hope_recipe: Recipe, tmp_path: Path) -> None:
    if online is not None:  # with a level that no sequence is long enough for
        hope_recipe = hope_recipe.replace("model", cms_online=online, cms_chunk_sizes=[8, 4096])
    recipe, alone, beside = tmp_path / "recipe.toml", tmp_path / "alone", tmp_path / "beside"
    recipe.write_text(dump(hope_recipe))
    train(hope_recipe, alone)
    found = subprocess.run(two(beside, "--config", str(recipe)), capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("run folder") == 1
    assert_same(beside, alone)
    assert_same(beside / "baseline", alone / "baseline")
    assert {path.name for path in beside.iterdir()} == {path.name for path in alone.iterdir()}


def test_a_model_that_learns_along_the_sequence_is_not_sharded() -> None:
    model = HopeForCausalLM(HopeConfig(hidden_size=16, num_hidden_layers=2, cms_chunk_sizes=[4], cms_online="local"))
    with pytest.raises(UserError, match=r"model\.layers\.0\.memory learns along the sequence \(cms_online\)"):
        shard(model)


def test_a_sharded_run_that_is_interrupted_goes_on_in_one_process_or_two(hope_recipe: Recipe, tmp_path: Path) -> None:
    # Most steps lie between two updates of the slow level, whose gathered gradients are then in the checkpoint.
    given = hope_recipe.replace("baseline", kind="none").replace("model", cms_chunk_sizes=[8, 5 * 128])
    given = given.replace("train", tokens=40 * 128, levelwise=True, optimizer="m3", learning_rate=0.02, sharded=True)
    recipe, alone, stopped = tmp_path / "recipe.toml", tmp_path / "alone", tmp_path / "stopped"
    recipe.write_text(dump(given))
    train(given, alone)

    process = subprocess.Popen(
        two(stopped, "--config", str(recipe)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if len(read_metrics(stopped / "metrics.jsonl")) >= 7:
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.01)
    _, errors = process.communicate()
    assert errors.count("interrupted: the last checkpoint is") == 1, errors
    assert not (stopped / "model.safetensors").exists()
    assert 7 <= len(read_metrics(stopped / "metrics.jsonl")) < 40
    shutil.copytree(stopped, tmp_path / "copy")
    train(given, tmp_path / "copy", resume=True)
    assert_same(tmp_path / "copy", alone)
    finished = subprocess.run(two(stopped, "--resume"), capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert_same(stopped, alone)


def test_a_batch_that_cannot_be_shared_is_one_line(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "join", lambda: SimpleNamespace(num_processes=3))
    with pytest.raises(UserError, match=r"train.batch_size is 2, which 3 processes cannot share equally: make it a"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()

"""What goes wrong in a run costs at most the steps since the last checkpoint, and is told in one line."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nestlearn.errors import UserError
from nestlearn.files import disk_errors, parse_json
from nestlearn.train import checkpoint
from nestlearn.train.callbacks import Interrupt, read_metrics
from nestlearn.train.evaluate import NotFinite
from nestlearn.train.recipe import Recipe, dump
from nestlearn.train.run import Interrupted, resume_command, train
from nestlearn.train.trainer import LanguageModelTrainer


def resumed(recipe: Recipe, out: Path) -> bytes:
    """The weights at the end of the run in ``out`` after it was resumed."""
    train(recipe, out, resume=True)
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize("writer", ["safetensors", "python"])
def test_full_disk_keeps_the_checkpoint_before(
    recipe: Recipe, straight: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    """The second checkpoint (step 6) runs out of space half-way."""
    calls = 0
    original = checkpoint.save_file if writer == "safetensors" else checkpoint._digest

    def full(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if "checkpoint-6" in str(args[-1]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file" if writer == "safetensors" else "_digest", full)
        with pytest.raises(UserError) as caught:
            train(recipe, out)
    assert calls > 1
    kept = out / "checkpoints" / "checkpoint-3"
    assert str(caught.value) == (
        f"the disk is full: the last checkpoint is {kept}; free some space and resume with: {resume_command(out)}"
    )
    checkpoint.verify(kept)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["checkpoint-3"]
    assert resumed(recipe, out) == straight


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 400 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("cannot mount a small file system here")
    yield folder
    # lazily: the tensors of a resumed run may still be mapped
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_really_full(recipe: Recipe, straight: bytes, small_disk: Path) -> None:
    """Whatever file it is that no longer fits, the run can go on once there is space."""
    out = small_disk / "run"
    resize(small_disk, "8k")
    with pytest.raises(UserError, match="the disk is full: there is no checkpoint yet"):
        train(recipe, out)
    for size in range(40, 460, 60):
        resize(small_disk, f"{size}k")
        with pytest.raises(UserError, match=r"the disk is full: .* free some space and resume with") as caught:
            train(recipe, out, resume=True)
        assert "\n" not in str(caught.value)
        for path in checkpoint.list_checkpoints(out / "checkpoints"):
            checkpoint.verify(path)
    assert checkpoint.list_checkpoints(out / "checkpoints")
    resize(small_disk, "8m")
    assert resumed(recipe, out) == straight


def resize(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def test_a_disk_that_became_read_only(recipe: Recipe, small_disk: Path) -> None:
    out = small_disk / "run"
    resize(small_disk, "300k")
    with pytest.raises(UserError, match="the disk is full"):
        train(recipe, out)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(UserError) as caught:
        train(recipe, out, resume=True)
    assert str(caught.value).startswith(f"cannot write to {out} (Read-only file system): the")
    assert str(caught.value).endswith(f"; put that right and resume with: {resume_command(out)}")


def test_safetensors_tells_of_a_full_disk_as_python_does(small_disk: Path) -> None:
    with pytest.raises(OSError, match="No space left") as caught, disk_errors():
        save_file({"x": torch.zeros(10**6)}, small_disk / "x.safetensors")
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("code", [errno.EIO, errno.EFBIG, errno.ENOENT, errno.EROFS, errno.EACCES])
def test_other_file_errors_are_one_line_and_no_full_disk(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def broken(*args: Any) -> None:
        raise OSError(code, os.strerror(code))

    out = tmp_path / "run"
    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(UserError) as caught:
        train(recipe, out)
    assert str(caught.value) == (
        f"cannot write to {out} ({os.strerror(code)}): there is no checkpoint yet; "
        f"put that right and resume with: {resume_command(out)}"
    )


@pytest.mark.parametrize("out", ["/proc/foo", "a" * 300, "/dev/null/run"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_cannot_be_is_one_line(recipe: Recipe, out: str, resume: bool) -> None:
    with pytest.raises(UserError, match=r"give another folder with --out|holds no run to resume") as caught:
        train(recipe, out, resume=resume)
    assert "\n" not in str(caught.value)


def test_a_broken_pipe_is_no_file_error(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise BrokenPipeError(errno.EPIPE, "nobody reads")

    monkeypatch.setattr("nestlearn.train.callbacks.Progress.on_log", broken)
    with pytest.raises(BrokenPipeError):
        train(recipe, tmp_path / "run")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_the_run(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, where: str
) -> None:
    original = LanguageModelTrainer.compute_loss

    def spoiled(self: LanguageModelTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        if self.state.global_step == 7:
            if where == "loss":
                return loss * value
            parameter = next(self.model.parameters())
            parameter.register_hook(lambda gradient: gradient * value)
        return loss

    monkeypatch.setattr(LanguageModelTrainer, "compute_loss", spoiled)
    out = tmp_path / "run"
    with pytest.raises(UserError) as caught:
        train(recipe, out)
    kept = out / "checkpoints" / "checkpoint-6"
    text = str(caught.value)
    assert f"the {where} became" in text
    assert f"at step 8 of 12: the last checkpoint is {kept}; start again with a lower learning rate" in text
    checkpoint.verify(kept)
    assert all(torch.isfinite(tensor).all() for tensor in load_file(kept / "model.safetensors").values())
    assert not (out / "model.safetensors").exists()


def spoil(model: torch.nn.Module) -> None:
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = float("nan")


@pytest.mark.parametrize(
    ("when", "message", "kept"),
    [
        ("step 6", "the weights became NaN or infinite (model.embed_tokens.weight) at step 6", 3),
        ("step 12", "the validation loss became nan at step 12", 9),
        ("evaluation", "the validation loss became inf at step 4", 3),
        ("end", "the weights became NaN or infinite (model.embed_tokens.weight) at step 12", 12),
        ("result", "the validation loss became infinite or too large at step 12", 12),
    ],
)
def test_what_is_not_finite_is_never_written(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str, message: str, kept: int
) -> None:
    after_step, loss = LanguageModelTrainer._maybe_log_save_evaluate, LanguageModelTrainer.compute_loss
    whole = LanguageModelTrainer.train

    def spoiled_step(self: LanguageModelTrainer, *args: Any, **kwargs: Any) -> None:
        if when == f"step {self.state.global_step}":
            spoil(self.model)
        after_step(self, *args, **kwargs)

    def spoiled_loss(self: LanguageModelTrainer, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        value = loss(self, model, *args, **kwargs)
        if when != "evaluation" or model.training:
            return value
        return (value[0] * float("inf"), *value[1:]) if isinstance(value, tuple) else value * float("inf")

    def spoiled_end(self: LanguageModelTrainer, *args: Any, **kwargs: Any) -> None:
        whole(self, *args, **kwargs)
        if when == "end":
            spoil(self.model)

    def spoiled_result(*args: Any, **kwargs: Any) -> Any:
        raise NotFinite("the loss of token 3 is not finite")

    monkeypatch.setattr(LanguageModelTrainer, "_maybe_log_save_evaluate", spoiled_step)
    monkeypatch.setattr(LanguageModelTrainer, "compute_loss", spoiled_loss)
    monkeypatch.setattr(LanguageModelTrainer, "train", spoiled_end)
    if when == "result":
        monkeypatch.setattr("nestlearn.train.run.evaluate_text", spoiled_result)
    out = tmp_path / "run"
    with pytest.raises(UserError) as caught:
        train(recipe, out)
    newest = out / "checkpoints" / f"checkpoint-{kept}"
    assert str(caught.value) == (
        f"{message} of 12: the last checkpoint is {newest}; start again with a lower learning rate"
    )
    for path in checkpoint.list_checkpoints(out / "checkpoints"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(path / "model.safetensors").values())
    assert not (out / "model.safetensors").exists()
    for line in (out / "metrics.jsonl").read_text().splitlines():
        parse_json(line)  # which refuses NaN


def test_a_baseline_that_diverges_leaves_the_model(
    hope_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LanguageModelTrainer.compute_loss

    def spoiled(self: LanguageModelTrainer, model: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, model, *args, **kwargs)
        return loss * float("nan") if type(model).__name__ == "LlamaForCausalLM" else loss

    monkeypatch.setattr(LanguageModelTrainer, "compute_loss", spoiled)
    out = tmp_path / "run"
    with pytest.raises(UserError) as caught:
        train(hope_recipe, out)
    assert str(caught.value) == (
        "the baseline transformer++ diverged: the loss became nan at step 1 of 12: there is no checkpoint yet; "
        f"the model hope is finished, in {out}; for both start again with a lower baseline.learning_rate"
    )
    assert (out / "model.safetensors").is_file()
    assert "diverged" not in json.loads((out / "result.json").read_text())["models"][0]
    (entry,) = json.loads((out / "baseline" / "result.json").read_text())["models"]
    assert (entry["model"], entry["diverged"]["step"]) == ("transformer++", 1)


@pytest.mark.parametrize("step", [1, 8])
def test_a_run_that_diverged_says_so_in_its_result_and_is_no_finished_one(
    recipe: Recipe, straight: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    original = LanguageModelTrainer.compute_loss

    def spoiled(self: LanguageModelTrainer, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == step - 1 else loss

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModelTrainer, "compute_loss", spoiled)
        for resume in (False, True):
            with pytest.raises(UserError, match=rf"the loss became nan at step {step} of 12"):
                train(recipe, out, resume)
            (entry,) = json.loads((out / "result.json").read_text())["models"]
            assert (entry["model"], entry["steps"]) == ("transformer++", 12)
            assert entry["diverged"]["reason"] == f"the loss became nan at step {step}"
            assert entry["diverged"]["step"] == step
            last = [(row["step"], "loss" in row) for row in entry["diverged"]["last"]]
            assert last == ([] if step == 1 else [(5, True), (6, True), (7, True), (4, False)])
    with monkeypatch.context() as patch:
        patch.setattr("nestlearn.train.run.read_data", interrupted)
        with pytest.raises(Interrupted, match="checkpoint-6" if step == 8 else "there is no checkpoint yet"):
            train(recipe, out, resume=True)
    assert resumed(recipe, out) == straight
    assert "validation" in json.loads((out / "result.json").read_text())["models"][0]


def test_an_absurd_learning_rate_is_caught(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"became (nan|inf) at step \d+ of 12"):
        train(recipe.replace("train", learning_rate=1e30, max_grad_norm=0.0, warmup=0.0), tmp_path / "run")


def test_interrupt_saves_and_says_how_to_resume(
    recipe: Recipe,
    straight: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    original = LanguageModelTrainer.training_step

    def interrupting(self: LanguageModelTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    out = tmp_path / "a run"
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        patch.setattr(LanguageModelTrainer, "training_step", interrupting)
        patch.setattr(Interrupt, "_handle", _once(Interrupt._handle))  # two micro-batches, one signal
        with pytest.raises(Interrupted) as caught:
            train(recipe, out)
    assert signal.getsignal(signal.SIGINT) is handler
    kept = out / "checkpoints" / "checkpoint-5"
    assert str(caught.value) == (
        f"interrupted: the last checkpoint is {kept}; resume with: nestlearn train --resume --out '{out}'"
    )
    assert "stopping after this step" in capsys.readouterr().err
    assert resumed(recipe, out) == straight


def _once(handle: Any) -> Any:
    def handler(self: Interrupt, *args: Any) -> None:
        if not self.requested:
            handle(self, *args)

    return handler


def test_interrupt_before_the_first_step(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nestlearn.train.run.read_data", interrupted)
    with pytest.raises(Interrupted, match=r"^interrupted before the first step: nothing was saved$"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_second_interrupt_stops_at_once() -> None:
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_on_the_command_line(recipe: Recipe, tmp_path: Path) -> None:
    recipe = recipe.replace("train", tokens=10**6)
    file, out = tmp_path / "recipe.toml", tmp_path / "run"
    file.write_text(dump(recipe))
    command = [sys.executable, "-c", "from nestlearn.cli import main; main()", "train"]
    process = subprocess.Popen(
        [*command, "--config", str(file), "--out", str(out)], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not read_metrics(out / "metrics.jsonl") and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert output == ""
    assert errors.rstrip().endswith(f"resume with: nestlearn train --resume --out {out}")
    assert "Traceback" not in errors
    newest = checkpoint.list_checkpoints(out / "checkpoints")[-1]
    assert checkpoint.step_of(newest) == read_metrics(out / "metrics.jsonl")[-1]["step"]

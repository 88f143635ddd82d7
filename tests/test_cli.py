"""The command line: what it prints, where, and with which exit code."""

import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nestlearn import cli
from nestlearn.tasks.plan import Plan
from nestlearn.train.recipe import BaselineRecipe, DataRecipe, ModelRecipe, Recipe, TrainRecipe, dump, load_recipe


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``nestlearn WORDS``, in this process."""
    monkeypatch.setattr(sys, "argv", ["nestlearn", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert isinstance(stop.value.code, int)
    out, err = capsys.readouterr()
    return stop.value.code, out, err


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with corpus.txt and recipe.toml, which trains a Hope model and a baseline in a second."""
    folder = tmp_path_factory.mktemp("workplace")
    (folder / "corpus.txt").write_text("".join(f"line {i} has {i * i % 97} foxes\n" for i in range(200)))
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=96)
    recipe = Recipe(
        data=DataRecipe("corpus.txt", sequence_length=32),
        model=ModelRecipe("hope", sizes | {"chunk_size": 8, "cms_chunk_sizes": [8, 32]}),
        train=TrainRecipe(tokens=6 * 64, batch_size=2, log_every=2, eval_tokens=64, final_eval_tokens=200),
        baseline=BaselineRecipe("transformer++"),
    )
    (folder / "recipe.toml").write_text(dump(recipe))
    return folder


@pytest.fixture(scope="module")
def trained(workplace: Path) -> Path:
    from nestlearn.train.run import train

    recipe = load_recipe(workplace / "recipe.toml").replace("data", source=str(workplace / "corpus.txt"))
    train(recipe, workplace / "trained")
    return workplace / "trained"


def test_help_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from nestlearn import cli; sys.argv = ['nestlearn', 'train', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'transformers', 'numpy', 'datasets', 'matplotlib'} & set(sys.modules)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr
    assert "--preset" in finished.stdout


@pytest.mark.parametrize("command", [[], ["train"], ["eval"], ["generate"], ["learn"], ["chat"], ["bench"]])
def test_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    code, out, err = run(capsys, monkeypatch, *command, "--help")
    assert (code, err) == (0, "")
    assert "Usage: nestlearn" in out
    assert "--help" in out
    if command:
        assert "--json" in out
        assert "Example: nestlearn" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?"),
        (["train", "--presett", "tiny"], "No such option: --presett"),
        (["train", "--preset", "tyni"], "unknown preset 'tyni'; did you mean 'tiny'? (allowed: tiny)"),
        (["train", "--preset", "tiny", "--config", "x"], "--preset and --config are two recipes"),
        (["train"], "no recipe: give --preset tiny or --config FILE"),
        (["train", "--resume", "--out", "absent"], "absent holds no run to resume"),
        (["train", "--seed", "x", "--preset", "tiny"], "Invalid value for '--seed'"),
        (["train", "--preset", "tiny", "--tokens", "-5"], "train.tokens in recipe must be at least 1, got -5"),
        (["train", "--config", "absent.toml"], "cannot read the recipe absent.toml: No such file or directory"),
        (["train", "--preset", "tiny", "--data", "absent.txt"], "absent.txt"),
        (["eval", "absent", "--data", "stdlib"], "no model folder 'absent'"),
        (["eval", "absent"], "Missing option '--data'"),
        (["eval", "absent", "--data", "absent.txt"], "absent.txt"),
        (["eval"], "nothing to evaluate: give MODEL and --data, or --suite core"),
        (["eval", "absent", "--suite", "core"], "MODEL is not for --suite: leave one of them out"),
        (["eval", "--suite", "core", "--context", "5"], "--context is not for --suite"),
        (["eval", "--suite", "core", "--carry-state"], "--carry-state is not for --suite"),
        (["eval", "absent", "--data", "stdlib", "--scale", "cpu"], "--scale is for --suite, not for a model"),
        (["eval", "absent", "--data", "stdlib", "--workers", "1"], "--workers is for --suite, not for a model"),
        (["eval", "--suite", "cor"], "unknown suite 'cor'; did you mean 'core'? (allowed: continual, core)"),
        (["eval", "--suite", "core", "--scale", "tpu"], "unknown scale 'tpu'; did you mean 'gpu'?"),
        (["eval", "--suite", "core", "--only", "formal,mda"], "unknown task 'mda'"),
        (["eval", "--suite", "core", "--workers", "0"], "--workers is the number of processes, 1 or more, got 0"),
        (["generate", "absent", "--prompt", "x"], "no model folder 'absent'"),
        (["generate", "~nosuchuser/x", "--prompt", "x"], "model folder '~nosuchuser/x' cannot be looked up"),
        (["pull", "smollm2", "--to", "~nosuchuser/x"], "folder '~nosuchuser/x' cannot be looked up"),
        (["generate"], "Missing argument 'model'"),
        (["eval", "--suite", "core", "--data", "absent"], "no folder 'absent' of data: give one with --data"),
        (["bench"], "Missing argument 'suite'"),
        (["bench", "optm"], "unknown suite 'optm'; did you mean 'optim'? (allowed: optim, speed)"),
        (["bench", "optim", "--only", "curvature,visoin"], "unknown experiment 'visoin'; did you mean 'vision'?"),
        (["bench", "optim", "--only", ""], "unknown experiment ''; allowed: curvature"),
        (["bench", "optim", "--scale", "gpu"], "unknown scale 'gpu'; did you mean 'cpu'? (allowed: cpu, smoke)"),
        (["bench", "optim", "--workers", "0"], "--workers is the number of processes, 1 or more, got 0"),
        (["bench", "optim", "--only", "vision", "--data", "absent"], "absent"),
        (["bench", "optim", "--scale", "smoke", "--out", __file__], "test_cli.py is a file: give a folder with --out"),
    ],
)
def test_mistakes_are_one_line_and_code_2(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, monkeypatch, *words)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_train_prints_a_table_a_sample_and_the_folder(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, workplace: Path
) -> None:
    monkeypatch.chdir(workplace)
    for number in (1, 2):  # a second run never touches the first
        code, out, _ = run(capsys, monkeypatch, "train", "--config", "recipe.toml")
        assert code == 0
        assert (workplace / "runs" / f"recipe-{number}" / "model.safetensors").is_file()
        assert out.rstrip().endswith(f"run folder: runs/recipe-{number}")
    for word in ("hope", "transformer++", "perplexity", "bits/byte", "tokens/s", "parameters", "sample of hope"):
        assert word in out
    first, second = (workplace / "runs" / f"recipe-{n}" / "model.safetensors" for n in (1, 2))
    assert first.read_bytes() == second.read_bytes()
    code, again, _ = run(capsys, monkeypatch, "train", "--config", "recipe.toml", "--resume")
    assert (code, again) == (0, out)


def test_train_options_change_the_recipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, workplace: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("other words\n" * 200)
    out_folder, file = str(tmp_path / "run"), str(workplace / "recipe.toml")
    words = ["--config", file, "--data", str(other), "--out", out_folder, "--seed", "7", "--tokens", "128", "--json"]
    code, out, err = run(capsys, monkeypatch, "train", *words)
    assert code == 0
    result = json.loads(out)
    assert out.count("\n") == 1
    assert "hope:" in err
    assert result["folder"] == out_folder
    assert [entry["steps"] for entry in result["models"]] == [2, 2]
    recipe = load_recipe(tmp_path / "run" / "run.toml")
    assert (recipe.seed, recipe.train.tokens, recipe.data.source) == (7, 128, str(other))
    code, out, err = run(capsys, monkeypatch, "train", *words)
    assert code == 2
    assert "is not empty: add --resume" in err


def test_eval(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, trained: Path) -> None:
    data = str(trained.parent / "corpus.txt")
    code, out, err = run(capsys, monkeypatch, "eval", str(trained), "--data", data, "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["context_length"] == result["stride"] == 32  # the training length
    assert result["bytes"] == Path(data).stat().st_size
    assert 1 < result["perplexity"] < 400
    code, out, _ = run(capsys, monkeypatch, "eval", str(trained), "--data", data, "--context", "16", "--stride", "8")
    assert "windows of 16 tokens every 8" in out
    assert "bits per byte" in out
    code, out, _ = run(capsys, monkeypatch, "eval", str(trained), "--data", data, "--carry-state", "--json")
    assert code == 0
    assert json.loads(out)["carry_state"]
    baseline = str(trained / "baseline")
    code, out, err = run(capsys, monkeypatch, "eval", baseline, "--data", data, "--carry-state")
    assert (code, out) == (2, "")
    assert "state has a constant size" in err


def test_eval_of_a_model_that_does_not_say_how_much_it_reads(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, trained: Path, tmp_path: Path
) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    from nestlearn.data import load_tokenizer

    BloomForCausalLM(BloomConfig(vocab_size=258, hidden_size=8, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    load_tokenizer("bytes").save_pretrained(tmp_path)
    words = ["eval", str(tmp_path), "--data", str(trained.parent / "corpus.txt")]
    code, _, err = run(capsys, monkeypatch, *words)
    assert (code, err.partition(": give")[2]) == (2, " --context N\n")
    code, out, _ = run(capsys, monkeypatch, *words, "--context", "16")
    assert code == 0
    assert "windows of 16 tokens" in out


def test_generate(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, trained: Path) -> None:
    words = ["generate", str(trained), "--prompt", "line 1", "--max-new-tokens", "20", "--seed", "5"]
    code, out, err = run(capsys, monkeypatch, *words)
    assert (code, err) == (0, "")
    assert out.startswith("line 1")
    code, as_json, _ = run(capsys, monkeypatch, *words, "--json")
    result = json.loads(as_json)
    assert result["prompt"] + result["text"] + "\n" == out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"line 1")))
    code, piped, _ = run(capsys, monkeypatch, *words[:2], "--prompt", "-", *words[4:])
    assert piped == out


def test_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run(capsys, monkeypatch, "--version")
    assert (code, err) == (0, "")
    assert re.fullmatch(r"nestlearn \d+\.\d+\.\d+\n", out)


def test_ctrl_c_is_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, trained: Path) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nestlearn.train.loading.load_model", interrupted)
    code, _, err = run(capsys, monkeypatch, "generate", str(trained), "--prompt", "x")
    assert code == 130
    assert err.strip() == "interrupted"


def test_ctrl_c_before_training(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nestlearn.train.run.train", interrupted)
    code, out, err = run(capsys, monkeypatch, "train", "--preset", "tiny", "--out", str(tmp_path / "run"))
    assert (code, out) == (130, "")
    assert err == "interrupted before the first step: nothing was saved\n"


def test_bench(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NESTLEARN_DATA", raising=False)
    words = ["bench", "optim", "--only", "curvature, vision", "--scale", "smoke", "--workers", "1"]
    code, out, err = run(capsys, monkeypatch, *words)
    assert code == 0
    assert "curvature: 100%" in err
    assert "281* (1/2), lr 0.032, momentum 0.9" in out
    assert "mnist was not run: no data" in out
    assert out.rstrip().endswith("report: runs/bench-optim-smoke/report.md")
    code, again, err = run(capsys, monkeypatch, *words)
    assert (code, again, err) == (0, out, "")
    code, as_json, _ = run(capsys, monkeypatch, *words, "--json")
    result = json.loads(as_json)
    assert as_json.count("\n") == 1
    assert result["folder"] == "runs/bench-optim-smoke"
    assert result["experiments"]["curvature"]["landscapes"]["k1-a1-w4"]["momentum"]["steps"] == 281
    assert (tmp_path / "runs" / "bench-optim-smoke" / "curvature.png").is_file()
    monkeypatch.setenv("NESTLEARN_DATA", str(tmp_path / "absent"))
    code, out, err = run(capsys, monkeypatch, "bench", "optim", "--only", "vision", "--scale", "smoke")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "absent" in err


def test_eval_suite(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from nestlearn.tasks.core import formal

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(formal, "ROWS", {"lstm": ("lstm", {}), "hope, chunk 4": ("hope", {"chunk_size": 4})})
    words = ["eval", "--suite", "core", "--only", "formal", "--scale", "smoke", "--workers", "1"]
    code, out, err = run(capsys, monkeypatch, *words)
    assert code == 0
    assert "formal, learning rates: 100%" in err
    assert out.split() == ["report:", *(f"runs/eval-core-smoke/report/report.{end}" for end in ("md", "html"))]
    assert "(aa)*" in (tmp_path / "runs" / "eval-core-smoke" / "report" / "report.html").read_text()
    code, as_json, err = run(capsys, monkeypatch, *words, "--json")
    result = json.loads(as_json)
    assert (code, err, as_json.count("\n")) == (0, "", 1)
    assert result["tasks"]["formal"]["Parity"]["hope, chunk 4"]["state"] == "finished"


def test_eval_suite_says_what_was_not_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from nestlearn.tasks.core import forgetting, formal

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NESTLEARN_DATA", raising=False)
    monkeypatch.setattr(formal, "ROWS", {"lstm": ("lstm", {})})
    words = ["eval", "--suite", "core", "--scale", "smoke", "--workers", "1", "--only"]
    count = len(forgetting.ROWS)
    line = f"forgetting: {count} of {count} rows not run (no data: give --data DIR with wikitext2/)\n"
    for more in ([], ["--json"]):
        code, out, err = run(capsys, monkeypatch, *words, "forgetting", *more)
        assert (code, out, err) == (2, "", f"error: nothing could be run: {line}")
    code, out, err = run(capsys, monkeypatch, *words, "formal,forgetting")
    assert code == 0
    assert out.startswith("report: ")
    assert err.endswith(line)
    monkeypatch.setattr(formal, "plan", _without_data(formal.plan))
    code, out, err = run(capsys, monkeypatch, *words, "formal")  # what is kept counts, and the report is made of it
    assert (code, err) == (0, "")
    assert out.startswith("report: ")


def _without_data(plan: Callable[..., Plan]) -> Callable[..., Plan]:
    def lacking(*args: Any) -> Plan:
        whole = plan(*args)
        return replace(whole, rows=[replace(row, reason="no data") for row in whole.rows])

    return lacking


@pytest.mark.parametrize("command", ["eval", "generate", "levels"])
def test_help_says_which_models(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = run(capsys, monkeypatch, command, "--help")
    assert "A run folder, a folder of save_pretrained or of nestlearn convert" in " ".join(
        out.replace("│", " ").split()
    )


@pytest.mark.parametrize("command", ["bench optim", "eval --suite core"])
@pytest.mark.parametrize("message", ["interrupted: 1 of 2 cells are kept", ""])
def test_ctrl_c_in_a_suite_is_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, message: str, command: str
) -> None:
    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt(*filter(None, [message]))

    monkeypatch.setattr(f"nestlearn.tasks.{command.split()[-1]}.run", interrupted)
    code, out, err = run(capsys, monkeypatch, *command.split(), "--out", str(tmp_path))
    assert (code, out, err) == (130, "", f"{message or 'interrupted'}\n")


NESTLEARN = f"{sys.executable} -c 'from nestlearn.cli import main; main()'"


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (f"{NESTLEARN} --help >/dev/full", 2, "error: cannot write the output: No space left on device\n"),
        (f"{NESTLEARN} --help >&-", 0, ""),
        (f"{NESTLEARN} --help 2>&-", 0, ""),
        (f"{NESTLEARN} generate absent --prompt - <&-", 2, "error: --prompt - reads standard input, which is closed"),
        (
            f"printf 'a\\377' | {NESTLEARN} generate absent --prompt -",
            2,
            "error: standard input is not UTF-8 text (byte 1)",
        ),
        (f"{NESTLEARN} train --resume --out {'a' * 300}", 2, f"error: {'a' * 300}/run.toml: File name too long\n"),
        (f"{NESTLEARN} train --preset tiny --out {'a' * 300}", 2, f"error: cannot write to {'a' * 300} (File name too"),
        (NESTLEARN, 2, ""),
    ],
)
def test_streams_and_files_that_fail_are_one_line(tmp_path: Path, command: str, code: int, message: str) -> None:
    finished = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert finished.returncode == code, finished.stderr
    assert finished.stderr.startswith(message)
    assert finished.stderr.count("\n") == bool(message)
    assert list(tmp_path.iterdir()) == []


def test_a_closed_pipe_ends_quietly_and_any_character_is_printed() -> None:
    code = (
        "import sys; from nestlearn import cli\n"
        "cli.app = lambda **_: print('\\u65e5' * int(sys.argv[1]), end='')\n"
        "cli.main()"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", code]
    finished = subprocess.run([*command, "3"], capture_output=True, text=True, env=environment)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "???", "")
    process = subprocess.Popen([*command, "9"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait() == 141


def test_levels_of_a_preset_a_recipe_and_a_folder(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, trained: Path, tmp_path: Path
) -> None:
    code, out, err = run(capsys, monkeypatch, "levels", "tiny")
    assert (code, err) == (0, "")
    assert out.startswith("HopeForCausalLM: 1,005,152 parameters, 3 levels; optimizer: AdamW\n")
    assert max(map(len, out.splitlines())) <= 140
    picture = tmp_path / "levels.png"
    recipe = str(trained.parent / "recipe.toml")
    code, out, _ = run(capsys, monkeypatch, "levels", recipe, "--optimizer", "m3", "--picture", str(picture), "--json")
    assert code == 0
    assert out.count("\n") == 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    of_recipe = json.loads(out)
    assert (of_recipe["optimizer"], of_recipe["tokens_per_step"]) == ("M3", 64)
    code, out, _ = run(capsys, monkeypatch, "levels", str(trained), "--json")
    of_run = json.loads(out)
    assert code == 0
    assert (of_run["optimizer"], of_run["parameters"]) == ("AdamW", of_recipe["parameters"])
    code, out, _ = run(capsys, monkeypatch, "levels", str(trained / "baseline"), "--json")
    assert json.loads(out)["model"] == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["levels"], "Missing argument 'model'"),
        (["levels", "tinny"], "no model folder or recipe file 'tinny', and no preset of this name; did you mean 'tiny"),
        (["levels", "absent.toml"], "cannot read the recipe absent.toml: No such file or directory"),
        (["levels", "."], "is no model folder: it has no config.json"),
        (["levels", "tiny", "--optimizer", "adamm"], "unknown optimizer 'adamm'; did you mean 'adamw'?"),
        (["levels", "tiny", "--picture", "levels.pgn"], "levels.pgn, whose ending is '.pgn'; did you mean 'png'"),
    ],
)
def test_mistakes_in_levels(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, monkeypatch, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert list(tmp_path.iterdir()) == []

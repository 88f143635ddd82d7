"""``nestlearn learn`` and ``nestlearn chat``: what they print, keep and say, and that a kill costs nothing."""

from __future__ import annotations

import io
import json
import multiprocessing
import multiprocessing.process
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from nestlearn import cli
from nestlearn.convert import ContinualModel
from nestlearn.learner import ContinualLearner, ReadReport
from nestlearn.learner.store import Store
from tests.learner.conftest import words
from tests.learner.test_learner import same

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def place(tmp_path: Path, model: ContinualModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A folder with a base model, a converted one and two texts."""
    model.base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model.base.config.name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text(words(100))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": words(9, seed)}) + "\n" for seed in range(9)))
    return tmp_path


@pytest.fixture
def run(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Exit code, stdout and stderr of ``nestlearn WORDS`` with some standard input."""
    monkeypatch.chdir(place)

    def call(*given: str, stdin: str | bytes | None = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["nestlearn", *given])
        raw = stdin.encode() if isinstance(stdin, str) else stdin
        text = None if raw is None else io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8")
        monkeypatch.setattr(sys, "stdin", text)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert isinstance(stop.value.code, int)
        return (stop.value.code, *capsys.readouterr())

    return call


def test_what_was_read_is_kept_named_and_not_read_again(run: Run, place: Path) -> None:
    code, out, err = run("learn", "model", "--store", "memory", "a.txt", "b.jsonl", "--name", "first")
    assert (code, err) == (0, "")
    assert out.startswith(f"a.txt: read {len(words(100))} tokens, loss ")
    assert "level 0: " in out
    assert out.endswith("kept in memory as first\n")
    assert sorted(Store(place / "memory").names) == ["first"]
    before = Store(place / "memory").head()
    code, out, err = run("learn", "model", "--store", "memory", "a.txt", "b.jsonl")
    tokens = sum(len(words(9, seed)) for seed in range(9)) + 8
    assert out == (
        f"a.txt: nothing new, {len(words(100))} tokens were read before\n"
        f"b.jsonl: nothing new, {tokens} tokens were read before\nnothing was learned\n"
    )
    assert Store(place / "memory").head() == before
    (place / "a.txt").write_text(words(100) + " and more")
    code, out, _ = run("learn", "model", "--store", "memory", "a.txt", "--json")
    result = json.loads(out)
    assert (result["reads"][0]["tokens"], result["reads"][0]["resumed"]) == (9, len(words(100)))
    assert result["snapshot"] == Store(place / "memory").head().id  # type: ignore[union-attr]
    (place / "a.txt").write_text("another " + words(100))
    code, out, err = run("learn", "model", "--store", "memory", "a.txt")
    assert (code, out) == (2, "")
    assert "a.txt has changed since it was read" in err
    assert err.count("\n") == 1
    code, out, _ = run("learn", "model", "--store", "memory", "a.txt", "--again", "--json")
    assert json.loads(out)["reads"][0]["tokens"] == len("another " + words(100))


def test_standard_input_is_new_each_time_and_a_plain_model_gets_the_default_levels(run: Run, place: Path) -> None:
    for text in ("My cat is called Schrödinger.", "And my dog is called Pavlov."):
        code, out, err = run("learn", "base", "--store", "memory", "-", "--json", stdin=text)
        assert (code, err) == (0, "")
        assert json.loads(out)["reads"][0]["tokens"] == len(text.encode())
    assert [level["period"] for level in Store(place / "memory").head().meta["config"]["levels"]] == [512, 1024, 2048]


@pytest.mark.parametrize("source", ["a.txt", "-"])
def test_a_dry_run_shows_what_would_be_learned_and_keeps_nothing(run: Run, place: Path, source: str) -> None:
    (place / "probe.txt").write_text(words(30, seed=5))
    options = ["learn", "model", "--store", "memory", source, "--dry-run", "--probe", "probe.txt"]
    code, out, err = run(*options, "--json", stdin=words(100))
    assert (code, err) == (0, "")
    read = json.loads(out)["reads"][0]
    assert read["after"] < read["before"]
    assert read["probe_after"] < read["probe_before"]
    assert not (place / "memory").exists()
    code, out, _ = run(*options, stdin=words(100))
    assert f"loss on it {read['before']:.3f} before, {read['after']:.3f} after" in out
    assert out.endswith("a dry run: memory is as it was\n")


def test_a_branch_that_another_has_moved_is_said(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def meanwhile(self: ContinualLearner, text: object, **options: object) -> ReadReport:
        Store(self.store.folder, self.store.base).save({}, {})  # type: ignore[union-attr]
        return read(self, text, **options)  # type: ignore[arg-type]

    read = ContinualLearner.read
    monkeypatch.setattr(ContinualLearner, "read", meanwhile)
    code, out, _ = run("learn", "model", "--store", "memory", "a.txt", "--name", "mine")
    assert code == 0
    assert out.endswith("kept in memory as mine on the new branch main-2, as main was moved by another process\n")


def test_a_probe_stops_learning(run: Run, place: Path) -> None:
    (place / "probe.txt").write_text(" ".join(str(n * n) for n in range(99)))
    (place / "a.txt").write_text(words(400))
    code, out, _ = run(
        "learn", "model", "--store", "memory", "a.txt", "b.jsonl", "--probe", "probe.txt", "--limit", "1.02"
    )
    assert code == 0
    assert "stopped: the perplexity of the probe is" in out
    assert "b.jsonl" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model", "--store", "memory"], "nothing to learn from: give files, or - for standard input"),
        (["model", "--store", "memory", "a.txt", "a.txt"], "a file is given twice"),
        (["model", "--store", "memory", "c.txt"], "no file 'c.txt'"),
        (["nothing", "--store", "memory", "a.txt"], "no model folder 'nothing'"),
        (["model", "a.txt"], "Missing option '--store'"),
        (["model", "--store", "a.txt", "b.jsonl"], "a.txt is a file"),
        (["model", "--store", "memory", "a.txt", "--name", "head"], "'head' always means the newest snapshot"),
        (["model", "--store", "memory", "a.txt", "--branch", "other"], "no branch 'other'"),
        (["model", "--store", "memory", "a.txt", "--probe", "c.txt"], "cannot read c.txt"),
        (["model", "--store", "memory", "a.txt", "--autosave", "0"], "error: --autosave 0: give the tokens"),
        (["model", "--store", "memory", "a.txt", "--context", "-1"], "error: --context -1: it must be 0 or more"),
        (["model", "--store", "memory", "a.txt", "--limit", "2"], "--limit 2 is that of a probe"),
        (["model", "--store", "memory", "base"], "base is a folder"),
    ],
)
def test_a_mistake_is_one_line(run: Run, place: Path, words: list[str], message: str) -> None:
    code, out, err = run("learn", *words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (place / "memory").exists()


def test_what_is_refused_leaves_no_new_store(run: Run, place: Path) -> None:
    (place / "bad.txt").write_bytes(b"some words " * 9 + b"\xff")
    (place / "empty").mkdir()
    before = sorted(place.rglob("*"))
    for given in (
        ["learn", "model", "--store", "memory", "bad.txt"],
        ["learn", "model", "--store", "new/memory", "bad.txt"],
        ["learn", "model", "--store", "empty", "bad.txt"],
        ["learn", "model", "--store", "memory", "-"],
        ["chat", "model", "--store", "memory", "--top-p", "2"],
        ["chat", "model", "--store", "memory", "--branch", "other"],
    ):
        assert run(*given)[0] == 2
        assert sorted(place.rglob("*")) == before
    assert run("learn", "model", "--store", "empty", "a.txt", "--dry-run")[0] == 0
    assert sorted(place.rglob("*")) == before
    assert run("learn", "model", "--store", "memory", "a.txt", "bad.txt")[0] == 2  # after one that was learned
    assert len(Store(place / "memory").log()) == 1


def test_what_is_refused_leaves_what_was_there(run: Run, place: Path) -> None:
    (place / "other" / "objects").mkdir(parents=True)
    (place / "other" / "config").write_text("mine")
    (place / "other" / "objects" / "mine").write_text("mine")
    Store(place / "memory", base="other")
    before = sorted(place.rglob("*"))
    for store in ("other", "memory"):
        assert run("learn", "model", "--store", store, "a.txt")[0] == 2
    assert [path for path in sorted(place.rglob("*")) if path.parent.name != "leases"] == [
        path for path in before if path.parent.name != "leases"
    ]


# Children of a server that has loaded what they need: a kill costs no start of torch.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.learner.test_commands", "transformers.models.llama.modeling_llama"])


def child(place: Path, given: list[str]) -> None:
    os.chdir(place)
    sys.argv = ["nestlearn", *given]
    sys.stdout, sys.stderr = open("out.txt", "w"), open("err.txt", "w")  # noqa: SIM115
    torch.set_num_threads(1)
    try:
        cli.main()
    finally:
        sys.stdout.close()
        sys.stderr.close()


def start(place: Path) -> multiprocessing.process.BaseProcess:
    words = ["learn", "model", "--store", "memory", "long.txt", "--autosave", "256", "--json"]
    process = SERVER.Process(target=child, args=(place, words))
    process.start()
    return process


def wait_for_a_snapshot(store: Path, process: multiprocessing.process.BaseProcess) -> None:
    """One that was not there before."""
    before = set((store / "snapshots").glob("*.json"))
    while process.is_alive() and set((store / "snapshots").glob("*.json")) <= before:
        time.sleep(0.01)


def test_kill_9_at_random_moments_costs_nothing(
    place: Path, model: ContinualModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    text = words(1200)
    (place / "long.txt").write_text(text)
    straight = ContinualLearner(model, tokenizer)
    straight.read(text, source=str((place / "long.txt").resolve()))
    choose = random.Random(0)
    killed, reached = 0, set()
    for _ in range(4):
        process = start(place)
        wait_for_a_snapshot(place / "memory", process)
        time.sleep(choose.random() / 4)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        store = Store(place / "memory")
        assert not store.verify().problems
        reached.add(store.head().meta["tokens"])  # type: ignore[union-attr]
    assert killed >= 2
    assert len(reached) >= 2
    process = start(place)
    process.join()
    assert process.exitcode == 0, (place / "err.txt").read_text()
    assert json.loads((place / "out.txt").read_text())["reads"][0]["resumed"] == max(reached)
    assert same(ContinualLearner(model, tokenizer, place / "memory").state, straight.state)


def test_ctrl_c_saves_and_says_how_to_go_on(
    place: Path, model: ContinualModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    text = words(3000)
    (place / "long.txt").write_text(text)
    process = start(place)
    wait_for_a_snapshot(place / "memory", process)
    os.kill(process.pid or 0, signal.SIGINT)
    process.join()
    err = (place / "err.txt").read_text()
    assert (process.exitcode, err) == (
        130,
        "interrupted: all before is saved in memory, the same command goes on from there\n",
    )
    state = ContinualLearner(model, tokenizer, place / "memory").state
    assert 0 < state.read < len(text)
    assert state.reading == str((place / "long.txt").resolve())


def test_a_chat_refuses_what_no_answer_can_be_made_with(run: Run) -> None:
    code, out, err = run("chat", "model", "--store", "memory", "--temperature", "-1", stdin="hi")
    assert (code, out) == (2, "")
    assert err == "error: --temperature -1.0: give 0 (the most likely token) or more\n"


def test_a_new_store_has_no_snapshot(run: Run) -> None:
    run("chat", "model", "--store", "memory")
    assert run("memory", "log", "memory") == (0, "memory holds no snapshot yet\n", "")


def test_a_chat_learns_saves_and_goes_back(run: Run, place: Path) -> None:
    script = ["hello there", "/save one", "/read a.txt", "/save two", "/rollback one", "/forget", "/log", "/what"]
    script += ["/read nothing.txt", "/save", "/forget me", "/help", "again", "/quit", "never said"]
    code, out, err = run(
        "chat", "model", "--store", "memory", "--max-new-tokens", "5", "--seed", "0", stdin="\n".join(script)
    )
    assert (code, err) == (0, "")
    assert out.count("[learned from this exchange: ") == 2
    assert f"[learned from a.txt: {len(words(100))} tokens, loss" in out
    assert "back at one; this conversation begins anew" in out
    assert "back at the start of this chat" in out
    assert "error: unknown command /what; " in out
    assert "error: no such file" in out.lower() or "error: cannot read nothing.txt" in out
    assert "error: /save needs a name" in out
    assert "error: /forget me: give nothing, for this chat, or all" in out
    assert "/rollback REF" in out
    assert "never said" not in out
    store = Store(place / "memory")
    assert sorted(store.names) == ["one", "two"]
    assert out.rstrip().endswith(f"saved as {store.head().short}")  # type: ignore[union-attr]
    code, out, _ = run("chat", "model", "--store", "memory", stdin="/log\n")
    assert [line.split()[0] for line in out.splitlines()] == [s.short for s in store.log()]
    code, out, _ = run("chat", "model", "--store", "memory", "--json", "--max-new-tokens", "5", stdin="hi\n/no\n/log\n")
    lines = [json.loads(line) for line in out.splitlines()]
    assert [next(iter(line)) for line in lines] == ["answer", "learned", "error", "log", "saved"]
    code, out, _ = run("chat", "model", "--store", "memory", stdin="/forget all\n")
    assert out.startswith("back at the pretrained weights")
    assert Store(place / "memory").load()[0] == {}


@pytest.mark.parametrize(
    ("words", "stdin", "message"),
    [
        (["chat"], None, "a chat reads standard input, which is closed"),
        (["chat"], b"good\nbad \xff bytes\n", "standard input is not UTF-8 text: convert it; all before is kept"),
        (["learn", "-"], b"hello\0wo", "standard input is binary (it has a zero byte): pipe UTF-8 text in"),
        (["learn", "-"], b"", "standard input is empty: pipe the text in"),
        (["learn", "-", "--dry-run"], b"", "standard input is empty: pipe the text in"),
        (["learn", "-"], b" \n\t", "standard input holds nothing but white space: pipe the text in"),
        (["learn", "/dev/null"], b"", "/dev/null is no regular file: give - and pipe its text in"),
        (["learn", "a.txt", "--name", "main"], b"", "'main' always means the branch of that name: choose another name"),
        (["learn", "a.txt", "--probe", "a.txt", "--limit", "0.5"], b"", "give 1 or more, such as 1.1 for 10 % more"),
    ],
)
def test_what_cannot_be_read_or_kept_is_one_line(run: Run, words: list[str], stdin: bytes | None, message: str) -> None:
    command, *given = words
    code, _, err = run(command, "model", "--store", "memory", *given, stdin=stdin)
    assert (code, err.count("\n")) == (2, 1)
    assert message in err


def test_a_name_that_would_hide_what_is_learned_is_refused_in_a_chat(run: Run) -> None:
    code, out, _ = run("chat", "model", "--store", "memory", stdin="/save main\n/read a.txt\n")
    assert code == 0
    assert "error: 'main' always means the branch of that name" in out
    assert "branch main" in run("memory", "log", "memory")[1]
    run("memory", "drop", "memory", "main")
    assert run("memory", "log", "memory")[1] == "memory holds no snapshot yet\n"
    run("learn", "model", "--store", "memory", "a.txt", "--name", "again")
    run("memory", "drop", "memory", "main")
    expected = "branch main of memory holds no snapshot; give one of these as REF: again\n"
    assert run("memory", "log", "memory")[1] == expected


def test_a_converted_model_is_not_converted_again_and_its_levels_are_shown(run: Run) -> None:
    assert run("convert", "model", "--out", "new")[2] == "error: model is converted already: give its base model\n"
    assert "learned weights, level 0" in run("levels", "model")[1]
    error = "error: base holds a model, which it would hide: give another folder with --out\n"
    assert run("convert", "base", "--out", "base")[2] == error


def test_a_byte_order_mark_on_standard_input_is_no_text(run: Run) -> None:
    code, out, _ = run("learn", "model", "--store", "memory", "-", stdin=b"\xef\xbb\xbfhello there")
    assert (code, out[:22]) == (0, "-: read 11 tokens, los")


def test_a_branch_that_another_process_has_moved_is_named(
    run: Run, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("learn", "model", "--store", "memory", "a.txt", "--name", "first")
    read = ContinualLearner.read

    def moved(self: ContinualLearner, *given: object, **options: object) -> ReadReport:
        other = Store(place / "memory")  # of another process
        other.save({}, dict(other.get().meta))
        report = read(self, *given, **options)  # type: ignore[arg-type]
        if stop:
            raise KeyboardInterrupt
        return report

    monkeypatch.setattr(ContinualLearner, "read", moved)
    stop = True
    code, _, err = run("learn", "model", "--store", "memory", "b.jsonl")
    assert code == 130
    assert err.endswith("on main-2, as another process has moved main: go on with --branch main-2\n")
    stop = False
    out = run("chat", "model", "--store", "memory", stdin="/read b.jsonl\n")[1]
    assert "another process has moved main: this chat is kept on main-3, go on with --branch main-3" in out


def test_what_an_interruption_left_unsaved_is_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: ContinualLearner) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ContinualLearner, "checkpoint", interrupted)
    code, _, err = run("learn", "model", "--store", "memory", "a.txt")
    assert code == 130
    assert "what was learned since the last snapshot in memory is not kept, the same command goes on from there" in err


def test_periods_without_a_common_window_are_said(run: Run) -> None:
    out = run("convert", "base", "--out", "new", "--periods", "16,40,56", "--layers", "all")[1]
    assert "it reads 8 tokens at a time, the most that divides every period" in out
    run("convert", "base", "--out", "odd", "--periods", "15,16,32", "--layers", "all")
    code, _, err = run("learn", "odd", "--store", "memory", "a.txt")
    assert (code, err.count("\n")) == (2, 1)
    assert "make windows of 1 token, which with nothing before it has none to predict" in err
    run("convert", "base", "--out", "huge", "--periods", f"16,32,{10**22}", "--layers", "all")
    assert run("learn", "huge", "--store", "memory", "a.txt")[0] == 0

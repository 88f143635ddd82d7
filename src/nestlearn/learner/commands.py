"""``nestlearn learn`` and ``nestlearn chat``. Heavy imports are inside."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nestlearn.errors import UserError
from nestlearn.files import finite, no_empty_folders
from nestlearn.json_option import Json, print_json

if TYPE_CHECKING:
    from nestlearn.learner.learner import ContinualLearner
    from nestlearn.learner.report import ReadReport

STDIN = "-"
AUTOSAVE = 16384

Model = Annotated[str, typer.Argument(help="smollm2, a folder of save_pretrained or of nestlearn convert.")]
StoreFolder = Annotated[Path, typer.Option("--store", help="The memory store: what is there is taken up again.")]
Branch = Annotated[str, typer.Option(help="The branch of the store to go on from.")]


def learn(
    model: Model,
    store: StoreFolder,
    files: Annotated[
        list[str] | None, typer.Argument(help="Text, .jsonl or .parquet; - is standard input.", metavar="FILES|-")
    ] = None,
    branch: Branch = "main",
    name: Annotated[str | None, typer.Option(help="For the snapshot at the end.")] = None,
    context: Annotated[int, typer.Option(help="Tokens before a window that the model sees with it.")] = 0,
    probe: Annotated[
        Path | None, typer.Option(help="A text that must not get worse: learning stops when it does.", metavar="FILE")
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(help="Of the probe's perplexity, in units of the pretrained model's; 1.1 if it is not given."),
    ] = None,
    autosave: Annotated[int, typer.Option(help="Tokens between two automatic snapshots.")] = AUTOSAVE,
    again: Annotated[bool, typer.Option("--again", help="Read from the start what has been read before.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be learned, and keep nothing of it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Let a model learn from texts, once, and keep what it learned.

    Killed or interrupted, the same command goes on at the exact token. A file that was read is not read again; one that
    has grown is read on.

    Example: nestlearn learn smollm2 --store memory/ manual.txt
    """
    from nestlearn.data.text_files import find_path, read_documents

    if not files:
        raise UserError("nothing to learn from: give files, or - for standard input")
    if len(set(files)) < len(files):
        raise UserError("a file is given twice: give each once")
    learner = None
    with _spooled(files, dry_run) as texts, _no_empty_store(store):
        for path in texts.values():
            if path is not None and path.is_dir():
                raise UserError(f"{path} is a folder: give its files, as in {path / '*.txt'}")
            if path is not None and path.exists() and not path.is_file():
                raise UserError(f"{path} is no regular file: give - and pipe its text in")
            if path is not None and not path.is_file():
                raise UserError(f"no file {str(path)!r}: give a text, .jsonl or .parquet file")
        results = []
        try:
            learner = _learner(model, store, branch, context, _probe(probe, limit), autosave, not dry_run)
            if name is not None and not dry_run:
                _check_name(learner, name)
            if dry_run:
                learner = learner.fork()  # a fork has no store
            for source, path in texts.items():

                def text(path: Path | None = path) -> Iterator[Iterator[str]]:
                    return iter((_stdin(),)) if path is None else read_documents(path)

                key = STDIN if source == STDIN else str(find_path(source, "file").resolve())
                result: dict[str, Any] = {"source": source}
                if dry_run:
                    result |= _measured(learner, "before", text())
                with _bar(source, quiet=as_json) as on_window:
                    known = learner.state.sources.get(key)
                    fresh = again or dry_run or (source == STDIN and known is not None and known.finished)
                    report = learner.read(text(), source=key, again=fresh, on_window=on_window)
                if dry_run:
                    result |= _measured(learner, "after", text())
                results.append(result | report.to_json())
                if not as_json:
                    _print_read(result, report)
                if report.stopped:
                    break
        except KeyboardInterrupt as stop:
            if learner is None:
                kept = "nothing was read, the store is as it was"
            elif dry_run:
                kept = "nothing was kept"
            else:
                command = "without --again the same command" if again else "the same command"
                kept = _left(learner, store, branch, command)
            print(f"interrupted: {kept}", file=sys.stderr)
            raise SystemExit(130) from stop
        snapshot = None if dry_run else _keep(learner, name)
    at = branch if learner.store is None else learner.store.branch
    if as_json:
        end = {"store": str(store), "branch": at, "snapshot": snapshot, "dry_run": dry_run}
        print_json({"model": model, "reads": finite(results), **end})
    elif dry_run:
        print(f"a dry run: {store} is as it was")
    elif snapshot is None:
        print("nothing was learned")
    else:
        # Another process has moved the branch in the meantime.
        moved = "" if at == branch else f" on the new branch {at}, as {branch} was moved by another process"
        print(f"kept in {store} as {name or snapshot[:12]}{moved}")


def chat(
    model: Model,
    store: StoreFolder,
    branch: Branch = "main",
    max_new_tokens: Annotated[int, typer.Option(help="An answer ends after so many tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="Divides the logits; 0 takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Sample from this share of the probability.")] = 0.95,
    seed: Annotated[int | None, typer.Option(help="The same answers for the same seed.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a line instead of text.")] = False,
) -> None:
    """Talk with a model that learns from the conversation, and from files that it is told to read.

    Every exchange is kept as soon as it is learned. /help lists the commands. Ctrl-C stops an answer, Ctrl-D leaves.

    Example: nestlearn chat smollm2 --store memory/
    """
    from nestlearn.learner.chat import Chat

    options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed, "as_json": as_json}
    with _no_empty_store(store):
        learner = _learner(model, store, branch, 0, None, AUTOSAVE)
        Chat(learner, max_new_tokens=max_new_tokens, **options).run()


@contextmanager
def _no_empty_store(folder: Path) -> Iterator[None]:
    """After an error inside no store is left where none was, unless something was kept in it."""
    free = _is_free(folder)
    with no_empty_folders(folder):
        try:
            yield
        except BaseException:
            if free and folder.is_dir():
                from nestlearn.learner.store.collect import discard

                with suppress(UserError, OSError):  # what went wrong inside is what is told
                    discard(folder)
            raise


def _is_free(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))


def _learner(
    model: str, store: Path, branch: str, context: int, probe: Any, autosave: int | None, keep: bool = True
) -> ContinualLearner:
    from transformers.utils import logging

    from nestlearn.convert import ContinualModel, base_hash, convert
    from nestlearn.learner.learner import ContinualLearner
    from nestlearn.learner.store import Store
    from nestlearn.train.loading import load_model

    logging.disable_progress_bar()
    loaded, tokenizer = load_model(model)
    converted = loaded if isinstance(loaded, ContinualModel) else convert(loaded)
    opened = Store(store, base_hash(converted), branch) if keep or not _is_free(store) else None
    return ContinualLearner(converted, tokenizer, opened, context=context, probe=probe, autosave=autosave)


def _probe(path: Path | None, limit: float | None) -> Any:
    from nestlearn.data.text_files import read_text
    from nestlearn.learner.guards import RetentionProbe

    if path is None and limit is not None:
        raise UserError(f"--limit {limit:g} is that of a probe: give --probe FILE with it")
    if path is None:
        return None
    text = read_text(path)
    return RetentionProbe(text) if limit is None else RetentionProbe(text, limit)


def _check_name(learner: ContinualLearner, name: str) -> None:
    """What would be said at the end, before anything is read."""
    from nestlearn.learner.store import references

    references.check_name(name, "name")
    assert learner.store is not None
    if name in {*learner.store.names, *learner.store.branches}:
        raise UserError(f"the name {name!r} is taken: choose another")


def _keep(learner: ContinualLearner, name: str | None) -> str | None:
    """The id of the snapshot of what was learned; None if there is nothing new and no name for it."""
    return learner.save(name).id if name is not None or learner.unsaved else None


def _measured(learner: ContinualLearner, when: str, text: Any) -> dict[str, float]:
    return {when: learner.loss(text)} | ({f"probe_{when}": learner.probe_loss()} if learner.probe else {})


def _left(learner: ContinualLearner, store: Path, branch: str, command: str) -> str:
    """What an interruption has left in the store."""
    assert learner.store is not None
    if learner.unsaved and not learner.stored:
        return f"what was learned since the last snapshot in {store} is not kept, {command} goes on from there"
    at = learner.store.branch
    if at != branch:
        moved = f"as another process has moved {branch}: go on with --branch {at}"
        return f"all before is saved in {store} on {at}, {moved}"
    return f"all before is saved in {store}, {command} goes on from there"


def _print_read(result: dict[str, Any], report: ReadReport) -> None:
    print(f"{result['source']}: {report}")
    if "before" in result:
        print(f"loss on it {result['before']:.3f} before, {result['after']:.3f} after")
    if "probe_before" in result:
        print(f"loss on the probe {result['probe_before']:.3f} before, {result['probe_after']:.3f} after")


@contextmanager
def _bar(source: str, quiet: bool) -> Iterator[Callable[[ReadReport], None]]:
    """A bar with tokens/s, the loss and each level's surprise, where someone is watching."""
    from tqdm import tqdm

    with tqdm(desc=source, unit=" tokens", leave=False, disable=True if quiet else None, mininterval=0.5) as bar:

        def show(report: ReadReport) -> None:
            surprises = [
                f"{level.number}: {level.surprise:.2g}" for level in report.levels if level.surprise is not None
            ]
            loss = "" if report.loss is None else f"loss {report.loss:.3f}, surprise of level {', '.join(surprises)}"
            bar.set_postfix_str(loss, refresh=False)
            bar.update(report.tokens - bar.n)

        yield show


@contextmanager
def _spooled(files: list[str], dry_run: bool) -> Iterator[dict[str, Path | None]]:
    """The path of each source; None is standard input. A dry run reads a text three times, so it keeps a copy."""
    from nestlearn.data.text_files import find_path

    with tempfile.TemporaryDirectory() as folder:
        texts = {name: None if name == STDIN else find_path(name, "file") for name in files}
        if dry_run and STDIN in texts:
            copy = texts[STDIN] = Path(folder, "stdin.txt")
            with copy.open("w", encoding="utf-8") as file:
                file.writelines(_stdin())
        yield texts


def _stdin() -> Iterator[str]:
    """Standard input in pieces. Raises `UserError` if it is empty or no UTF-8 text."""
    import codecs

    if sys.stdin is None:
        raise UserError("- reads standard input, which is closed: pipe the text in")
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    empty = blank = True
    try:
        while raw := sys.stdin.buffer.read(1 << 14):
            if b"\0" in raw:
                raise UserError("standard input is binary (it has a zero byte): pipe UTF-8 text in")
            text, empty = decoder.decode(raw), False
            blank = blank and not text.strip()
            yield text
        yield decoder.decode(b"", final=True)
        if blank:
            raise UserError(
                f"standard input {'is empty' if empty else 'holds nothing but white space'}: pipe the text in"
            )
    except UnicodeDecodeError:
        raise UserError("standard input is not UTF-8 text: convert it") from None
    except OSError as error:
        raise UserError(f"cannot read standard input ({error.strerror}): pipe the text in") from error

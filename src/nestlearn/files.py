"""Files that are either the old version or the new one, never a torn one: write beside, fsync, rename."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import re
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from nestlearn.errors import UserError


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file in the folder of ``path``, fsync it and rename it to ``path``.

    Raises whatever ``write`` raises (``OSError`` on a full disk); then the old file is untouched and the
    temporary one is gone.

    >>> import tempfile; folder = Path(tempfile.mkdtemp())
    >>> write_atomic(folder / "a.txt", lambda p: p.write_text("hello")); (folder / "a.txt").read_text()
    'hello'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    beside = Path(name)
    try:
        with disk_errors():
            write(beside)
        make_readable(beside)
        sync_file(beside)
        os.replace(beside, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write does not say of what
        raise
    finally:
        beside.unlink(missing_ok=True)
    sync_file(path.parent)


@contextmanager
def no_empty_folders(folder: Path) -> Iterator[None]:
    """After an error inside, ``folder`` and those above it are gone again if they were not there before and are empty.

    >>> import tempfile; top = Path(tempfile.mkdtemp())
    >>> with contextlib.suppress(KeyError), no_empty_folders(top / "a" / "b"):
    ...     (top / "a" / "b").mkdir(parents=True)
    ...     raise KeyError
    >>> list(top.iterdir())
    []
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for path in made:
                path.rmdir()
        raise


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn what safetensors and tokenizers raise for a failed write into the ``OSError`` of Python's own files."""
    try:
        yield
    except Exception as error:  # tokenizers raises no narrower class
        code = re.search(r"os error (\d+)", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically. Raises ``ValueError`` for NaN and infinity, which JSON lacks."""
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_atomic(path, lambda p: p.write_text(text, encoding="utf-8"))


def finite(value: Any) -> Any:
    """``value`` with null for every number that JSON lacks.

    >>> finite({"loss": [1.0, float("nan")]})
    {'loss': [1.0, None]}
    """
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in ``path``. Raises `UserError` that names the file and ends with ``remedy`` if it holds none."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no valid JSON"
        raise UserError(f"{path} is damaged ({reason}): {remedy}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged (no JSON object): {remedy}")
    return value


def parse_json(text: str) -> Any:
    """``json.loads`` without the NaN and infinity that Python reads though JSON lacks them."""

    def refuse(name: str) -> NoReturn:
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def make_readable(path: Path) -> None:
    """Give a file that was written as a temporary one, readable by its owner alone, the usual permissions."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def sync_file(path: Path) -> None:
    """Flush a file or a folder entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Waiting:
    """Takes Ctrl-C down for later; the third is not waited with, as another process may hold everything up."""

    def __init__(self, before: Callable[[int, Any], Any]) -> None:
        self.before = before
        self.came: list[tuple[int, Any]] = []

    def __call__(self, number: int, frame: Any) -> None:
        self.came.append((number, frame))
        if len(self.came) > 2:
            self.before(number, frame)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Inside, Ctrl-C waits for the end: what has to agree, on the disk and in memory, is written whole.

    >>> with uninterrupted():
    ...     kept = [1]
    """
    before = signal.getsignal(signal.SIGINT)
    # Only the main thread is interrupted, and only if Python handles the signal. Inside another one that one waits.
    main = threading.current_thread() is threading.main_thread()
    if not main or not callable(before) or isinstance(before, _Waiting):
        yield
        return
    waiting = _Waiting(before)
    signal.signal(signal.SIGINT, waiting)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if 0 < len(waiting.came) < 3:
            before(*waiting.came[0])


@contextmanager
def alone(path: Path, busy: str) -> Iterator[None]:
    """The only process inside for the lock file ``path``, which is gone afterwards. The kernel drops the lock when its
    holder dies, however it dies. Raises `UserError` with the message ``busy`` if another process is inside.

    >>> folder = Path(tempfile.mkdtemp())
    >>> with alone(folder / ".lock", "wait"):
    ...     with alone(folder / ".lock", "wait"):
    ...         pass
    Traceback (most recent call last):
    nestlearn.errors.UserError: wait
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(busy) from None
            if _is_at(descriptor, path):
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
        finally:
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is still the one at ``path``; its last holder may have removed it in the meantime."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False

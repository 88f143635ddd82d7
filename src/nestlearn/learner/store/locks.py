"""Who may write, and what must not be removed: one lock for the store, one lease for everyone who has it open.

Both are ``flock`` locks, which the kernel drops when their holder dies, however it dies.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from nestlearn.errors import UserError
from nestlearn.files import uninterrupted

LOCK, LEASES = "lock", "leases"


@contextmanager
def locked(folder: Path, shared: bool = False) -> Iterator[None]:
    """Hold the store's lock: ``shared`` to read, alone to write. Waits for whoever has it. Not to be nested.

    Every call opens the file anew, so that two threads, or two stores in one process, keep each other out as well. Who
    holds it alone is not interrupted by Ctrl-C before it is given back.

    Raises `UserError` for what the system says against it, or against what is done inside (a full disk).
    """
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
            with nullcontext() if shared else uninterrupted():
                yield
        finally:
            os.close(descriptor)
    except OSError as error:
        where = "" if error.filename is None else f" at {Path(error.filename).name}"
        what = f"cannot use the store {folder} ({error.strerror or error}{where})"
        remedy = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "put that right"
        raise UserError(f"{what}: what was kept is as it was; {remedy}") from error


class Lease:
    """A small locked file with the id of the snapshot that an open store stands on: nobody removes that one.

    Made and moved under the store's lock. It ends with its process, or with the store that holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / LEASES
        self._open()

    def stand_on(self, snapshot: str | None) -> None:
        if self._process != os.getpid():  # a forked child shares its parent's file, and goes its own way from here
            self._open()
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, (snapshot or "").encode(), 0)

    def _open(self) -> None:
        self._folder.mkdir(exist_ok=True)
        self._process = os.getpid()
        path = self._folder / f"{self._process}-{secrets.token_hex(4)}"
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        weakref.finalize(self, _end, path, self._descriptor, self._process)


def _end(path: Path, descriptor: int, process: int) -> None:
    if process == os.getpid():
        path.unlink(missing_ok=True)
    os.close(descriptor)


def leased(folder: Path) -> set[str]:
    """The snapshots that open stores stand on. Call it with the store's lock held; leases of the dead are removed."""
    found = set()
    for path in (folder / LEASES).glob("*"):
        try:
            descriptor = os.open(path, os.O_RDWR)
        except FileNotFoundError:  # its store has just been closed
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
        except BlockingIOError:
            found.add(os.pread(descriptor, 64, 0).decode())
        finally:
            os.close(descriptor)
    return found - {""}

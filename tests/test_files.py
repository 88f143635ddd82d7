"""Atomic writes: the old file or the new one, with ordinary permissions, and nothing left behind."""

from __future__ import annotations

import errno
import os
import signal
import threading
from pathlib import Path

import pytest

from nestlearn.errors import UserError
from nestlearn.files import alone, uninterrupted, write_atomic, write_json


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    target = tmp_path / "state.json"
    write_json(target, {"step": 1})

    def full_disk(path: Path) -> None:
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_atomic(target, full_disk)
    assert target.read_text() == '{\n  "step": 1\n}\n'
    assert list(tmp_path.iterdir()) == [target]


def test_files_are_as_readable_as_the_umask_allows(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_json(tmp_path / "a.json", 1)
    finally:
        os.umask(before)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o640


def test_a_lock_is_free_again_when_its_holder_is_gone(tmp_path):
    lock = tmp_path / "new" / ".lock"
    for _ in range(2):
        with alone(lock, "wait"), pytest.raises(UserError, match="wait"), alone(lock, "wait"):
            pass
        assert not lock.exists()
    with pytest.raises(KeyboardInterrupt), alone(lock, "wait"):
        raise KeyboardInterrupt
    assert not lock.exists()


def test_ctrl_c_waits_for_the_end_of_what_is_written_whole() -> None:
    before, done = signal.getsignal(signal.SIGINT), []
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        with uninterrupted():
            with uninterrupted():
                os.kill(os.getpid(), signal.SIGINT)
                done.append("inner")
            done.append("outer")
        done.append("after")
    assert done == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt), uninterrupted():  # noqa: PT012
        for count in range(5):  # who insists is not kept waiting
            done.append(count)
            os.kill(os.getpid(), signal.SIGINT)
    assert done[-1] == 2
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(ValueError, match="own"), uninterrupted():  # what goes wrong inside is what is raised
        raise ValueError("own")

    def elsewhere() -> None:  # no signal reaches another thread, and none may set a handler
        with uninterrupted():
            done.append("thread")

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert done[-1] == "thread"

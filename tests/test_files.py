"""Atomic writes: the old file or the new one, with ordinary permissions, and nothing left behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from nestlearn.errors import UserError
from nestlearn.files import alone, write_atomic, write_json


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

"""A flipped bit, a lost end, a missing file or a foreign one is refused by name, and the rest still loads."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from nestlearn.errors import UserError
from nestlearn.learner.store import Snapshot, Store, references
from nestlearn.learner.store.objects import path_of as object_path
from nestlearn.learner.store.snapshot import path_of as manifest_path


@pytest.fixture
def store(tmp_path: Path) -> Store:
    made = Store(tmp_path / "memory", base="b" * 64)
    made.save({"a": {"w": torch.tensor([1.0, 2.0])}}, {"i": 0}, name="good")
    made.save({"a": {"w": torch.tensor([3.0, 4.0])}}, {"i": 1}, name="bad")
    return made


def path_of(which: str, store: Store, snapshot: Snapshot) -> Path:
    if which == "object":
        return object_path(store.folder, snapshot.levels["a"].object)
    return manifest_path(store.folder, snapshot.id)


def harmed(path: Path) -> Iterator[bytes]:
    """The file with one bit of each byte flipped, each bit in turn, cut at every fifth byte, and with a byte more."""
    whole = path.read_bytes()
    for position in range(len(whole)):
        flipped = whole[position] ^ (1 << (position * 3 % 8))
        yield whole[:position] + bytes([flipped]) + whole[position + 1 :]
    for length in range(0, len(whole), 5):
        yield whole[:length]
    yield whole + b" "


@pytest.mark.parametrize("which", ["object", "manifest"])
def test_every_byte_counts(store: Store, which: str) -> None:
    bad = store.get("bad")
    path = (
        object_path(store.folder, bad.levels["a"].object) if which == "object" else manifest_path(store.folder, bad.id)
    )
    whole = path.read_bytes()
    for number, data in enumerate(harmed(path)):
        path.write_bytes(data)
        with pytest.raises(UserError, match=rf"{path.name} is damaged \(truncated or changed\)"):
            store.load("bad")
        if number % 100 == 0:
            assert store.load("good")[0]["a"]["w"].tolist() == [1.0, 2.0]
            problems = store.verify().problems
            assert len(problems) == 1
            assert path.name in problems[0]
    path.write_bytes(whole)
    assert store.verify().problems == ()


def test_every_byte_of_the_references_counts(store: Store) -> None:
    path = store.folder / "store.json"
    for data in harmed(path):
        if data.strip() != path.read_bytes().strip():  # a blank at the end changes nothing
            broken = store.folder.parent / "broken"
            broken.mkdir(exist_ok=True)
            (broken / "store.json").write_bytes(data)
            with pytest.raises(UserError, match=r"store\.json is damaged \(.*\): copy store\.previous\.json over it"):
                references.read(broken)


def test_the_remedy_for_damaged_references_works(store: Store) -> None:
    for harm in (lambda path: path.write_bytes(b"{"), lambda path: path.unlink()):
        path = store.folder / "store.json"
        harm(path)
        with pytest.raises(UserError, match=r"store\.json is (damaged|missing).*copy store\.previous\.json over it"):
            Store(store.folder, base="b" * 64)
        shutil.copy(store.folder / "store.previous.json", path)
        again = Store(store.folder, base="b" * 64)
        assert again.get("good").meta == {"i": 0}
        assert again.verify().problems == ()
        again.save({"a": {"w": torch.tensor([3.0, 4.0])}}, {"i": 1}, name="bad", move=True)


@pytest.mark.parametrize("which", ["object", "manifest"])
def test_a_missing_file(store: Store, which: str) -> None:
    bad = store.get("bad")
    path = (
        object_path(store.folder, bad.levels["a"].object) if which == "object" else manifest_path(store.folder, bad.id)
    )
    path.unlink()
    with pytest.raises(UserError, match=f"{path.name} is missing"):
        store.load("bad")
    assert [line for line in store.verify().problems if path.name in line]
    again = Store(store.folder)  # it opens, and the way back is there
    assert again.load("good")[0]["a"]["w"].tolist() == [1.0, 2.0]
    again.rollback("good")
    again.save({"a": {"w": torch.tensor([5.0])}}, {})
    assert [s.meta for s in again.log()] == [{}, {"i": 0}]


def test_damage_in_the_history_leaves_what_came_later(store: Store) -> None:
    store.save({"a": {"w": torch.tensor([5.0])}}, {"i": 2})
    manifest_path(store.folder, store.names["good"]).write_text("{}")
    assert store.load()[0]["a"]["w"].tolist() == [5.0]
    before = set(store.folder.rglob("*"))
    for use in (store.log, store.gc):
        with pytest.raises(UserError, match=f"{store.names['good']}.json is damaged"):
            use()
    assert set(store.folder.rglob("*")) == before
    # Whoever learns goes on, and prunes what it saved since.
    for i in range(3, 6):
        store.save({"a": {"w": torch.tensor([float(i)])}}, {"i": i, "auto": True})
        store.prune(1)
    assert [store.get(f"head~{n}").meta["i"] for n in range(3)] == [5, 2, 1]
    report = store.verify()
    assert len(report.problems) == 1
    assert report.newest == store.head().id  # type: ignore[union-attr]


def test_what_is_pruned_or_collected_is_not_in_the_previous_references(store: Store) -> None:
    for i in range(2, 5):
        store.save({"a": {"w": torch.tensor([float(i)])}}, {"i": i, "auto": True})
    store.prune(1)
    for remove in (lambda: None, lambda: (store.rollback("good"), store.drop("bad"), store.gc())):
        remove()
        shutil.copy(store.folder / "store.previous.json", store.folder / "store.json")
        again = Store(store.folder, base="b" * 64)
        assert again.verify().problems == ()
        assert len(again.log()) == len(store.log())


def test_files_that_are_folders_are_problems_like_others(store: Store) -> None:
    for path in (path_of("object", store, store.get("bad")), path_of("manifest", store, store.get("bad"))):
        whole = path.read_bytes()
        path.unlink()
        path.mkdir()
        report = Store(store.folder).verify()
        assert [line for line in report.problems if path.name in line and "Is a directory" in line]
        assert report.newest == store.names["good"]
        path.rmdir()
        path.write_bytes(whole)


def test_an_object_that_lost_its_end_is_written_anew(store: Store) -> None:
    path = object_path(store.folder, store.get("bad").levels["a"].object)
    path.write_bytes(path.read_bytes()[:-1])
    store.save({"a": {"w": torch.tensor([3.0, 4.0])}}, {})
    assert store.verify().problems == ()


def test_a_snapshot_of_another_model(store: Store, tmp_path: Path) -> None:
    other = Store(tmp_path / "other", base="c" * 64)
    foreign = other.save({"a": {"w": torch.zeros(2)}}, {})
    for part in ("objects", "snapshots"):
        shutil.copytree(other.folder / part, store.folder / part, dirs_exist_ok=True)
    with pytest.raises(UserError, match=f"{foreign.id}.json is a snapshot of another model"):
        store.load(foreign.id)
    with pytest.raises(UserError, match="another model"):
        store.merge("good", foreign.id)
    assert "another model" in store.verify().problems[0]
    assert store.gc().snapshots == 1
    assert store.verify().problems == ()


def test_a_whole_file_of_another_program(store: Store) -> None:
    import hashlib

    for text in (b"no json", b"[]", b'{"format": "nestlearn memory snapshot, version 2"}'):
        identity = hashlib.sha256(text).hexdigest()
        manifest_path(store.folder, identity).write_bytes(text)
        with pytest.raises(UserError, match=f"{identity}.json is no 'nestlearn memory snapshot, version 1'"):
            store.load(identity)


def test_no_pickle_is_ever_read(store: Store) -> None:
    """An object whose bytes are right but are no safetensors: a store that was put together by hand."""
    import hashlib
    import io
    import json

    buffer = io.BytesIO()
    torch.save({"w": torch.zeros(1)}, buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    object_path(store.folder, digest).write_bytes(buffer.getvalue())
    manifest = json.loads(manifest_path(store.folder, store.names["bad"]).read_bytes())
    manifest["levels"]["a"]["object"] = digest
    text = json.dumps(manifest).encode()
    identity = hashlib.sha256(text).hexdigest()
    manifest_path(store.folder, identity).write_bytes(text)
    with pytest.raises(UserError, match=f"{digest}.safetensors is no safetensors file"):
        store.load(identity)

"""The memory store: what is saved comes back, is named, compared, forked, merged and rolled back."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nestlearn.errors import UserError
from nestlearn.learner.store import Store, objects

State = dict[str, dict[str, torch.Tensor]]


def state(**levels: float) -> State:
    """``a=1`` is level a with a weight full of ones."""
    return {name: {"w": torch.full((2, 3), float(value))} for name, value in levels.items()}


def same(a: State, b: State) -> bool:
    return a.keys() == b.keys() and all(
        a[level].keys() == b[level].keys()
        and all(
            t.dtype == b[level][n].dtype and t.shape == b[level][n].shape and torch.equal(t, b[level][n])
            for n, t in a[level].items()
        )
        for level in a
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "memory", base="b" * 64)


def object_files(store: Store) -> set[Path]:
    return set((store.folder / "objects").iterdir())


def test_every_kind_of_tensor_comes_back_to_the_bit(store: Store) -> None:
    kinds = [getattr(torch, name) for name in objects.DTYPES]
    level = {f"t{i}": (torch.arange(6).reshape(2, 3) - 2).to(kind) for i, kind in enumerate(kinds)}
    level |= {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 4), "strided": torch.arange(12.0).reshape(3, 4).T}
    level["with.dots/and é"] = torch.ones(1, requires_grad=True)
    saved: State = {"level-1": level, "nothing": {}}
    store.save(saved, {})
    assert same(store.load()[0], {n: {k: t.detach() for k, t in v.items()} for n, v in saved.items()})


@given(shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=5), seed=st.integers(0, 99))
def test_a_file_is_what_safetensors_reads_and_its_name_is_its_hash(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    kinds = (torch.float32, torch.bfloat16, torch.float64)
    tensors = {f"t{i}": torch.randn(s, generator=generator).to(kinds[i % 3]) for i, s in enumerate(shapes)}
    folder = tmp_path_factory.mktemp("objects")
    buffers = objects.serialise("level-1", tensors)
    digest = objects.digest_of(buffers)
    size = objects.write(folder, digest, buffers)
    data = objects.path_of(folder, digest).read_bytes()
    assert (hashlib.sha256(data).hexdigest(), len(data)) == (digest, size)
    assert same({"x": objects.read(folder, digest)}, {"x": tensors})
    again = objects.serialise("level-1", dict(reversed(tensors.items())))  # the order of a dict says nothing
    assert objects.digest_of(again) == digest


def test_a_level_that_did_not_change_costs_nothing(store: Store) -> None:
    first = store.save(state(fast=1, slow=1), {})
    assert len(object_files(store)) == 1  # equal tensors are one object, whatever the level
    second = store.save(state(fast=2, slow=1), {})
    assert len(object_files(store)) == 2
    assert second.levels["slow"] == first.levels["slow"] == first.levels["fast"]
    assert first.levels["slow"].numbers == 6
    assert first.levels["slow"].bytes == next(iter(object_files(store))).stat().st_size


def test_writing_to_loaded_tensors_never_reaches_the_file(store: Store) -> None:
    store.save(state(a=1), {})
    loaded = store.load()[0]
    loaded["a"]["w"].fill_(7)
    assert same(store.load()[0], state(a=1))
    assert store.verify().problems == ()


def test_a_tensor_that_changes_while_it_is_saved_is_noticed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    moving = state(a=1)
    real = objects.digest_of

    def digest_and_train(buffers: list[object]) -> str:
        digest = real(buffers)
        moving["a"]["w"] += 1
        return digest

    monkeypatch.setattr(objects, "digest_of", digest_and_train)
    with pytest.raises(RuntimeError, match="changed in place"):
        store.save(moving, {})
    assert store.head() is None
    assert object_files(store) == set()


def test_meta_and_manifest(store: Store) -> None:
    saved = store.save(state(a=1), {"tokens": 512, "loss": 0.1 + 0.2, "read": ["book.txt"], "none": None}, name="one")
    found = store.load("one")[1]
    assert found == saved
    assert found.meta == {"tokens": 512, "loss": 0.1 + 0.2, "read": ["book.txt"], "none": None}
    assert (found.name, found.parents, found.base) == ("one", (), "b" * 64)
    assert store.get(found.id[:4]) == found
    manifest = store.folder / "snapshots" / f"{found.id}.json"
    assert hashlib.sha256(manifest.read_bytes()).hexdigest() == found.id


def test_references(store: Store) -> None:
    made = [store.save(state(a=i), {"i": i}, name=f"n{i}") for i in range(4)]
    for ref, i in {"head": 3, "HEAD": 3, "head~0": 3, "head~": 2, "head~3": 0, "n2": 2, "n2~1": 1, "main~2": 1}.items():
        assert store.get(ref).meta == {"i": i}, ref
    assert store.get(made[1].id).id == made[1].id
    assert [s.meta["i"] for s in store.log()] == [3, 2, 1, 0]
    assert [s.name for s in store.log("n1")] == ["n1", "n0"]
    assert store.names == {f"n{i}": s.id for i, s in enumerate(made)}
    assert store.branches == {"main": made[3].id}
    assert store.head() == store.head("main") == made[3]


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("frist", r"no snapshot 'frist'; did you mean 'first'\? \(allowed: first, head, main\)"),
        ("head~1", "'head~1' is before the first snapshot: at most ~0"),
        ("head~x", "after ~ comes the number of parents"),
        ("0" * 64, "no snapshot '0000"),
        ("", "no snapshot ''"),
        ("../store", "no snapshot '../store'"),
    ],
)
def test_references_to_nothing(store: Store, ref: str, message: str) -> None:
    store.save(state(a=1), {}, name="first")
    with pytest.raises(UserError, match=message):
        store.load(ref)


def test_an_ambiguous_prefix(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nestlearn.learner.store.references.listed", lambda folder: ["abcd" + "0" * 60, "abcd1" * 12])
    store.save(state(a=1), {})
    with pytest.raises(UserError, match=r"'abcd' begins 2 ids: give more digits \(abcd00000000, abcd1abcd1ab\)"):
        store.get("abcd")


@pytest.mark.parametrize(
    "name", ["", "a b", "head", "Head", "main", "cafe", "0123456789", "-x", ".x", "a/b", "a~1", "x" * 101]
)
def test_names_that_are_none(store: Store, name: str) -> None:
    with pytest.raises(UserError):
        store.save(state(a=1), {}, name=name)
    store.save(state(a=1), {})
    with pytest.raises(UserError):
        store.fork(name)
    assert (store.names, len(store.log()), store.branch) == ({}, 1, "main")


def test_a_name_is_given_once_unless_it_is_to_move(store: Store) -> None:
    first = store.save(state(a=1), {}, name="manual")
    with pytest.raises(UserError, match=r"the name 'manual' is taken by .*: choose another, or drop it first"):
        store.save(state(a=2), {}, name="manual")
    assert store.log() == [first]
    second = store.save(state(a=2), {}, name="manual", move=True)
    assert store.names == {"manual": second.id}
    assert [s.name for s in store.log()] == ["manual", None]
    with pytest.raises(UserError, match="'main' always means the branch of that name"):
        store.save(state(a=2), {}, name="main", move=True)
    with pytest.raises(UserError, match="'manual' is taken"):
        store.fork("manual")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused(store: Store, bad: float) -> None:
    tensors = state(a=1, b=2)
    tensors["b"]["w"][1, 1] = bad
    with pytest.raises(UserError, match="level 'b': tensor 'w' holds NaN or infinity: nothing was saved"):
        store.save(tensors, {})
    with pytest.raises(UserError, match="meta must be plain JSON"):
        store.save(state(a=1), {"loss": bad})
    assert store.log() == []
    assert object_files(store) == set()


def test_what_cannot_be_kept(store: Store) -> None:
    with pytest.raises(UserError, match="tensor 'c' of complex64 cannot be kept"):
        store.save({"a": {"c": torch.zeros(1, dtype=torch.complex64)}}, {})
    with pytest.raises(UserError, match="'__metadata__'"):
        store.save({"a": {"__metadata__": torch.zeros(1)}}, {})
    with pytest.raises(UserError, match="meta must be plain JSON"):
        store.save(state(a=1), {"t": torch.zeros(1)})


def test_the_wrong_folder_or_model(tmp_path: Path, store: Store) -> None:
    with pytest.raises(UserError, match="is the memory of base model bbbbbbbbbbbb, not of cccccccccccc"):
        Store(store.folder, base="c" * 64)
    with pytest.raises(UserError, match="holds no memory store: check the path"):
        Store(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        Store(tmp_path / "file", base="c")
    with pytest.raises(UserError, match="holds something else"):
        Store(tmp_path, base="c")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "memory"}
    with pytest.raises(UserError, match=r"has no branch 'mian'; did you mean 'main'"):
        Store(store.folder, branch="mian")
    with pytest.raises(UserError, match="has no snapshot yet"):
        store.load()
    assert Store(store.folder).base == "b" * 64


def test_a_branch_that_another_store_has_moved_forks(store: Store) -> None:
    store.save(state(a=0), {})
    other = Store(store.folder)
    mine, theirs = store.save(state(a=1), {}), other.save(state(a=2), {})
    assert (store.branch, other.branch) == ("main", "main-2")
    assert store.branches == {"main": mine.id, "main-2": theirs.id}
    later = other.save(state(a=3), {})  # it stays on its branch
    assert [s.id for s in other.log()][:2] == [later.id, theirs.id]
    third = Store(store.folder)
    store.save(state(a=4), {})
    third.save(state(a=5), {})
    assert third.branch == "main-3"
    assert same(store.load()[0], state(a=4))


def test_two_first_snapshots_fork(store: Store) -> None:
    other = Store(store.folder)
    store.save(state(a=1), {})
    other.save(state(a=2), {})
    assert other.branch == "main-2"
    assert len(other.log()) == 1


def test_a_parent_that_is_not_the_tip_forks(store: Store) -> None:
    store.save(state(a=0), {}, name="zero")
    tip = store.save(state(a=1), {})
    side = store.save(state(a=2), {}, parent="zero")
    assert (store.branch, store.branches) == ("main-2", {"main": tip.id, "main-2": side.id})


def test_rollback_goes_back_and_forth(store: Store) -> None:
    first, second = store.save(state(a=1), {}, name="one"), store.save(state(a=2), {})
    assert store.rollback("one") == first
    assert (store.head(), Store(store.folder).head()) == (first, first)
    third = store.save(state(a=3), {})
    assert (store.branch, third.parents) == ("main", (first.id,))
    assert store.rollback(second.short) == second  # until gc, nothing is lost
    assert store.verify().unreachable == 1
    assert store.gc().snapshots == 1
    with pytest.raises(UserError, match="no snapshot"):
        store.rollback(third.id)


def test_rollback_leaves_what_another_store_saved_since(store: Store) -> None:
    first = store.save(state(a=1), {})
    store.save(state(a=2), {})
    other = Store(store.folder)
    theirs = other.save(state(a=3), {})
    store.rollback("head~1")
    assert (store.branch, store.branches) == ("main-2", {"main": theirs.id, "main-2": first.id})


def test_fork_and_drop(store: Store) -> None:
    store.save(state(a=1), {}, name="one")
    main = store.save(state(a=2), {})
    fork = store.fork("experiment", "one")
    side = fork.save(state(a=3), {})
    assert (fork.branch, store.branch) == ("experiment", "main")
    assert store.branches == {"main": main.id, "experiment": side.id}
    assert store.head("experiment") == side
    assert Store(store.folder, branch="experiment").head() == side
    with pytest.raises(UserError, match="'experiment' is a branch"):
        store.fork("experiment")
    with pytest.raises(UserError, match=r"no name or branch 'expe'; did you mean 'experiment'"):
        store.drop("expe")
    store.drop("experiment")
    assert store.gc().snapshots == 0  # the fork is still open, and stands on it
    fork.save(state(a=4), {})
    assert sorted(store.branches) == ["experiment", "main"]  # and its branch is there again when it saves
    store.drop("experiment")
    del fork
    assert store.gc().snapshots == 2
    store.drop("one")
    assert store.names == {}
    assert store.log()[-1].name is None


def test_gc_keeps_what_an_open_store_stands_on(store: Store) -> None:
    store.save(state(a=1), {})
    store.save(state(a=2), {})
    other = Store(store.folder)
    store.rollback("head~1")
    assert store.gc().snapshots == 0
    assert same(other.load()[0], state(a=2))
    other.save(state(a=3), {})
    assert [len(other.log()), other.branch] == [3, "main-2"]
    assert other.verify().problems == ()


def test_gc_removes_only_what_nothing_reaches(store: Store) -> None:
    store.save(state(a=1, b=1), {}, name="one")
    store.save(state(a=2, b=1), {})
    store.save(state(a=3, b=1), {})
    store.rollback("one")
    (store.folder / "objects" / ".half.safetensors.x1").write_text("half")
    loose = store.verify()
    removed = store.gc()
    assert (loose.unreachable, removed.snapshots, removed.objects) == (2, 2, 2)
    assert removed.bytes > 4
    assert {path.stem for path in object_files(store)} == {store.get("one").levels["b"].object}
    assert store.gc() == type(removed)(0, 0, 0)


def test_prune_keeps_names_forks_and_the_newest(store: Store) -> None:
    for i in range(10):
        store.save(state(a=i), {"i": i, "auto": True}, name="five" if i == 5 else None)
    fork = store.fork("side", "head~7")  # at 2
    fork.save(state(a=99), {"i": 99, "auto": True})
    assert store.prune(keep_last=2).snapshots == 6  # 0 1 3 4 6 7
    shown = [(s.meta["i"], s.name, s.pruned) for s in store.log()]
    assert shown == [(9, None, 0), (8, None, 2), (5, "five", 2), (2, None, 2)]
    assert [s.meta["i"] for s in fork.log()] == [99, 2]
    assert store.get("head~2").name == "five"
    assert len(object_files(store)) == 5
    assert store.prune(keep_last=2).snapshots == 0
    assert store.verify().problems == ()
    assert store.merge("head", "side").meta["merged"]["ancestor"] == fork.get("head~1").id


def test_prune_keeps_what_an_open_store_stands_on(store: Store) -> None:
    for i in range(3):
        store.save(state(a=i), {"i": i, "auto": True})
    other = Store(store.folder)
    for i in range(3, 6):
        store.save(state(a=i), {"i": i, "auto": True})
    assert store.prune(keep_last=0).snapshots == 4
    assert [s.meta["i"] for s in store.log()] == [5, 2]
    other.save(state(a=9), {"i": 9})
    assert [s.meta["i"] for s in other.log()] == [9, 2]
    assert other.verify().problems == ()


def test_a_long_stream_of_automatic_snapshots_stays_small(store: Store) -> None:
    for i in range(30):
        store.save(state(a=i), {"auto": True})
        store.prune(keep_last=2)
    assert len(store.log()) == len(object_files(store)) == 2
    assert sum(s.pruned for s in store.log()) == 28
    assert (store.folder / "store.json").stat().st_size < 1000
    with pytest.raises(UserError, match="keep_last=-1 is no number of snapshots"):
        store.prune(-1)


def test_merge_averages_the_weights_and_nothing_else(store: Store) -> None:
    def learned(value: float, count: int) -> State:
        extra = {"w": torch.full((2,), value, dtype=torch.bfloat16), "n": torch.tensor(count)}
        return {"level-1": extra, "level-2": state(x=1)["x"], "level-1.rule": {"m": torch.full((2,), value)}}

    root = store.save(learned(1, 0), {"tokens": 0})
    a = store.save(learned(2, 1), {"tokens": 1, "auto": True})
    fork = store.fork("side", "head~1")
    b = fork.save(learned(6, 2), {"tokens": 2})
    made = store.merge("main", "side", 0.25, name="both")
    assert (made.parents, made.name, store.branches["main"]) == ((a.id, b.id), "both", made.id)
    assert made.meta == {"tokens": 1, "merged": {"with": b.id, "ancestor": root.id, "weight": 0.25}}
    assert same(store.load("both")[0], learned(2, 1) | {"level-1": learned(3, 1)["level-1"]})
    assert made.levels["level-2"] == root.levels["level-2"]
    assert store.log()[0].id == made.id
    assert {s.id for s in store.log()} == {made.id, a.id, b.id, root.id}
    assert store.merge(a.id, b.id, 0).levels == a.levels
    assert store.merge(a.id, b.id, 1).levels["level-1"] != b.levels["level-1"]  # the integer is that of a
    assert torch.equal(store.load()[0]["level-1"]["w"], learned(6, 2)["level-1"]["w"])


def test_merge_of_what_only_one_has_learned(store: Store) -> None:
    store.save(state(a=0), {})
    store.fork("side").save(state(a=0, slow=4), {})
    store.save(state(a=2), {})
    with pytest.raises(UserError, match=r"cannot merge 'slow': w was learned in one of .* only"):
        store.merge("main", "side")
    store.merge("main", "side", start={"w": torch.full((2, 3), 2.0)})
    assert same(store.load()[0], state(a=1, slow=3))
    with pytest.raises(UserError, match=r"weight 1\.5 is no share"):
        store.merge("main", "side", 1.5)
    store.save({"a": {"w": torch.zeros(5)}}, {})
    with pytest.raises(UserError, match=r"cannot merge 'a': w is \(5,\) in one and \(2, 3\) in the other"):
        store.merge("main", "side", start={"w": torch.zeros(5)})


def test_diff_names_what_moved_most(store: Store) -> None:
    def level(scale: float) -> dict[str, torch.Tensor]:
        return {f"t{i}": torch.tensor([3.0 * (i + 1), 4.0 * (i + 1)]) * (1 + scale * i) for i in range(8)}

    store.save({"fast": level(0), "still": level(0), "fast.rule": level(0)}, {}, name="a")
    store.save({"fast": level(0.1), "still": level(0), "fast.rule": level(9), "new": level(0)}, {}, name="b")
    found = store.diff("a", "b", measures={"loss on probe": (2.0, 1.5)})
    assert found.measures == {"loss on probe": (2.0, 1.5)}
    fast, new, still = found.levels
    assert (fast.name, fast.numbers, [b.name for b in fast.blocks]) == ("fast", 16, ["t7", "t6", "t5", "t4", "t3"])
    assert fast.blocks[0].relative == pytest.approx(0.7, rel=1e-6)
    assert fast.blocks[0].moved == pytest.approx(5 * 8 * 0.7, rel=1e-6)
    old, now = (torch.cat(list(level(s).values())).double() for s in (0, 0.1))
    assert fast.moved == pytest.approx(float((now - old).norm()), rel=1e-6)
    assert fast.relative == pytest.approx(float((now - old).norm() / old.norm()), rel=1e-6)
    assert (still.moved, still.relative, still.blocks) == (0.0, 0.0, ())
    assert (new.moved, new.numbers, len(new.unknown)) == (0.0, 0, 8)
    zero = store.diff("a", "b", start={f"t{i}": torch.zeros(2) for i in range(8)}).levels[1]
    assert (zero.relative, zero.numbers, zero.unknown) == (None, 16, ())
    assert found.to_dict()["levels"][0]["blocks"][0]["name"] == "t7"

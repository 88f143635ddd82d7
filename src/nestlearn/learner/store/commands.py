"""``nestlearn memory``: look at a memory store and change what its branches and names point at."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nestlearn.app import App
from nestlearn.errors import UserError
from nestlearn.json_option import Json, print_json

if TYPE_CHECKING:  # the store loads torch, and --help must not
    from rich.table import Table

    from nestlearn.learner.store import Snapshot, Store
    from nestlearn.learner.store.compare import LevelDiff

app = App(no_args_is_help=True, help="Look after a memory store: what a model has learned, as snapshots.")

Folder = Annotated[Path, typer.Argument(help="The folder of the store.", metavar="STORE")]
REF = "A name, a branch, an id or its first digits, or head; ~N goes back N parents."
Ref = Annotated[str, typer.Argument(help=REF, metavar="REF")]
RefA = Annotated[str, typer.Argument(help=REF, metavar="A")]
RefB = Annotated[str, typer.Argument(help="The same.", metavar="B")]
Branch = Annotated[str, typer.Option(help="The branch that head means, and that moves.")]


@app.command()
def log(store: Folder, ref: Ref = "head", branch: Branch = "main", as_json: Json = False) -> None:
    """List a snapshot and all that it was learned from, newest first.

    Example: nestlearn memory log memory/
    """
    opened = _open(store, branch)
    found, branches = opened.log(ref), opened.branches
    if as_json:
        print_json({"snapshots": [snapshot.to_dict() for snapshot in found], "branches": branches})
        return
    if not found:
        others = ", ".join(sorted({*branches, *opened.names}))
        elsewhere = f"branch {branch} of {store} holds no snapshot; give one of these as REF: {others}"
        print(elsewhere if others else f"{store} holds no snapshot yet")
        return
    table = _table("snapshot", "created (UTC)", "tokens", "loss", "MB", "known as", right={2, 3, 4})
    for snapshot in found:
        tips = [f"branch {name}" for name, tip in sorted(branches.items()) if tip == snapshot.id]
        known = ", ".join(part for part in (snapshot.name, *tips, _note(snapshot)) if part)
        created = snapshot.created[:16].replace("T", " ")
        tokens, loss = (_number(snapshot.meta.get(key)) for key in ("tokens", "loss"))
        _add(table, snapshot.short, created, tokens, loss, f"{snapshot.bytes / 1e6:,.1f}", known)
    away = sorted(set(branches) - {name for name, tip in branches.items() if tip in {s.id for s in found}})
    table.caption = f"other branches: {', '.join(away)}" if away else None
    _print(table)


@app.command()
def show(store: Folder, ref: Ref = "head", branch: Branch = "main", as_json: Json = False) -> None:
    """Show one snapshot: its levels, and what the learner wrote down.

    Example: nestlearn memory show memory/ after-manual
    """
    snapshot = _open(store, branch).get(ref)
    if as_json:
        print_json(snapshot.to_dict())
        return
    table = _table("level", "numbers", "MB", "sha256 of its file", right={1, 2})
    for name, level in sorted(snapshot.levels.items()):
        _add(table, name, f"{level.numbers:,}", f"{level.bytes / 1e6:,.1f}", level.object[:12])
    _print(
        f"snapshot  {snapshot.id}",
        f"name      {snapshot.name or '-'}",
        f"parents   {', '.join(snapshot.parents) or 'none'}{f' ({_note(snapshot)})' if _note(snapshot) else ''}",
        f"created   {snapshot.created}",
        f"base      {snapshot.base}",
        table,
        json.dumps(snapshot.meta, indent=2),
    )


@app.command()
def diff(store: Folder, a: RefA, b: RefB, branch: Branch = "main", as_json: Json = False) -> None:
    """Show how far each level moved between two snapshots, and which tensors most.

    Example: nestlearn memory diff memory/ head~1 head
    """
    found = _open(store, branch).diff(a, b)
    if as_json:
        print_json(found.to_dict())
        return
    table = _table("level and largest blocks", "numbers", "moved", "of its norm", right={1, 2, 3})
    for level in found.levels:
        _add(table, level.name, f"{level.numbers:,}", f"{level.moved:.4g}", _share(level.relative), style="bold")
        for block in level.blocks:
            _add(table, f"  {block.name}", "", f"{block.moved:.4g}", _share(block.relative))
        table.add_section()
    unknown = [_unknown(level) for level in found.levels if level.unknown]
    _print(f"from {found.a.name or found.a.short} to {found.b.name or found.b.short}", table, *unknown)


@app.command()
def rollback(store: Folder, ref: Ref, branch: Branch = "main", as_json: Json = False) -> None:
    """Let a branch go back, or anywhere else; the next learner goes on from there.

    What was learned since stays until gc, and for good if it has a name.

    Example: nestlearn memory rollback memory/ before-manual
    """
    opened = _open(store, branch)
    before = opened.head()
    now = opened.rollback(ref)
    if as_json:
        print_json({"branch": opened.branch, "from": before.id if before else None, "to": now.id})
        return
    back = f"; back with: nestlearn memory rollback {store} {before.short}" if before and before.id != now.id else ""
    _print(f"{opened.branch} is at {_title(now)}{back}")


@app.command()
def fork(
    store: Folder,
    new: Annotated[str, typer.Argument(help="Of the new branch.", metavar="NAME")],
    ref: Ref = "head",
    branch: Branch = "main",
    as_json: Json = False,
) -> None:
    """Begin a branch at a snapshot, to learn something without touching the branch that it comes from.

    Example: nestlearn memory fork memory/ experiment after-manual
    """
    at = _open(store, branch).fork(new, ref).get()
    print_json({"branch": new, "at": at.id}) if as_json else _print(f"{new} begins at {_title(at)}")


@app.command()
def merge(
    store: Folder,
    a: RefA,
    b: RefB,
    weight: Annotated[float, typer.Option(help="Share of B, from 0 to 1; A has the rest.")] = 0.5,
    name: Annotated[str | None, typer.Option(help="For the new snapshot.")] = None,
    move: Annotated[bool, typer.Option("--move", help="Take --name from the snapshot that has it.")] = False,
    branch: Branch = "main",
    as_json: Json = False,
) -> None:
    """Average what two snapshots learned since their common ancestor, level by level, as a new snapshot.

    Example: nestlearn memory merge memory/ main experiment --name both
    """
    opened = _open(store, branch)
    made = opened.merge(a, b, weight, name=name, move=move)
    if as_json:
        print_json({"branch": opened.branch, **made.to_dict()})
    else:
        _print(f"{opened.branch} is at {_title(made)}, made of {' and '.join(x[:12] for x in made.parents)}")


@app.command()
def drop(
    store: Folder,
    name: Annotated[str, typer.Argument(help="A name or a branch.", metavar="NAME")],
    as_json: Json = False,
) -> None:
    """Take a name or a branch away; gc then removes what nothing else reaches.

    Example: nestlearn memory drop memory/ experiment
    """
    _open(store, None).drop(name)
    print_json({"dropped": name}) if as_json else _print(f"dropped {name}")


@app.command()
def gc(store: Folder, as_json: Json = False) -> None:
    """Remove every snapshot that no branch, name or running learner reaches.

    Example: nestlearn memory gc memory/
    """
    removed = _open(store, None).gc()
    if as_json:
        print_json(vars(removed))
    else:
        size = f"{removed.bytes / 1e6:,.1f} MB"
        _print(f"removed {removed.snapshots:,} snapshots and {removed.objects:,} objects: {size}")


@app.command()
def verify(store: Folder, as_json: Json = False) -> None:
    """Read every file of the store and check it against its SHA-256. Exit code 2 if one is damaged.

    Example: nestlearn memory verify memory/
    """
    report = _open(store, None).verify()
    if as_json:
        print_json(vars(report))
    else:
        loose = f" ({report.unreachable:,} for gc)" if report.unreachable else ""
        size = f"{report.bytes / 1e6:,.1f} MB"
        _print(f"{report.snapshots:,} snapshots{loose}, {report.objects:,} objects, {size}", *report.problems)
    if report.problems:
        back = f"back to the newest whole snapshot with: nestlearn memory rollback {store} {(report.newest or '')[:12]}"
        remedy = back if report.newest else "none of its snapshots is whole, so learn anew in another folder"
        raise UserError(f"{store} is damaged (problems: {len(report.problems)}): {remedy}")
    if not as_json:
        _print("everything is whole")


def _open(folder: Path, branch: str | None) -> Store:
    from nestlearn.learner.store import Store

    return Store(folder) if branch is None else Store(folder, branch=branch)


def _title(snapshot: Snapshot) -> str:
    return f"{snapshot.short} ({snapshot.name})" if snapshot.name else snapshot.short


def _note(snapshot: Snapshot) -> str:
    notes = [
        "automatic" if snapshot.automatic else "",
        f"merged with {snapshot.parents[1][:12]}" if len(snapshot.parents) > 1 else "",
        f"{snapshot.pruned:,} pruned before it" if snapshot.pruned else "",
    ]
    return ", ".join(note for note in notes if note)


def _unknown(level: LevelDiff) -> str:
    more = f" and {len(level.unknown) - 1} more" if len(level.unknown) > 1 else ""
    return f"{level.name}, in one of them only: {level.unknown[0]}{more}"


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _share(value: float | None) -> str:
    return "from zero" if value is None else f"{value:.3%}"


def _table(*columns: str, right: set[int]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, caption_justify="left")
    for number, column in enumerate(columns):
        # Ids and numbers stay whole in a narrow terminal; names give way.
        table.add_column(column, justify="right" if number in right else "left", no_wrap=number == 0 or number in right)
    return table


def _add(table: Table, *cells: str, style: str | None = None) -> None:
    from rich.markup import escape

    table.add_row(*(escape(cell) for cell in cells), style=style)


def _print(*parts: Any) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for part in parts:
        if isinstance(part, str):
            console.print(part, markup=False, soft_wrap=True)
        else:
            console.print(part)

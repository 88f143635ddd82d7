"""``report.md``: what a run folder of the speed suite holds, as tables beside the command that made them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nestlearn.files import read_json, write_atomic
from nestlearn.tasks.layout import table
from nestlearn.tasks.speed import EXPERIMENTS
from nestlearn.tasks.speed.timing import AGAIN

TITLES = {
    "block": "One block, forward and backward",
    "one-token": "One block, one token a call",
    "model": "A training step of a whole model",
    "prefill": "Reading a prompt",
    "decode": "Token by token, at growing contexts",
    "stream": "A long stream",
    "memory": "Memory of forward and backward",
    "muon": "A step of Muon",
}
HEAD = (
    "Candidates take turns, one run each a round. Seconds are medians over the rounds, best in parentheses; a ratio is "
    "taken within a round: `1.62 (1.55 to 1.66)` is its median and quartiles. `again` is the same candidate once more: "
    "its ratio says how much the machine's noise moves any other. `of product` is the share of the machine's best "
    "matrix product that the useful operations reach (`nestlearn.tasks.speed.operations`)."
)

Found = Mapping[str, Mapping[str, Any]]  # cells by name


def write(folder: Path) -> Path:
    """Write ``report.md`` from the ``NAME.json`` in ``folder``; its path. Raises `UserError` for a damaged file."""
    parts = ["# Speed\n", HEAD + "\n"]
    for name in EXPERIMENTS:
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        kept = read_json(path, f"delete it and run nestlearn bench speed --only {name} again")
        parts.append(f"## {TITLES[name]}\n")
        commits = ", ".join(sorted({str(commit) for commit in kept["commits"].values()}))
        parts.append(f"    {kept['command']}\n\n{kept['machine']}, commit {commits}.\n")
        parts += WRITE[name](kept["cells"])
        if name in ("block", "one-token"):
            versions = ", ".join(f"{peer} {version}" for peer, version in kept["peers"].items())
            parts.append(f"Peers: {versions or 'none installed'}.\n")
            parts += [f"{peer}: not run, {reason}\n" for peer, reason in kept["not_run"].items()]
    text = "\n".join(parts)
    write_atomic(folder / "report.md", lambda beside: beside.write_text(text, encoding="utf-8"))
    return folder / "report.md"


def blocks(found: Found) -> Iterator[str]:
    """A table for every size and chunk."""
    for name, cell in found.items():
        _, dim, seq, batch, chunk = name.split("-")
        yield f"**dim {dim[1:]}, seq {seq[1:]}, batch {batch[1:]}, chunk {chunk[1:]}**. {ceiling(cell)}\n"
        yield timed(cell["rows"], "tokens/s", of_product=True)


def one_token(found: Found) -> Iterator[str]:
    for cell in found.values():
        yield timed(cell["rows"], "tokens/s")


def models(found: Found) -> Iterator[str]:
    """A table for every model and length."""
    for name, cell in found.items():
        _, size, length = name.split("-")
        parameters = ", ".join(f"{model} {count:,}" for model, count in cell["parameters"].items())
        limits = f" {ceiling(cell)}" if "ceilings" in cell else ""
        yield f"**{size}, {int(length):,} tokens**, parameters: {parameters}.{limits}\n"
        yield timed(cell["rows"], "tokens/s")


def decode(found: Found) -> Iterator[str]:
    for cell in found.values():
        rows = [*cell["rows"], *cell["streams"], *cell["llama"]]
        yield timed(rows, "tokens/s", state=cell["state_bytes"])


def stream(found: Found) -> Iterator[str]:
    for cell in found.values():
        header = ["tokens read", "tokens/s", "process memory, MB", "state, MB", "largest number in the state", "finite"]
        rows, before = [], 0
        for point in cell["points"]:
            speed = (point["tokens"] - before) / point["seconds"]
            before = point["tokens"]
            sizes = [f"{point[key] / 1e6:,.2f}" for key in ("rss", "state_bytes")]
            finite = "yes" if point["finite"] else "NO"
            rows.append([f"{before:,}", f"{speed:,.0f}", *sizes, f"{point['largest']:.3g}", finite])
        yield table(header, rows)


def memory(found: Found) -> Iterator[str]:
    cells = {tuple(name.split("-")[1:]): cell for name, cell in found.items() if name != "memory-kept"}
    kinds = sorted({(size, model) for size, model, _ in cells})
    lengths = sorted({int(length) for *_, length in cells})
    texts = [
        [f"{size}, {model}", *(_megabytes(cells.get((size, model, str(length)))) for length in lengths)]
        for size, model in kinds
    ]
    yield "MB above a process that has made a short step; each in a process of its own.\n"
    yield table(["model", *(f"{length:,} tokens" for length in lengths)], texts)
    if "memory-kept" in found:
        yield "One block: MB that the graph holds between forward and backward pass.\n"
        kept = found["memory-kept"]
        header = ["block", *(f"{length:,} tokens" for length in kept["lengths"]), "a state for each of these"]
        rows = [(row["name"], *row["bytes"], row["states"]) for row in kept["rows"]]
        yield table(header, [[name, *(f"{size / 1e6:,.1f}" for size in sizes)] for name, *sizes in rows])


def muon(found: Found) -> Iterator[str]:
    for cell in found.values():
        yield f"{cell['parameters']:,} parameters in hidden matrices.\n"
        yield timed(cell["rows"], "steps/s")


WRITE = {
    "block": blocks,
    "one-token": one_token,
    "model": models,
    "prefill": models,
    "decode": decode,
    "stream": stream,
    "memory": memory,
    "muon": muon,
}


def timed(
    rows: Sequence[Mapping[str, Any]], unit: str, of_product: bool = False, state: Mapping[str, int] | None = None
) -> str:
    """A table of `nestlearn.tasks.speed.timing.rows`; one column for every candidate that others are compared with."""
    others = list(dict.fromkeys(o for row in rows if not row["name"].endswith(AGAIN) for o in row["times_as_fast"]))
    labels = [f"times as fast as {other}" for other in others]
    again = any(row["name"].endswith(AGAIN) for row in rows)
    header = ["candidate", "seconds (best)", unit, *(["of product"] if of_product else []), *labels]
    header += (["as the same before"] if again else []) + (["state, MB"] if state else [])
    lines = []
    for row in rows:
        line = [row["name"], f"{row['seconds']:.3g} ({row['best']:.3g})", f"{row['per_second']:,.4g}"]
        if of_product:
            line.append(f"{row['of_product']:.2f}" if "of_product" in row else "")
        repeats = row["name"].endswith(AGAIN)
        line += [_ratio(None if repeats else row["times_as_fast"].get(other)) for other in others]
        if again:
            line.append(_ratio(row["times_as_fast"].get(row["name"].removesuffix(AGAIN)) if repeats else None))
        if state:
            line.append(f"{state[row['name']] / 1e6:,.2f}" if row["name"] in state else "")
        lines.append(line)
    return table(header, lines)


def ceiling(cell: Mapping[str, Any]) -> str:
    """The machine in the same minutes, in a sentence."""
    limits = cell["ceilings"]
    return (
        f"Matrix product {limits['gflops']:.0f} GFLOP/s (median {limits['gflops_median']:.0f}), copy "
        f"{limits['gigabytes_per_second']:.1f} GB/s."
    )


def _ratio(found: Mapping[str, float] | None) -> str:
    return "" if found is None else f"{found['ratio']:.3g} ({found['low']:.3g} to {found['high']:.3g})"


def _megabytes(cell: Mapping[str, Any] | None) -> str:
    if cell is None or "not_run" in cell:
        return "not run" if cell is None else f"not run: {cell['not_run']}"
    return f"{cell['bytes'] / 1e6:,.0f}"

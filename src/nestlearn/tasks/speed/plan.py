"""What the speed suite runs at each scale: every cell with its arguments."""

from __future__ import annotations

from typing import Any

from nestlearn.tasks.cells import Cell
from nestlearn.tasks.speed import block, decoding, memory, model, muon, peers
from nestlearn.tasks.speed.model import HOPE, LLAMA

CEILING = {
    "smoke": dict(product=100, megabytes=1),
    "cpu": dict(product=2000, megabytes=256),
    "full": dict(product=2000, megabytes=256),
}
# At (dim 512, seq 2048, batch 4) nested-learning takes minutes for a step and is left out but at the full scale.
BLOCKS = {
    "smoke": [dict(dim=16, seq=48, batch=1, chunk=16, heads=[4, 1], rounds=2, budget=1.0)],
    "cpu": [
        *(dict(dim=256, seq=512, batch=1, chunk=c, heads=[4, 1], rounds=9, budget=8.0) for c in (16, 32, 64)),
        *(dict(dim=512, seq=2048, batch=4, chunk=c, heads=[4], rounds=3, budget=15.0) for c in (16, 32, 64)),
    ],
    "full": [
        *(dict(dim=256, seq=512, batch=1, chunk=c, heads=[4, 1], rounds=15, budget=60.0) for c in (16, 32, 64)),
        *(dict(dim=512, seq=2048, batch=4, chunk=c, heads=[4, 1], rounds=5, budget=120.0) for c in (16, 32, 64)),
    ],
}
SLOW = "nested-learning"  # timed at one chunk size and the small block, but at the full scale
ONE_TOKEN = {
    "smoke": dict(dim=16, chunk=16, tokens=4, heads=[4], rounds=2, budget=1.0),
    "cpu": dict(dim=256, chunk=64, tokens=64, heads=[4, 1], rounds=7, budget=5.0),
    "full": dict(dim=256, chunk=64, tokens=128, heads=[4, 1], rounds=15, budget=30.0),
}
MODELS = {
    "smoke": [("nano", 64)],
    "cpu": [("tiny", 512), ("tiny", 2048), ("tiny", 8192), ("25m", 512), ("25m", 2048)],
    "full": [(size, seq) for size in ("tiny", "25m") for seq in (512, 2048, 8192)],
}
PREFILL = {"smoke": [("nano", 128)], "cpu": [("tiny", 8192), ("25m", 8192)], "full": [("tiny", 8192), ("25m", 8192)]}
EFFORT = {
    "smoke": dict(rounds=2, budget=1.0),
    "cpu": dict(rounds=7, budget=15.0),
    "full": dict(rounds=15, budget=120.0),
}
DECODE = {
    "smoke": dict(size="nano", contexts=[64, 256], steps=16, beside=2, streams=2, piece=64, rounds=2, budget=1.0),
    "cpu": dict(
        size="tiny",
        contexts=[1024, 16_384, 262_144],
        steps=64,
        beside=4,
        streams=16,
        piece=2048,
        rounds=9,
        budget=10.0,
    ),
    "full": dict(
        size="tiny",
        contexts=[1024, 16_384, 262_144],
        steps=256,
        beside=8,
        streams=16,
        piece=2048,
        rounds=15,
        budget=60.0,
    ),
}
STREAM = {
    "smoke": dict(size="nano", tokens=2000, piece=256, points=4),
    "cpu": dict(size="tiny", tokens=200_000, piece=2048, points=10),
    "full": dict(size="tiny", tokens=10_000_000, piece=2048, points=20),
}
MEMORY = {
    "smoke": [("nano", 128)],
    "cpu": [("tiny", seq) for seq in (512, 2048, 8192)],
    "full": [("tiny", seq) for seq in (512, 2048, 8192, 32_768)] + [("25m", seq) for seq in (512, 2048, 8192)],
}
KEPT = {
    "smoke": dict(dim=16, chunk=16, heads=[2], lengths=[32, 64]),
    "cpu": dict(dim=256, chunk=64, heads=[4, 1], lengths=[512, 1024, 2048, 4096]),
    "full": dict(dim=256, chunk=64, heads=[4, 1], lengths=[512, 1024, 2048, 4096, 8192]),
}
MUON = {"smoke": dict(layers=1, width=16), "cpu": dict(layers=6, width=512), "full": dict(layers=12, width=768)}


def cells(experiment: str, scale: str) -> list[Cell]:
    """The cells of one of `nestlearn.tasks.speed.EXPERIMENTS`, in the order in which they run."""
    return {
        "block": _blocks,
        "one-token": _one_token,
        "model": lambda s: _models("model", model.train, MODELS[s], {**EFFORT[s], **CEILING[s]}),
        "prefill": lambda s: _models("prefill", model.prefill, PREFILL[s], EFFORT[s]),
        "decode": lambda s: [Cell("decode", decoding.decode, DECODE[s])],
        "stream": lambda s: [Cell("stream", decoding.stream, STREAM[s])],
        "memory": _memory,
        "muon": lambda s: [Cell("muon", muon.step, {**MUON[s], **EFFORT[s]})],
    }[experiment](scale)


def _blocks(scale: str) -> list[Cell]:
    there = list(peers.installed())
    found = []
    for work in BLOCKS[scale]:
        slow = scale != "cpu" or (work["dim"], work["chunk"]) == (256, 64)
        others = [peer for peer in there if slow or peer != SLOW]
        name = "block-d{dim}-t{seq}-b{batch}-c{chunk}".format(**work)
        found.append(Cell(name, block.train, {**work, "others": others, **CEILING[scale]}))
    return found


def _one_token(scale: str) -> list[Cell]:
    return [Cell("one-token", block.one_token, {**ONE_TOKEN[scale], "others": list(peers.installed())})]


def _models(label: str, function: Any, works: list[tuple[str, int]], arguments: dict[str, Any]) -> list[Cell]:
    length = "seq" if label == "model" else "tokens"
    return [Cell(f"{label}-{size}-{n}", function, {"size": size, length: n, **arguments}) for size, n in works]


def _memory(scale: str) -> list[Cell]:
    names = {HOPE: "hope", LLAMA: "llama"}
    peaks = [
        Cell(f"memory-{size}-{short}-{seq}", memory.peak, {"size": size, "model": name, "seq": seq})
        for size, seq in MEMORY[scale]
        for name, short in names.items()
    ]
    return [*peaks, Cell("memory-kept", memory.kept, KEPT[scale])]

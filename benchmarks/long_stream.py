"""A long stream through `nestlearn learn`: memory over time, and whether kill -9 at random moments changes one bit.

python benchmarks/long_stream.py [--tokens 1000000 --kills 20] [--json FILE]

One run reads the whole text. Another is killed, and started again by the same command, at moments drawn before it
begins; the last start is left to finish. Then the newest snapshots of both stores are compared, tensor by tensor and
field by field. The model is a tiny Llama of random weights that reads the bytes of the standard library's sources.
Needs psutil.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nestlearn.convert import Level, LevelsConfig, convert
from nestlearn.data import load_tokenizer
from nestlearn.data.stdlib_corpus import stdlib_documents
from nestlearn.learner.store import Store

NESTLEARN = Path(sys.executable).with_name("nestlearn")
EVERY = 2.0  # seconds between two samples
AUTOSAVE = 16384  # tokens between two snapshots, the default of the command
MB = 1e6


Sample = dict[str, float]


@dataclass
class Kill:
    """``delay`` seconds after the store has ``after`` tokens, ``loading`` more if it has them when the process starts.

    What came of it: the process ``lived`` so many seconds; the newest snapshot had read so many tokens when last
    ``seen`` before the kill, and after it so many were ``kept``.
    """

    after: int
    delay: float
    loading: float
    lived: float = 0.0
    seen: int = 0
    kept: int = 0


def prepare(folder: Path, tokens: int) -> None:
    """A converted model, and a text of so many tokens: bytes."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=258, max_position_embeddings=512, initializer_range=0.1, **size))
    base.save_pretrained(folder / "base")
    load_tokenizer("bytes").save_pretrained(folder / "base")
    base.config.name_or_path = str(folder / "base")
    levels = tuple(Level(period, 1e-3) for period in (512, 1024, 2048))
    convert(base, LevelsConfig(levels=levels, layers="all")).save_pretrained(folder / "model")
    text = "\n".join(source for _, source in stdlib_documents()).encode("ascii", "replace")
    (folder / "text.txt").write_bytes((text * (tokens // len(text) + 1))[:tokens])


def start(folder: Path, store: str) -> subprocess.Popen[bytes]:
    command = [NESTLEARN, "learn", "model", "--store", store, "text.txt", "--json"]
    with (folder / f"{store}.json").open("wb") as out:
        return subprocess.Popen(command, cwd=folder, stdout=out, env={**os.environ, "OMP_NUM_THREADS": "1"})


def watch(process: subprocess.Popen[bytes], store: Path, began: float, kill: Kill | None = None) -> list[Sample]:
    """Samples until the process ends by itself, or is killed at some moment."""
    samples: list[Sample] = []
    measured, born, due = psutil.Process(process.pid), time.perf_counter(), 0.0
    moment = float("inf") if kill is None or tokens_in(store) < kill.after else born + kill.delay + kill.loading
    while process.poll() is None and (now := time.perf_counter()) < moment:
        tokens = tokens_in(store)
        if kill is not None:
            kill.seen = tokens
            if moment == float("inf") and tokens >= kill.after:
                moment = now + kill.delay
        if now >= due:
            sample = {"seconds": now - began, "tokens": tokens, "store": size_of(store), "rss": rss_of(measured)}
            samples.append({name: round(value, 2) for name, value in sample.items()})
            due = now + EVERY
        time.sleep(max(0.0, min(0.05, moment - time.perf_counter())))
    if process.poll() is None:
        process.kill()
    process.wait()
    if kill is not None:
        kill.lived = round(time.perf_counter() - born, 2)
    return samples


def rss_of(process: psutil.Process) -> float:
    try:
        return process.memory_info().rss / MB
    except psutil.NoSuchProcess:
        return 0.0


def size_of(store: Path) -> float:
    total = 0
    for path in store.rglob("*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # written beside, and renamed since
            continue
    return total / MB


def tokens_in(store: Path) -> int:
    """How far the newest snapshot has come, without a lock that the learner would have to wait for."""
    try:
        head = json.loads((store / "store.json").read_text())["branches"]["main"]
        return json.loads((store / "snapshots" / f"{head}.json").read_text())["meta"]["learner"]["read"]
    except (FileNotFoundError, KeyError):
        return 0


def straight(folder: Path) -> dict[str, Any]:
    began = time.perf_counter()
    process = start(folder, "straight")
    samples = watch(process, folder / "straight", began)
    if process.returncode:
        raise SystemExit(f"nestlearn learn ended with {process.returncode}")
    read = json.loads((folder / "straight.json").read_text())["reads"][0]
    first = next((s for s in samples if s["tokens"]), samples[-1])  # everything has been loaded and used once
    return {
        "seconds": time.perf_counter() - began,
        "tokens": read["tokens"],
        "loss": read["loss"],
        "refused": len(read["skipped"]),
        "moved": [level["moved"] for level in read["levels"]],
        "reading_seconds": read["seconds"],
        "rss_first": first["rss"],
        "rss_last": max(s["rss"] for s in samples[-5:]),  # the last alone may be of a process that has let go
        "rss_most": max(s["rss"] for s in samples),
        "store_most": max(s["store"] for s in samples),
        "samples": samples,
    }


def killed(folder: Path, kills: int, run: dict[str, Any], seed: int) -> dict[str, Any]:
    choose = random.Random(seed)
    save = AUTOSAVE * run["reading_seconds"] / run["tokens"]  # seconds between two snapshots
    loading = run["seconds"] - run["reading_seconds"]
    # Tokens in order, so that the kills lie all over the text; two that are close make one while a process loads.
    # None lies in the last tenth, which a start could finish before it is killed.
    places = sorted(choose.randrange(run["tokens"] * 9 // 10) for _ in range(kills))
    plan = [Kill(place // AUTOSAVE * AUTOSAVE, choose.uniform(0, save), choose.uniform(0, loading)) for place in places]
    samples: list[Sample] = []
    problems = []
    began = time.perf_counter()
    for kill in plan:
        process = start(folder, "killed")
        samples += watch(process, folder / "killed", began, kill)
        if process.returncode != -signal.SIGKILL:
            raise SystemExit(f"a start ended with {process.returncode} before it was killed")
        problems += verify(folder / "killed") if (folder / "killed" / "store.json").exists() else []
        kill.kept = tokens_in(folder / "killed")
        print(f"killed after {kill.lived:.1f} s, {kill.kept:,} tokens kept", file=sys.stderr, flush=True)
    process = start(folder, "killed")
    samples += watch(process, folder / "killed", began)
    if process.returncode:
        raise SystemExit(f"the last start ended with {process.returncode}")
    resumed = json.loads((folder / "killed.json").read_text())["reads"][0]["resumed"]
    known = [tokens for kill in plan for tokens in (kill.seen, kill.kept)]
    store_last = size_of(folder / "killed")
    subprocess.run([NESTLEARN, "memory", "gc", folder / "killed"], capture_output=True, check=True)
    return {
        "seconds": time.perf_counter() - began,
        "kills": [vars(kill) for kill in plan],
        "lost": any(after < before for before, after in pairwise([*known, resumed])),
        "resumed_at": resumed,
        "problems": problems,
        "rss_most": max(s["rss"] for s in samples),
        "store_most": max(s["store"] for s in samples),
        "store_last": store_last,
        "store_after_gc": size_of(folder / "killed"),
        "samples": samples,
    }


def verify(store: Path) -> list[str]:
    """What the command has to say against the store."""
    done = subprocess.run([NESTLEARN, "memory", "verify", store], capture_output=True, text=True, check=False)
    return [] if done.returncode == 0 else (done.stdout + done.stderr).splitlines()


def differences(folder: Path) -> tuple[int, list[str]]:
    """How many tensors the newest snapshots have, and where they are not the same to the bit."""
    (ours, one), (theirs, two) = (Store(folder / name).load() for name in ("straight", "killed"))
    flat = [{f"{g}/{n}": t for g, tensors in side.items() for n, t in tensors.items()} for side in (ours, theirs)]
    names = flat[0].keys() | flat[1].keys()
    found = [n for n in names if not all(n in side for side in flat) or bits(flat[0][n]) != bits(flat[1][n])]
    if {**one.meta, "auto": None} != {**two.meta, "auto": None}:
        found.append("meta: clocks, statistics and what was read")
    return len(names), sorted(found)


def bits(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, help="where to write the samples, too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, args.tokens)
        digest = hashlib.sha256((folder / "text.txt").read_bytes()).hexdigest()
        run = straight(folder)
        torn = killed(folder, args.kills, run, args.seed)
        compared, differing = differences(folder)
        problems = [*torn["problems"], *verify(folder / "straight"), *verify(folder / "killed")]
    if args.json is not None:
        rows = {"tokens": args.tokens, "text": digest, "python": sys.version.split()[0], "torch": torch.__version__}
        rows |= {"compared": compared, "differing": differing, "problems": problems}
        args.json.write_text(json.dumps({**rows, "straight": run, "killed": torn}, indent=1) + "\n")
    print("| run | seconds | loss | RSS at the first snapshot | at the end | most | store, most |")
    print("|---|---|---|---|---|---|---|")
    print(
        f"| uninterrupted | {run['seconds']:.0f} | {run['loss']:.4f} | {run['rss_first']:.0f} MB | "
        f"{run['rss_last']:.0f} MB | {run['rss_most']:.0f} MB | {run['store_most']:.2f} MB |"
    )
    after = f"{torn['store_most']:.2f} MB, {torn['store_after_gc']:.2f} MB after gc"
    print(f"| killed {args.kills} times | {torn['seconds']:.0f} | | | | {torn['rss_most']:.0f} MB | {after} |\n")
    lost = "some" if torn["lost"] else "none"
    print(f"{compared} tensors compared, {len(differing)} differ" + (f": {differing}" if differing else ""))
    print(f"snapshots lost: {lost}; damaged files: {len(problems)}")
    if differing or problems or torn["lost"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()

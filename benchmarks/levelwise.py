"""What updates cost: parameters written, time and gradient memory against the number of levels and their periods.

Section 7.1 claims that levels make updates cheap, since a slow level is written rarely. By Eq. 71 a token writes
``L_layer * sum_l P_l / C_l`` parameters (P_l: of one level, C_l: its chunk size in tokens). Here that is counted, by
comparing the weights before and after, in training (AdamW behind a `LevelwiseOptimizer`) and along a stream (the
levels' local objective), beside the time. All models have the same parameters, split evenly over their levels.
Candidates take turns; a round is one period of the slowest level. Times are means over a round, medians of the rounds,
of the processor on one thread, so that a busy machine does not count.

    OMP_NUM_THREADS=1 python benchmarks/levelwise.py --json benchmarks/results/levelwise.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nestlearn.nn import ContinuumMemory, LevelUpdate, continuum_periods
from nestlearn.optim import LevelwiseOptimizer

DIM, HIDDEN, LAYERS = 128, 768, 2
BATCH, LENGTH = 2, 64
TOKENS = BATCH * LENGTH  # of one optimizer step
ROUND = 64  # steps
BY_LEVELS = [[1], [1, 4], [1, 4, 16], [1, 4, 16, 64]]  # periods in steps, fast to slow
BY_PERIOD = [[1, 16], [1, 64]]
STREAM = 2048  # tokens


class Stack(nn.Module):
    """Layers of continuum memories of equal size for any number of levels."""

    def __init__(self, chunk_sizes: list[int], **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(ContinuumMemory(DIM, chunk_sizes, hidden=HIDDEN, **options) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)[0]
        return x


@dataclass
class Candidate:
    """One setting in training, and what its rounds have shown."""

    periods: list[int]
    error: str  # "none": the inner optimizer alone, every level at every step
    step: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model = Stack([period * TOKENS for period in self.periods])
        inner = torch.optim.AdamW(self.model.parameters(), lr=1e-4)
        periods = continuum_periods(self.model, TOKENS)
        self.optimizer = inner if self.error == "none" else LevelwiseOptimizer(inner, periods, self.error)

    def formula(self) -> float:
        """Parameters written per step, ``sum P_l / C_l`` with C_l in steps; every level if there are no periods."""
        levels = [level for layer in self.model.layers for level in layer.levels]
        every = [1] * len(self.periods) if self.error == "none" else self.periods
        sizes = [sum(p.numel() for p in level.parameters()) for level in levels]
        return sum(size / period for size, period in zip(sizes, every * LAYERS, strict=True))

    def count(self) -> dict[str, float]:
        """Of one round: parameters written, and numbers held as gradients, means per step."""
        written, asked, kept = 0, 0, 0
        for _ in range(ROUND):
            before = [p.detach().clone() for p in self.model.parameters()]
            self.backward()
            asked += sum(p.grad.numel() for p in self.model.parameters() if p.grad is not None)
            self.optimizer.step()
            self.optimizer.zero_grad()
            pairs = zip(before, self.model.parameters(), strict=True)
            written += sum(p.numel() for b, p in pairs if not torch.equal(b, p))
            held = self.optimizer.state_dict().get("levelwise", {"kept": {}})["kept"]
            kept += sum(g.numel() for g in held.values())
        return {"written": written / ROUND, "gradients": asked / ROUND, "kept": kept / ROUND}

    def backward(self) -> None:
        x = torch.randn(BATCH, LENGTH, DIM)
        (self.model(x) - x.roll(1, 1)).square().mean().backward()

    def time(self) -> None:
        """One round."""
        update, begin = 0.0, time.process_time()
        for _ in range(ROUND):
            self.backward()
            now = time.process_time()
            self.optimizer.step()
            self.optimizer.zero_grad()
            update += time.process_time() - now
        self.step.append((time.process_time() - begin) / ROUND)
        self.update.append(update / ROUND)


def in_training(rounds: int) -> list[dict[str, Any]]:
    """Every candidate's costs."""
    candidates = [Candidate([1], "none"), Candidate([1, 4, 16, 64], "none")]
    candidates += [Candidate(p, "mean") for p in BY_LEVELS]
    candidates += [Candidate(p, error) for error in ("sum", "last") for p in BY_LEVELS + BY_PERIOD]
    counts = [candidate.count() for candidate in candidates]
    for _ in range(rounds):
        for candidate in candidates:
            candidate.time()
    rows = []
    for c, count in zip(candidates, counts, strict=True):
        row = {"periods": c.periods, "error": c.error, "parameters": sum(p.numel() for p in c.model.parameters())}
        row |= {"formula": c.formula(), **count}
        row |= {"ms_per_step": 1e3 * statistics.median(c.step), "ms_in_step": 1e3 * statistics.median(c.update)}
        row["us_per_token"] = 1e3 * row["ms_per_step"] / TOKENS
        rows.append(row)
    return rows


def along_a_stream(rounds: int) -> list[dict[str, Any]]:
    """One layer that learns along the stream, under no_grad: weights written per token and time per token."""
    rows = []
    for chunks in ([16], [16, 64], [16, 64, 256], [16, 64, 256, 1024]):
        torch.manual_seed(0)
        layer = ContinuumMemory(DIM, chunks, hidden=HIDDEN, online="local", update=LevelUpdate("sgd", lr=0.01))
        for level in layer.levels:
            nn.init.normal_(level.value, std=DIM**-0.5)  # a fresh level's value is zero, and writes nothing to W_up
        x = torch.randn(1, STREAM, DIM)
        with torch.no_grad():
            state, written = layer.begin(1), 0
            for i in range(0, STREAM, chunks[0]):
                before = [level.weights for level in state.levels]
                _, state = layer(x[:, i : i + chunks[0]], state)
                for old, level in zip(before, state.levels, strict=True):
                    written += sum(w.numel() for v, w in zip(old, level.weights, strict=True) if not v.eq(w).all())
            seconds = []
            for _ in range(rounds):
                begin = time.process_time()
                layer(x)
                seconds.append(time.process_time() - begin)
        sizes = [sum(w.numel() for w in level.weights) for level in layer.levels]
        formula = sum(size / chunk for size, chunk in zip(sizes, chunks, strict=True))
        row = {"chunk_sizes": chunks, "weights": sum(sizes), "formula": formula, "written": written / STREAM}
        rows.append({**row, "us_per_token": 1e6 * statistics.median(seconds) / STREAM})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of every candidate")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    training, stream = in_training(args.rounds), along_a_stream(args.rounds)

    print(f"training: {training[0]['parameters']:,} parameters, {TOKENS} tokens a step, AdamW; per step\n")
    head = ["periods", "error", "written", "formula", "gradients", "kept", "step() ms", "all ms", "us/token"]
    print(f"| {' | '.join(head)} |\n|---|---{'|---:' * (len(head) - 2)}|")
    for r in training:
        share = lambda name, r=r: f"{r[name] / r['parameters']:.3f}"  # noqa: E731
        print(
            f"| {r['periods']} | {r['error']} | {share('written')} | {share('formula')} | {share('gradients')} | "
            f"{share('kept')} | {r['ms_in_step']:.2f} | {r['ms_per_step']:.1f} | {r['us_per_token']:.0f} |"
        )
    print(f"\nalong a stream: one layer, {stream[0]['weights']:,} weights, {STREAM} tokens; per token\n")
    print("| chunk sizes | weights written | formula | us/token |\n|---|---:|---:|---:|")
    for r in stream:
        print(f"| {r['chunk_sizes']} | {r['written']:,.0f} | {r['formula']:,.0f} | {r['us_per_token']:.0f} |")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        work = {"dim": DIM, "hidden": HIDDEN, "layers": LAYERS, "tokens_per_step": TOKENS, "steps_of_a_round": ROUND}
        result = {**work, "rounds": args.rounds, "torch": torch.__version__, "python": platform.python_version()}
        args.json.write_text(json.dumps({**result, "training": training, "stream": stream}, indent=2) + "\n")


if __name__ == "__main__":
    main()

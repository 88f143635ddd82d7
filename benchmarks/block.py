"""One sequence block, forward and backward: nestlearn beside the public implementations, in the same run.

Work: x (batch, seq, dim) float32 with gradient, ``block(x).square().mean().backward()``. Candidates take turns,
one repetition each, so that a machine that slows down slows all of them; the same candidate timed twice gives
the noise. ``--memory`` says what a training step keeps for its backward pass, by the length of the sequence.
Peers that are not installed are named and left out:

    pip install -e '.[oracles]'
    pip install --no-deps nested-learning==0.2.0      # its own dependencies exclude transformers 5
    python benchmarks/block.py --json benchmarks/results/block.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from nestlearn.nn import SelfReferentialTitans

Step = Callable[[Tensor], None]


def train_step(block: Callable[[Tensor], Tensor]) -> Step:
    """Forward and backward of ``block``."""
    return lambda x: block(x).square().mean().backward()


def ours(dim: int, chunk: int) -> dict[str, Step]:
    """Self-referential Titans: five memories with self-generated values, outer gradient through all writes."""
    steps = {}
    for memory in ("linear", "mlp"):
        for heads in (4, 1):
            layer = SelfReferentialTitans(dim, heads, chunk, memory=memory)
            steps[f"nestlearn, five {memory} memories, {heads} heads"] = train_step(lambda x, layer=layer: layer(x)[0])
    return steps


def titans_pytorch(dim: int, chunk: int) -> dict[str, Step]:
    """One MLP memory of depth 2, hidden width ``dim``, re-linearised every chunk, no momentum, one head."""
    from titans_pytorch import NeuralMemory

    memory = NeuralMemory(
        dim=dim,
        default_model_kwargs={"depth": 2, "expansion_factor": 1.0},
        chunk_size=chunk,
        batch_size=chunk,
        momentum=False,
    )
    return {"titans-pytorch 0.5.5, one memory": train_step(lambda x: memory(x)[0])}


def nested_learning(dim: int, chunk: int) -> dict[str, Step]:
    """Five MLP memories, but under ``no_grad``: this peer has a forward pass with writes and no backward."""
    from nested_learning.titan.self_modifying import SelfModifyingTitans, SelfModifyingTitansConfig

    layer: nn.Module = SelfModifyingTitans(
        SelfModifyingTitansConfig(dim=dim, chunk_size_other=chunk, chunk_size_memory=chunk, use_skip=False)
    )
    forward = lambda x: layer.forward_with_updates(x, layer.init_fast_state())  # noqa: E731
    return {"nested-learning 0.2.0, five memories, forward only": forward}


def useful_operations(memory: str, dim: int, heads: int, chunk: int) -> float:
    """Floating-point operations per token, forward and backward, that the block cannot do without: products only, two
    operations a multiplication, triangles at half, three times the forward pass. Hidden width d, memories of eta,
    alpha, k, v and the main one."""
    d = dim / heads
    if memory == "linear":
        rows = 3 * d + 2
        # k, v and the gates; values; erasure; state; the read of state and start; then the tables.
        core = 2 * d * (2 * d + 2) + 3 * 2 * d * rows + 2 * 2 * d * d + chunk * (3 * d + rows)
    else:
        # W2 and W1 of: what is generated (4 + 2), keys and values (10 + 6), the error's way back (3), erasure (5),
        # state (5 + 3), the read of state and start (4); the gates' W1, vectors; then the tables.
        core = 2 * 42 * d * d + 2 * 10 * d + chunk * 10 * d
    return 3 * (heads * core + 2 * 5 * dim * dim)  # and the projections q, k, v, gate and out


def kept_for_backward(step: Step, x: Tensor) -> int:
    """Bytes of distinct storage that the graph of one step holds, weights of the block aside."""
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter):
            storage = t.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step(x.clone().requires_grad_())
    return sum(kept.values())


def report_memory(dim: int, chunk: int, lengths: tuple[int, ...] = (512, 1024, 2048, 4096)) -> None:
    """MiB kept for the backward pass by sequence length, and what one state a token would take."""
    print(f"dim {dim}, batch 1, chunk {chunk}: MiB kept for the backward pass at {lengths} tokens")
    for name, step in ours(dim, chunk).items():
        kept = [kept_for_backward(step, torch.randn(1, seq, dim)) / 2**20 for seq in lengths]
        heads = int(name.split()[-2])
        state = (3 * dim // heads + 2) * dim if "linear" in name else (8 * dim // heads + 2) * dim
        naive = "  ".join(f"{seq * state * 4 / 2**20:.0f}" for seq in lengths)
        print(f"{name:46s} {'  '.join(f'{k:.0f}' for k in kept)}   (a state a token: {naive})")


def time_in_turns(steps: dict[str, Step], x: Tensor, repeats: int) -> dict[str, list[float]]:
    """Seconds of each repetition, the candidates taking turns after one warm-up each."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repetition in range(repeats + 1):
        for name, step in steps.items():
            fresh = x.clone().requires_grad_()
            begin = time.perf_counter()
            step(fresh)
            if repetition:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def machine_rate() -> float:
    """Best rate of a 2000 x 2000 matrix product in GFLOP/s, the ceiling of this run."""
    a = torch.randn(2000, 2000)
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - begin)
    return 2 * 2000**3 / min(seconds) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dim", type=int, default=256, help="width of the block")
    parser.add_argument("--seq", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--batch", type=int, default=1, help="sequences")
    parser.add_argument("--chunk", type=int, default=64, help="tokens of a chunk")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--memory", action="store_true", help="print what a step keeps for its backward pass, and stop")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)

    if args.memory:
        report_memory(args.dim, args.chunk)
        return
    steps = ours(args.dim, args.chunk)
    first = next(iter(steps))
    steps[f"{first} (again: the noise)"] = steps[first]
    for package, build in (("titans_pytorch", titans_pytorch), ("nested_learning", nested_learning)):
        if importlib.util.find_spec(package) is None:
            print(f"{package} is not installed: left out (the head of this file says how to install it)")
            continue
        steps |= build(args.dim, args.chunk)
    x = torch.randn(args.batch, args.seq, args.dim)
    rate = machine_rate()
    timed = time_in_turns(steps, x, args.repeats)
    rate = max(rate, machine_rate())
    useful = {
        f"nestlearn, five {memory} memories, {heads} heads": useful_operations(memory, args.dim, heads, args.chunk)
        for memory in ("linear", "mlp")
        for heads in (4, 1)
    }

    tokens = args.batch * args.seq
    peer = next((name for name in timed if name.startswith("titans-pytorch")), first)
    rows = []
    print(f"dim {args.dim}, seq {args.seq}, batch {args.batch}, chunk {args.chunk}, float32, {args.threads} threads")
    print(f"torch {torch.__version__}, matrix product at {rate:.0f} GFLOP/s; ratio to {peer!r} (quartiles)")
    for name, seconds in timed.items():
        ratios = sorted(p / s for p, s in zip(timed[peer], seconds, strict=True))
        low, _, high = statistics.quantiles(ratios, n=4)
        row = {
            "name": name,
            "tokens_per_second": tokens / statistics.median(seconds),
            "best_tokens_per_second": tokens / min(seconds),
            "ratio": statistics.median(ratios),
            "ratio_quartiles": [low, high],
        }
        fraction = ""
        if name in useful:
            row["fraction_of_matrix_rate"] = useful[name] * row["best_tokens_per_second"] / (rate * 1e9)
            fraction = f"  {row['fraction_of_matrix_rate']:.2f} of the matrix rate"
        rows.append(row)
        speed = f"{row['tokens_per_second']:9.0f} tokens/s, best {row['best_tokens_per_second']:9.0f}"
        print(f"{name:58s} {speed}  {row['ratio']:6.2f} ({low:.2f} to {high:.2f}){fraction}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        work = {k: v for k, v in vars(args).items() if k != "json"}
        result = {"work": work, "torch": torch.__version__, "python": platform.python_version()}
        args.json.write_text(json.dumps({**result, "gflops": rate, "peer": peer, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()

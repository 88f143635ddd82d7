"""Which alpha, chunk size and denominator should M3 have by default?

A small attention model on bytes of WikiText-2, a problem that the comparison in docs/results.md does not use. Every
setting gets the same learning rates and steps; validation loss in nats per byte, mean over seeds.

    python benchmarks/m3_defaults.py --data PATH_TO_WIKITEXT2 [--only "muon;none 0.5"]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from nestlearn import HopeConfig, HopeForCausalLM
from nestlearn.data import load_corpus
from nestlearn.optim import M3, Muon, NotFiniteGradient, matrix_groups

STEPS, BATCH, LENGTH = 300, 16, 64
RATES = (0.01, 0.03)
SEEDS = (0,)
FAST = (0.9, 0.99, 0.9)
SETTINGS = {
    "muon": dict(),
    "muon without nesterov": dict(nesterov=False),
    "alpha 0": dict(denom="none", alpha=0.0, betas=FAST),
    "alpha 0.2, chunk 4": dict(denom="none", alpha=0.2, chunk_size=4, betas=FAST),
    "alpha 0.2, chunk 10": dict(denom="none", alpha=0.2, chunk_size=10, betas=FAST),
    "alpha 0.5, chunk 4": dict(denom="none", alpha=0.5, chunk_size=4, betas=FAST),
    "alpha 0, relative, eps 0": dict(alpha=0.0, eps=0.0, betas=FAST),
    "alpha 0, relative, eps 1": dict(alpha=0.0, betas=FAST),
    "alpha 0.2, chunk 4, relative, eps 1": dict(alpha=0.2, chunk_size=4, betas=FAST),
    "alpha 0.1, chunk 10, relative, eps 1 (the default)": dict(),
}


def batches(ids: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Windows of bytes, (count, BATCH, LENGTH)."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(ids) - LENGTH, (count, BATCH, 1), generator=generator)
    return ids[starts + torch.arange(LENGTH)].long()


def train(setting: str, lr: float, seed: int, data: tuple[torch.Tensor, torch.Tensor]) -> float:
    torch.manual_seed(seed)
    config = HopeConfig(vocab_size=256, hidden_size=96, num_hidden_layers=2, block_types=["attention"] * 2)
    model = HopeForCausalLM(config)
    optimizer_class = Muon if setting.startswith("muon") else M3
    optimizer = optimizer_class(matrix_groups(model), lr=lr, adam_lr=0.15 * lr, **SETTINGS[setting])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 50) * (1 - step / STEPS))
    for ids in batches(data[0], STEPS, seed):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        try:
            optimizer.step()
        except NotFiniteGradient:
            return float("inf")
        schedule.step()
    model.eval()
    with torch.no_grad():
        losses = [model(ids, labels=ids).loss.item() for ids in batches(data[1], 20, 123)]
    return sum(losses) / len(losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--only", help="settings, separated by semicolons")
    arguments = parser.parse_args()
    corpus = load_corpus(arguments.data)
    data = tuple(
        torch.frombuffer(bytearray("\n".join(documents).encode()), dtype=torch.uint8)
        for documents in (corpus.train, corpus.validation)
    )
    print("| setting | " + " | ".join(f"lr {lr:g}" for lr in RATES) + " |\n|---|" + "---|" * len(RATES))
    for setting in arguments.only.split(";") if arguments.only else SETTINGS:
        row = [sum(train(setting, lr, seed, data) for seed in SEEDS) / len(SEEDS) for lr in RATES]
        print(f"| {setting} | " + " | ".join(f"{loss:.4f}" for loss in row) + " |", flush=True)


if __name__ == "__main__":
    main()

"""Norm of a layer's state on long streams of random tokens, and of one repeated token, switch by switch.

python benchmarks/stability.py
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from nestlearn.nn import SelfReferentialTitans

LETTER: dict[str, Any] = {"retention": "zero", "bounded": False, "normalize_v": False, "write_scale": None}
CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "no norm limit": {"norm_limit": None},
    "no norm limit, values as long as they come": {"norm_limit": None, "clip_values": False},
    "no norm limit, full writes": {"norm_limit": None, "write_scale": None},
    "no norm limit, eta not in units of alpha": {"norm_limit": None, "bounded": False},
    "no norm limit, L2": {"norm_limit": None, "objective": "l2"},
    "the letter of Eq. 93": {**LETTER, "norm_limit": None, "clip_values": False, "objective": "l2", "eta_max": 1.0},
    "MLP, default": {"memory": "mlp"},
    "MLP, no norm limit": {"memory": "mlp", "norm_limit": None},
}


@torch.no_grad()
def final_norms(tokens: int, scale: float, **switches: Any) -> tuple[float, float]:
    """Frobenius norms of all that the layer has learned in context, after random and after repeated tokens."""
    torch.manual_seed(0)
    layer = SelfReferentialTitans(32, 2, 64, **switches)
    for parameter in layer.parameters():
        parameter.mul_(scale)
    token, state = torch.randn(1, 1, 32), None
    for _ in range(tokens // 2000):
        _, state = layer(torch.cat([torch.randn(1, 2000, 32), token.expand(1, 2000, 32)]), state)
    assert state is not None
    random, repeated = torch.stack([t.flatten(1).norm(dim=1) for t in state.core.current]).norm(dim=0).tolist()
    return random, repeated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=20_000)
    args = parser.parse_args()
    print("| switches | weights | random tokens | one token repeated |\n|---|---|---|---|")
    for name, switches in CASES.items():
        for scale in (1.0, 3.0):
            random, repeated = final_norms(args.tokens, scale, **switches)
            print(f"| {name} | x {scale:g} | {random:.3g} | {repeated:.3g} |", flush=True)


if __name__ == "__main__":
    main()

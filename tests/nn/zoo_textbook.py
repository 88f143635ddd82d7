"""What the names in DESIGNS mean: for each one a plain loop over the tokens of one sequence and one head."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.memory import MLPMemory, nadaraya_watson, objectives, rules
from nestlearn.nn import MemoryLayer
from nestlearn.nn.attention import rotate
from nestlearn.ops.rule import unit

Result = tuple[list[Tensor], tuple[Tensor, ...]]
Loop = Callable[[MemoryLayer, int, dict[str, Tensor]], Result]
"""From a layer, a head and its projections by name, (T, d) or (T,), to outputs and the final weights."""


def by_rule(step: Callable[..., Tensor], gated: bool = True, decay: bool = True) -> Loop:
    """``W <- step(W, k, v, eta, alpha)``, read after the token."""

    def run(made: MemoryLayer, head: int, p: dict[str, Tensor]) -> Result:
        w, outputs = torch.zeros(made.width, made.width, dtype=torch.float64), []
        for t in range(len(p["k"])):
            eta, alpha = (p["eta"][t] if gated else 1.0), (p["alpha"][t] if decay else 1.0)
            w = step(w, p["k"][t], p["v"][t], eta, alpha)
            outputs.append(w @ p["q"][t])
        return outputs, (w,)

    return run


def retention(made: MemoryLayer, head: int, p: dict[str, Tensor]) -> Result:
    gamma = torch.tensor(1 - 2.0 ** (-5 - head), dtype=torch.float64)
    return by_rule(rules.hebbian, gated=False)(made, head, p | {"alpha": gamma.expand(len(p["k"]))})


def oja(w: Tensor, k: Tensor, v: Tensor, eta: Tensor, alpha: Tensor) -> Tensor:
    return rules.oja(w, k, unit(v), eta * alpha, alpha)


def descent(objective: str, momentum: bool = False, decay: bool = True, window: int = 1) -> Loop:
    """Gradient descent by autograd on the mean over the last pairs; what was learned decays, the start does not."""
    goal = objectives.get(objective)

    def run(made: MemoryLayer, head: int, p: dict[str, Tensor]) -> Result:
        start = [w[head] for w in made.initial().weights["memory"]]
        learned = [torch.zeros_like(w) for w in start]
        moments = [torch.zeros_like(w) for w in start]
        b = torch.sigmoid(made.momentum[head]) if momentum else 0.0
        outputs = []
        for t in range(len(p["k"])):
            weights = [s + w for s, w in zip(start, learned, strict=True)]
            seen = range(max(0, t - window + 1), t + 1)
            loss = sum(goal.value(read(made, weights, p["k"][i]), unit(p["v"][i])) for i in seen) / window
            gradients = torch.autograd.grad(loss, weights, create_graph=True)
            alpha = p["alpha"][t] if decay else 1.0
            moments = [b * m - p["eta"][t] * alpha * g for m, g in zip(moments, gradients, strict=True)]
            learned = [alpha * w + m for w, m in zip(learned, moments, strict=True)]
            outputs.append(read(made, [s + w for s, w in zip(start, learned, strict=True)], p["q"][t]))
        return outputs, tuple(s + w for s, w in zip(start, learned, strict=True))

    return run


def read(made: MemoryLayer, weights: list[Tensor], x: Tensor) -> Tensor:
    if isinstance(made.memory, MLPMemory):
        return x + weights[0] @ F.silu(weights[1] @ x)
    return weights[0] @ x


def ada_transformer(made: MemoryLayer, head: int, p: dict[str, Tensor]) -> Result:
    """Eq. 21, 69: ``W_t = W_(t-1) + v_t k_t^T`` read with what attention gives."""
    (w,) = (start[head] for start in made.initial().weights["memory"])
    turned_q, turned_k = (rotate(p[name], torch.arange(len(p["k"])), made.rope_theta) for name in ("raw q", "raw k"))
    outputs = []
    for t in range(len(p["k"])):
        w = rules.hebbian(w, p["k"][t], p["v"][t], 1.0)
        similarity = (turned_k[: t + 1] @ turned_q[t] / made.width**0.5).exp()
        outputs.append(w @ unit(nadaraya_watson(similarity, p["v"][: t + 1])))
    return outputs, (w,)


TEXTBOOK: dict[str, Loop] = {
    "linear-attention": by_rule(rules.hebbian, gated=False, decay=False),
    "retnet": retention,
    "deltanet": by_rule(rules.delta, decay=False),
    "gated-deltanet": by_rule(rules.delta),
    "ojanet": by_rule(oja),
    "omega": descent("l2", window=3),
    "ttt-linear": descent("l2", decay=False),
    "ttt-mlp": descent("l2", decay=False),
    "titans": descent("l2", momentum=True),
    "miras": descent("l3"),
    "ada-transformer": ada_transformer,
}


def run(made: MemoryLayer, design: str, x: Tensor) -> tuple[Tensor, list[list[tuple[Tensor, ...]]]]:
    """The whole layer on ``x`` (B, T, dim), its memory token by token; and the final weights ``[row][head]``."""
    u = made.conv(x)[0]
    start = made.initial()
    rows, finals = [], []
    for b in range(len(x)):
        heads, final = [], []
        for h in range(made.heads):
            part = slice(h * made.width, (h + 1) * made.width)
            p = {name: made.project[name](u[b])[:, part] for name in ("q", "k", "v")}
            p |= {f"raw {name}": p[name] for name in ("q", "k")}
            p |= {name: unit(p[name]) for name in ("q", "k")}
            for name, top in (("eta", made.rule.eta_max), ("alpha", 1.0)):
                if name in made.project:
                    p[name] = top * torch.sigmoid(made.project[name](u[b])[:, h] + start.bias[name][h])
            outputs, weights = TEXTBOOK[design](made, h, p)
            heads.append(F.rms_norm(torch.stack(outputs), (made.width,), made.norm.weight, made.norm.eps))
            final.append(weights)
        rows.append(torch.cat(heads, dim=-1))
        finals.append(final)
    y = torch.stack(rows)
    y = y if made.gate is None else y * torch.sigmoid(made.gate(u))
    return made.out(y), finals

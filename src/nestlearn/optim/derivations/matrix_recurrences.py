"""Optimizers with matrix memories derived from them (appendix B, Eq. 106-111; Eq. 42): Shampoo, SOAP, Muon.

The full memory of a gradient vector has ``H = sum g g^T`` and reads ``(H + lambda I)^-1 P sum g`` (Eq. 107), with
``P = H^(1/2)`` full-matrix AdaGrad (Eq. 111). For a matrix G, Shampoo approximates H by the Kronecker product of two
small memories, ``L = sum G G^T`` and ``R = sum G^T G``; SOAP runs Adam in their eigenbases.

Shampoo and SOAP are those of the package pytorch-optimizer, Muon is `torch.optim.Muon`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from nestlearn.optim.derivations.accumulators import Memory, apply_along, average, read_out, statistics, symmetric_power
from nestlearn.optim.derivations.recurrences import GroupMemory, Read, Settings, State, build, refuse, weight_decay
from nestlearn.optim.matrices import adjustment
from nestlearn.optim.orthogonal import COEFFICIENTS, newton_schulz


def shampoo(s: Settings) -> GroupMemory:
    """Shampoo: ``L^(-1/4) G R^(-1/4)``, with L and R started at the ridge ``matrix_eps I``.

    A tensor of k dimensions has k memories and the exponent ``-1 / (2 k)``; a vector is full-matrix AdaGrad. The roots
    are taken every ``preconditioning_compute_steps`` steps, and nothing moves before the first time.

    Raises:
        UserError: ``momentum`` is on: the package mixes the last update into the gradient, which is none of the
            paper's memories.
    """
    refuse(bool(s["momentum"]), "Shampoo", f"momentum={s['momentum']}", "momentum=0")
    every = int(s["preconditioning_compute_steps"])
    left, right = statistics(step_size=1.0, retention=1.0)

    def start(p: Tensor) -> State:
        eye = [torch.eye(d, dtype=p.dtype, device=p.device) for d in p.shape]
        return {"L": [s["matrix_eps"] * e for e in eye], "roots": [0 * e for e in eye]}

    def advance(state: State, g: Tensor, t: int) -> tuple[Tensor, State]:
        memories = [left.write(memory, g, dim) for dim, memory in enumerate(state["L"])]
        roots = state["roots"]
        if t % every == 0:
            roots = [symmetric_power(memory, -1 / (2 * g.ndim)) for memory in memories]
        read = g
        for dim, root in enumerate(roots):
            read = apply_along(root, read, dim)
        return read, {"L": memories, "roots": roots}

    ridge = f"{s['matrix_eps']:g}, in L and R from the start"
    law = f"m* = L^(-1/4) M R^(-1/4) = H^(-1/2) M, roots {f'every {every} steps' if every > 1 else 'every step'}"
    read = Read("G", "(R (x) L)^(1/2)", "H^(1/2)", ridge, law=law)
    decay = weight_decay(s, decoupled=s["weight_decouple"], fixed=s["fixed_decay"])
    return replace(build(s, (left, right), read, advance, decay), start=start)


def soap(s: Settings) -> GroupMemory:
    """SOAP: Adam's second memory and read in the eigenbases of Shampoo's memories L and R, ``G' = Q_L^T G Q_R``.

    A basis is a memory of its own, written every ``precondition_frequency`` steps by one orthogonal iteration
    ``Q <- qr(L Q)``, Oja's rule (Eq. 66) with an infinite step; the first is an exact eigenbasis. The first gradient
    is only stored. Dimensions above ``max_precondition_dim``, and vectors without ``precondition_1d``, keep their axes.
    The eigenbasis of a singular L is not unique: a recurrence follows the optimizer from step one if they round alike.

    Raises:
        UserError: ``merge_dims`` or ``normalize_gradient`` is on.
    """
    for name in ("merge_dims", "normalize_gradient"):
        refuse(bool(s[name]), "SOAP", f"{name}=True", f"{name}=False")
    (beta1, beta2), eps, every = map(float, s["betas"]), float(s["eps"]), int(s["precondition_frequency"])
    beta = float(s["shampoo_beta"]) if s["shampoo_beta"] is not None else beta2
    left, right = statistics(step_size=1 - beta, retention=beta)
    first, second = average("m", "g", beta1), average("v", "(Q_L^T G Q_R)^2", beta2)
    bases = tuple(
        Memory(
            f"Q_{side}",
            f"orthogonal {shape}",
            f"-tr(Q^T {side} Q) with Q^T Q = I",
            "orthogonal iteration (Oja, infinite step)",
            "none",
            side,
            step_size=math.inf,
            retention=0.0,
            frequency=1 / every,
        )
        for side, shape in (("L", left.structure), ("R", right.structure))
    )

    def dims(p: Tensor) -> list[int]:
        """The dimensions that have a memory."""
        vector = p.ndim == 1 and not s["precondition_1d"]
        return [] if vector else [d for d, size in enumerate(p.shape) if size <= s["max_precondition_dim"]]

    def start(p: Tensor) -> State:
        zeros = {d: torch.zeros(p.shape[d], p.shape[d], dtype=p.dtype, device=p.device) for d in dims(p)}
        return {"m": torch.zeros_like(p), "v": torch.zeros_like(p), "L": zeros, "Q": {}}

    def rotate(g: Tensor, q: dict[int, Tensor], back: bool = False) -> Tensor:
        for dim, basis in q.items():
            g = apply_along(basis if back else basis.mT, g, dim)
        return g

    def advance(state: State, g: Tensor, t: int) -> tuple[Tensor | None, State]:
        written = {d: left.write(memory, g, d) for d, memory in state["L"].items()}
        if t == 1:
            return None, {**state, "L": written, "Q": {d: eigenbasis(memory) for d, memory in written.items()}}
        q, count = state["Q"], t - 1
        m, v = first.write(state["m"], g), second.write(state["v"], rotate(g, q).square())
        h, ridge, first_read = v, eps, m
        if s["correct_bias"]:  # eps stands beside the root of the uncorrected average
            h, first_read = second.without_ridge(v, count), first.without_ridge(m, count)
            ridge = eps / math.sqrt(1 - beta2**count)
        read = rotate(read_out(rotate(first_read, q), h, h.sqrt(), ridge * h.sqrt()), q, back=True)
        if count % every == 0:
            q, v = orthogonal_iteration(q, written, v)
        return read, {"m": m, "v": v, "L": written, "Q": q}

    read = Read(
        f"Q_L^T m Q_R / (1 - {beta1:g}^t)" if s["correct_bias"] else "Q_L^T m Q_R",
        f"v / (1 - {beta2:g}^t)" if s["correct_bias"] else "v",
        "sqrt(H)",
        f"{eps:g} sqrt(v)",
        "Q_L m* Q_R^T",
    )
    group = build(s, (left, right, *bases, first, second), read, advance, weight_decay(s, decoupled=True, after=True))
    return replace(group, start=start)


def eigenbasis(memory: Tensor) -> Tensor:
    """Eigenvectors of a symmetric matrix (d, d) as columns, the largest first."""
    return torch.linalg.eigh(memory)[1].flip(1)


def orthogonal_iteration(
    q: dict[int, Tensor], memories: dict[int, Tensor], v: Tensor
) -> tuple[dict[int, Tensor], Tensor]:
    """``Q <- qr(L Q)`` for every dimension, columns by falling estimate of their eigenvalue; ``v`` moves with them."""
    turned = {}
    for dim, basis in q.items():
        image = memories[dim] @ basis
        order = (basis * image).sum(0).argsort(descending=True)
        v = v.index_select(dim, order)
        # the package factors in float32 whatever the parameter's type; a better basis would be another optimizer
        turned[dim] = torch.linalg.qr(image[:, order].float())[0].to(basis.dtype)
    return turned, v


def muon(s: Settings) -> GroupMemory:
    """`torch.optim.Muon` (Eq. 42): a momentum memory and an orthogonalising output, in bfloat16 as it is there.

    Raises:
        UserError: ``ns_coefficients`` or ``eps`` are not the default ones.
    """
    quintic = COEFFICIENTS["quintic"]
    refuse(tuple(s["ns_coefficients"]) != quintic, "Muon", f"ns_coefficients={s['ns_coefficients']}", str(quintic))
    refuse(s["eps"] != 1e-7, "Muon", f"eps={s['eps']}", "1e-7")
    momentum, adjust = float(s["momentum"]), s["adjust_lr_fn"] or "original"
    first = average("m", "g", momentum)

    def advance(state: State, g: Tensor, t: int) -> tuple[Tensor, State]:
        m = first.write(state["m"], g)
        ahead = first.write(m, g) if s["nesterov"] else m
        orthogonal = newton_schulz(ahead, s["ns_steps"], dtype=torch.bfloat16).to(g.dtype)
        return orthogonal * adjustment(g.shape, adjust), {"m": m}

    seen = f"{momentum:g} m + {1 - momentum:g} g" if s["nesterov"] else "m"
    read = Read(seen, output=f"a NewtonSchulz_{s['ns_steps']}(m*), a = {adjust} adjustment")
    return build(s, (first,), read, advance, weight_decay(s, decoupled=True))

"""The optimizers of this package described as memories, for `as_memory`. Their code is the recurrence."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from nestlearn.optim.derivations.accumulators import ELEMENTS, Memory, average, running_sum
from nestlearn.optim.derivations.recurrences import GroupMemory, Read, Settings, adam, weight_decay

DESCENT = "gradient descent"
MATRIX = "matrix, shape of W"


def describe(s: Settings, memories: tuple[Memory, ...], read: Read) -> GroupMemory:
    """A group with decoupled weight decay that is described and not run."""
    return GroupMemory(memories, read, float(s["lr"]), weight_decay(s, decoupled=True))


def momentum(s: Settings) -> GroupMemory:
    """`Momentum` (Eq. 33-34)."""
    return describe(s, (_dot_product(s, "g"),), _negative(s))


def preconditioned(s: Settings) -> GroupMemory:
    """`PreconditionedMomentum` (Eq. 46-47)."""
    return describe(s, (_dot_product(s, _value(s, "g")), *_second(s)), _negative(s))


def feature(s: Settings) -> GroupMemory:
    """`FeatureMomentum` (Eq. 51)."""
    phi = f"{_name(s['feature'])}(g)"
    return describe(s, (_dot_product(s, _value(s, phi)), *_second(s)), _negative(s))


def delta(s: Settings) -> GroupMemory:
    """`DeltaMomentum` (Eq. 48-49)."""
    key = {"rows": "row of g", "whole": "g as one row", "elements": "element of g"}[s["keys"]]
    product = {"rows": "m g^T", "whole": "<m, g>", "elements": "m g"}[s["keys"]]
    first = Memory(
        "m",
        ELEMENTS if s["keys"] == "elements" else MATRIX,
        f"1/2 ||{product} + P||^2",
        f"delta rule, erase min({s['erase']:g} lr, {s['max_erase']:g} / ||g||^2)",
        key,
        "-I" if s["preconditioner"] is None else "-P",
        step_size=1.0,
        retention=s["momentum"],
    )
    return describe(s, (first, *_second(s)), _negative(s))


def deep(s: Settings) -> GroupMemory:
    """`DeepMomentum` (Eq. 50)."""
    value = f"{_name(s['value'])}(k)" if s["value"] else "k"
    objective = getattr(s["objective"], "name", s["objective"])
    memory = Memory(
        "m",
        f"MLP, d_in -> {s['hidden']} -> d_in, on rows",
        _asked(objective, "m(k)", value, ""),
        DESCENT,
        "k = row of g / rms(g)",
        f"-{value}",
        step_size=s["inner_lr"],
        retention=s["momentum"],
        frequency=float(s["inner_steps"]),
    )
    return describe(s, (memory,), _negative(s, "m(k)"))


def muon(s: Settings) -> GroupMemory:
    """`Muon` (Eq. 42); its groups with ``adam=True`` are AdamW."""
    if s["adam"]:
        return _adam(s)
    seen = f"{s['momentum']:g} m + {1 - s['momentum']:g} g" if s["nesterov"] else "m"
    first = replace(average("m", "g", s["momentum"]), structure=MATRIX)
    return describe(s, (first,), Read(seen, output=_scaled(s, _orthogonal(s, "m*"))))


def m3(s: Settings) -> GroupMemory:
    """`M3` (Eq. 75, Algorithm 1): two momenta at two frequencies; its groups with ``adam=True`` are AdamW."""
    if s["adam"]:
        return _adam(s)
    (beta1, beta2, beta3), ema = s["betas"], s["mode"] == "ema"

    def store(name: str, value: str, beta: float) -> Memory:
        return average(name, value, beta) if ema else running_sum(name, value, step_size=beta)

    fast = replace(store("m1", "g", beta1), structure=MATRIX)
    chunk = f"{'mean' if ema else 'sum'} of {s['chunk_size']} g"
    slow = replace(store("m2", chunk, beta3), structure=MATRIX, frequency=1 / s["chunk_size"])
    both = f"{_orthogonal(s, 'm1')} + {s['alpha']:g} {_orthogonal(s, 'm2')}"
    if s["denom"] == "none":
        return describe(s, (fast, slow), Read(both, output=_scaled(s, "m*")))
    ridge, output = f"{s['eps']:g} sqrt(H)", "m*"
    if s["denom"] == "relative":
        ridge, output = f"{s['eps']:g} rms(sqrt(H)) sqrt(H)", "||M|| m* / ||m*||"
    read = Read(both, "v", "sqrt(H)", ridge, output=_scaled(s, output))
    return describe(s, (fast, slow, store("v", "g^2", beta2)), read)


def dgd(s: Settings) -> GroupMemory:
    """`DGD` (Eq. 56-57): the weights of a layer are the memory; other parameters follow gradient descent."""
    near = " + 1/(2 lr) ||W - W_t||^2" if s["mode"] == "implicit" else ""
    rule = "delta gradient descent, proximal" if near else "delta gradient descent"
    memory = _weights(s, f"1/2 ||W x - u||^2{near}", rule, "u = -dL/dy")
    return describe(s, (memory,), Read("W", output="none"))


def ggd(s: Settings) -> GroupMemory:
    """`GGD` (Eq. 59-60), as `dgd`."""
    objective, value = s["_objective"].name, f"u = {_name(s['_value'])}(W, x, dL/dy)" if s["_value"] else "u = -dL/dy"
    memory = _weights(s, _asked(objective, "W x", "u", "-"), DESCENT, value)
    return describe(s, (replace(memory, frequency=float(s["steps"])),), Read("W", output="none"))


def generalized(s: Settings) -> GroupMemory:
    """`GeneralizedMomentum` (Eq. 35-37): a momentum that is a memory from inputs to surprise."""
    objective = _asked(s["_objective"].name, "m x", "delta", "")
    pair = ("layer input x", "-delta = -dL/dy")
    return describe(s, (Memory("m", MATRIX, objective, DESCENT, *pair, 1.0, s["momentum"]),), Read("-m"))


def _weights(s: Settings, objective: str, rule: str, value: str) -> Memory:
    lr = float(s["lr"])
    return Memory("W", MATRIX, objective, rule, "layer input x", value, lr, 1 - lr * s["weight_decay"])


def _asked(objective: str, read: str, value: str, sign: str) -> str:
    """The objective called ``objective`` of a read-out against ``value`` (sign "-") or minus it (sign "")."""
    if objective == "dot":
        return f"{sign}<{read}, {value}>"
    other = f"{read} {sign or '+'} {value}"
    return f"1/2 ||{other}||^2" if objective == "l2" else f"{objective} of {other}"


def _dot_product(s: Settings, value: str) -> Memory:
    """The memory of Eq. 33, 47, 51, which holds minus the values so that ``W <- W + m`` descends."""
    return Memory("m", ELEMENTS, f"<m, {value}>", DESCENT, "none", f"-{value}", 1.0, s["momentum"])


def _value(s: Settings, g: str) -> str:
    if s["preconditioner"] is None:
        return g
    return f"{g} / (sqrt(v) + eps)" if s["preconditioner"] == "diagonal" else f"{_name(s['preconditioner'])}({g})"


def _second(s: Settings) -> tuple[Memory, ...]:
    """The memory behind ``P = 1 / sqrt(v)``."""
    return (average("v", "g^2", s["beta2"]),) if s["preconditioner"] == "diagonal" else ()


def _negative(s: Settings, stored: str = "m") -> Read:
    """``W <- W + lr sigma(m)`` (Eq. 52)."""
    return Read(f"-{stored}" if s["output"] == "identity" else f"-{_name(s['output'])}({stored})")


def _name(function: Any) -> str:
    return function if isinstance(function, str) else getattr(function, "__name__", "function")


def _orthogonal(s: Settings, m: str) -> str:
    return f"O({m})" if s["orthogonalization"] == "newton-schulz" else f"O_learned({m})"


def _scaled(s: Settings, update: str) -> str:
    return update if s["adjust"] == "none" else f"a {update}, a = {s['adjust']} adjustment"


def _adam(s: Settings) -> GroupMemory:
    betas = dict(betas=s["adam_betas"], eps=s["adam_eps"], amsgrad=False, decoupled_weight_decay=True)
    return adam({**s, **betas})


BY_NAME: dict[str, Callable[[Settings], GroupMemory]] = {
    "Momentum": momentum,
    "PreconditionedMomentum": preconditioned,
    "FeatureMomentum": feature,
    "DeltaMomentum": delta,
    "DeepMomentum": deep,
    "DGD": dgd,
    "GGD": ggd,
    "GeneralizedMomentum": generalized,
    "Muon": muon,
    "M3": m3,
}

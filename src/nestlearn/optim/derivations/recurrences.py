"""Element-wise optimizers derived from memories (appendix B, Eq. 101-105): SGD to Adam, RAdam, NAdam and Lion.

Each function takes the hyper-parameters of one parameter group and returns its memories and the recurrence that
follows from them: write every accumulator, read by Eq. 102. Nothing here is meant for training; the tests compare each
recurrence with the optimizer that it explains.

In the code M, H, P and lambda of Eq. 102 are ``m``, ``h``, ``p`` and ``ridge``; t counts steps from 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nestlearn.errors import UserError
from nestlearn.optim.derivations.accumulators import Memory, average, read_out, running_maximum, running_sum

Settings = Mapping[str, Any]
State = dict[str, Any]
Start = Callable[[Tensor], State]
Advance = Callable[[State, Tensor, int], tuple[Tensor | None, State]]


@dataclass(frozen=True)
class Read:
    """How memories become the update: Eq. 102, ``m* = M P / (H + lambda)``, then ``W <- W - lr output``.

    Every field is a formula; the output is one of m*. ``H`` is "none" where no second memory is kept and m* = M: P = H
    cancels it (Eq. 104), or the memory is no sum. The output is "none" where W is itself the memory (Eq. 57-60).

    >>> str(Read(M="m", H="v", P="sqrt(H)"))
    'm* = M P / (H + lambda); M = m; H = v; P = sqrt(H); lambda = 0; W <- W - lr m*'
    """

    M: str
    H: str = "none"
    P: str = "H"
    ridge: str = "0"
    output: str = "m*"
    law: str = "m* = M P / (H + lambda)"

    def __str__(self) -> str:
        """The formulas in one line."""
        if self.output == "none":
            return "W is the memory itself"
        terms = [f"M = {self.M}"]
        if self.H == "none":
            terms.insert(0, "m* = M")
        else:
            terms.insert(0, self.law)
            terms += [f"H = {self.H}", f"P = {self.P}", f"lambda = {self.ridge}"]
        return "; ".join([*terms, f"W <- W - lr {self.output}"])


@dataclass(frozen=True)
class Decay:
    """Weight decay: ``"none"``, ``"coupled"`` (``rate`` times W joins the gradient) or ``"decoupled"`` (the fraction
    ``rate`` of W is forgotten per step, before the update or ``after`` it)."""

    kind: str = "none"
    rate: float = 0.0
    after: bool = False

    def gradient(self, g: Tensor, p: Tensor) -> Tensor:
        """The gradient that the memories see."""
        return g + self.rate * p if self.kind == "coupled" else g

    def weights(self, p: Tensor) -> Tensor:
        """What is retained of the parameter."""
        return (1 - self.rate) * p if self.kind == "decoupled" else p

    def __str__(self) -> str:
        """One clause for a reader."""
        if self.kind == "none":
            return "no weight decay"
        if self.kind == "coupled":
            return f"{self.rate:g} W joins the gradient"
        return f"W keeps {1 - self.rate:.6g} a step{', after the update' if self.after else ''}"


@dataclass(frozen=True)
class GroupMemory:
    """One parameter group of an optimizer as memories.

    Args:
        memories: what is stored, per parameter.
        read: how it is read.
        lr: in units of the parameter per unit of m*.
        decay: weight decay.
        start: makes the memories of a parameter; None where the optimizer's own code is the recurrence.
        advance: writes one gradient to them and reads: ``(memories, g, t) -> (m*, memories)``, m* None for no update.
        maximize: ascend instead of descend.
    """

    memories: tuple[Memory, ...]
    read: Read
    lr: float
    decay: Decay = Decay()
    start: Start | None = field(default=None, repr=False, compare=False)
    advance: Advance | None = field(default=None, repr=False, compare=False)
    maximize: bool = False

    def init(self, p: Tensor) -> State:
        """The memories of one parameter before the first gradient.

        Raises:
            UserError: only a description exists, because the optimizer's own code is the recurrence; or p is complex.
        """
        if p.is_complex():
            raise UserError("a recurrence is for real parameters: pass torch.view_as_real")
        if self.start is None:
            raise UserError("this optimizer is its own recurrence and only described here: step the optimizer itself")
        return {**self.start(p), "step": 0}

    @torch.no_grad()
    def update(self, state: State, g: Tensor, p: Tensor) -> tuple[Tensor, State]:
        """The parameter and its memories after one gradient; the arguments are left as they are."""
        if self.advance is None:
            raise UserError("this optimizer is its own recurrence and only described here: step the optimizer itself")
        t = state["step"] + 1
        g = self.decay.gradient(-g if self.maximize else g, p)
        read, written = self.advance(state, g, t)
        state = {**written, "step": t}
        if read is None:
            return p, state
        if self.decay.after:
            return self.decay.weights(p - self.lr * read), state
        return self.decay.weights(p) - self.lr * read, state


def weight_decay(settings: Settings, decoupled: bool, fixed: bool = False, after: bool = False) -> Decay:
    """The decay of a group: per step ``weight_decay`` of the gradient's part, or ``lr weight_decay`` of W."""
    rate = float(settings["weight_decay"])
    if not rate:
        return Decay()
    if not decoupled:
        return Decay("coupled", rate)
    return Decay("decoupled", rate if fixed else float(settings["lr"]) * rate, after)


def build(settings: Settings, memories: tuple[Memory, ...], read: Read, advance: Advance, decay: Decay) -> GroupMemory:
    """A group whose element-wise memories start at zero."""

    def start(p: Tensor) -> State:
        return {memory.name: torch.zeros_like(p) for memory in memories}

    lr, maximize = float(settings["lr"]), bool(settings.get("maximize", False))
    return GroupMemory(memories, read, lr, decay, start, advance, maximize)


def sgd(s: Settings) -> GroupMemory:
    """SGD with or without momentum (Eq. 104): P = H cancels the second memory; Nesterov reads one step ahead."""
    momentum = float(s["momentum"])
    decay = weight_decay(s, decoupled=False)
    if not momentum:
        return build(s, (), Read(M="g"), lambda state, g, t: (g, {}), decay)
    first = running_sum("m", "g", momentum, 1 - s["dampening"])
    whole = replace(first, step_size=1.0)  # the first gradient is stored undampened

    def advance(state: State, g: Tensor, t: int) -> tuple[Tensor, State]:
        m = (whole if t == 1 else first).write(state["m"], g)
        return (first.write(m, g) if s["nesterov"] else m), {"m": m}

    return build(s, (first,), Read(M=f"{momentum:g} m + g" if s["nesterov"] else "m"), advance, decay)


def adam(s: Settings) -> GroupMemory:
    """Adam, AdamW and AMSGrad (Eq. 105): P = sqrt(H), lambda = eps sqrt(H) gives ``M / (sqrt(H) + eps)``.

    AMSGrad's H is a third memory that never falls.
    """
    (beta1, beta2), eps = map(float, s["betas"]), float(s["eps"])
    first, second, peak = average("m", "g", beta1), average("v", "g^2", beta2), running_maximum("vmax", "v")

    def advance(state: State, g: Tensor, t: int) -> tuple[Tensor, State]:
        new = {"m": first.write(state["m"], g), "v": second.write(state["v"], g.square())}
        if s["amsgrad"]:
            new["vmax"] = peak.write(state["vmax"], new["v"])
        # AMSGrad keeps the maximum of the uncorrected averages and corrects what it reads
        m, h = first.without_ridge(new["m"], t), second.without_ridge(new["vmax" if s["amsgrad"] else "v"], t)
        return read_out(m, h, h.sqrt(), eps * h.sqrt()), new

    v = "vmax" if s["amsgrad"] else "v"
    read = Read(f"m / (1 - {beta1:g}^t)", f"{v} / (1 - {beta2:g}^t)", "sqrt(H)", f"{eps:g} sqrt(H)")
    memories = (first, second, peak) if s["amsgrad"] else (first, second)
    return build(s, memories, read, advance, weight_decay(s, decoupled=s["decoupled_weight_decay"]))


def rmsprop(s: Settings) -> GroupMemory:
    """RMSprop: M is the gradient itself. Centred, H is the variance; with momentum, the reads are stored once more."""
    alpha, eps = float(s["alpha"]), float(s["eps"])
    second, mean = average("v", "g^2", alpha), average("mean", "g", alpha)
    velocity = running_sum("m", "m*", float(s["momentum"]))

    def advance(state: State, g: Tensor, t: int) -> tuple[Tensor, State]:
        new = {"v": second.write(state["v"], g.square())}
        h = new["v"]
        if s["centered"]:
            new["mean"] = mean.write(state["mean"], g)
            h = h - new["mean"].square()
        read = read_out(g, h, h.sqrt(), eps * h.sqrt())
        if s["momentum"]:
            new["m"] = read = velocity.write(state["m"], read)
        return read, new

    read = Read("g", "v - mean^2" if s["centered"] else "v", "sqrt(H)", f"{eps:g} sqrt(H)")
    memories: tuple[Memory, ...] = (second, *([mean] if s["centered"] else []))
    if s["momentum"]:
        memories, read = (*memories, velocity), replace(read, output="m")
    return build(s, memories, read, advance, weight_decay(s, decoupled=False))


def adagrad(s: Settings) -> GroupMemory:
    """Adagrad (diagonal): M is the gradient itself, H the sum of all squares, so nothing is ever forgotten.

    Its ``lr_decay`` is a factor ``1 / (1 + (t - 1) lr_decay)`` of the read.
    """
    eps, slowing = float(s["eps"]), float(s["lr_decay"])
    second = running_sum("v", "g^2")

    def advance(state: State, g: Tensor, t: int) -> tuple[Tensor, State]:
        h = second.write(state["v"], g.square())
        return read_out(g, h, h.sqrt(), eps * h.sqrt()) / (1 + (t - 1) * slowing), {"v": h}

    output = f"m* / (1 + {slowing:g} (t - 1))" if slowing else "m*"
    read = Read("g", "v", "sqrt(H)", f"{eps:g} sqrt(H)", output)
    group = build(s, (second,), read, advance, weight_decay(s, decoupled=False))
    return replace(group, start=lambda p: {"v": torch.full_like(p, s["initial_accumulator_value"])})


def nadam(s: Settings) -> GroupMemory:
    """NAdam: Adam whose first memory is read one step ahead, ``mu' m + (1 - mu) g``, by its scheduled retention mu."""
    (beta1, beta2), eps = map(float, s["betas"]), float(s["eps"])
    first, second = average("m", "g", beta1), average("v", "g^2", beta2)

    def mu(t: int) -> float:
        return beta1 * (1 - 0.5 * 0.96 ** (t * s["momentum_decay"]))

    def advance(state: State, g: Tensor, t: int) -> tuple[Tensor, State]:
        m, v = first.write(state["m"], g), second.write(state["v"], g.square())
        kept = state["kept"] * mu(t)  # product of the retentions: the weight of the ridge term
        ahead = mu(t + 1) * m / (1 - kept * mu(t + 1)) + (1 - mu(t)) * g / (1 - kept)
        h = second.without_ridge(v, t)
        return read_out(ahead, h, h.sqrt(), eps * h.sqrt()), {"m": m, "v": v, "kept": kept}

    schedule = f"mu = {beta1:g} (1 - 0.96^({s['momentum_decay']:g} t) / 2)"
    ahead = f"mu' m / (1 - prod mu') + (1 - mu) g / (1 - prod mu) with {schedule}"
    read = Read(ahead, f"v / (1 - {beta2:g}^t)", "sqrt(H)", f"{eps:g} sqrt(H)")
    decay = weight_decay(s, decoupled=s["decoupled_weight_decay"])
    group = build(s, (first, second), read, advance, decay)
    return replace(group, start=lambda p: {"m": torch.zeros_like(p), "v": torch.zeros_like(p), "kept": 1.0})


def radam(s: Settings) -> GroupMemory:
    """RAdam: P = r sqrt(H) once the variance of H is tractable (rho > 5), P = H before, which is momentum (Eq. 104)."""
    (beta1, beta2), eps = map(float, s["betas"]), float(s["eps"])
    first, second = average("m", "g", beta1), average("v", "g^2", beta2)
    longest = 2 / (1 - beta2) - 1

    def advance(state: State, g: Tensor, t: int) -> tuple[Tensor, State]:
        new = {"m": first.write(state["m"], g), "v": second.write(state["v"], g.square())}
        m, h = first.without_ridge(new["m"], t), second.without_ridge(new["v"], t)
        rho = longest - 2 * t * beta2**t / (1 - beta2**t)
        if rho <= 5:
            return read_out(m, h, h, 0.0), new
        r = math.sqrt((rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho))
        # eps stands beside the root of the uncorrected average
        return read_out(m, h, r * h.sqrt(), eps / math.sqrt(1 - beta2**t) * h.sqrt()), new

    target, ridge = "r sqrt(H) if rho > 5 else H", f"{eps:g} sqrt(H / (1 - {beta2:g}^t)) if rho > 5 else 0"
    read = Read(f"m / (1 - {beta1:g}^t)", f"v / (1 - {beta2:g}^t)", target, ridge)
    return build(s, (first, second), read, advance, weight_decay(s, decoupled=s["decoupled_weight_decay"]))


def sign_sgd(s: Settings) -> GroupMemory:
    """SignSGD and, with momentum, Signum: one value against its own magnitude, P = |M| and H = M^2."""
    momentum = float(s["momentum"])
    first = average("m", "g", momentum)

    def advance(state: State, g: Tensor, t: int) -> tuple[Tensor, State]:
        m = first.write(state["m"], g) if momentum else g
        return read_out(m, m.square(), m.abs(), 0.0), ({"m": m} if momentum else {})

    read = Read("m" if momentum else "g", "M^2", "|M|")
    decay = weight_decay(s, decoupled=s["weight_decouple"])
    return build(s, (first,) if momentum else (), read, advance, decay)


def lion(s: Settings) -> GroupMemory:
    """Lion: one memory, two steps on it: one of size 1 - beta1 that is read as a sign, one of 1 - beta2 that is kept.

    Raises:
        UserError: gradient centralisation, AdaNorm or the cautious update is on.
    """
    for name in ("use_gc", "adanorm", "cautious"):
        refuse(bool(s.get(name)), "Lion", f"{name}=True", f"{name}=False")
    beta1, beta2 = map(float, s["betas"])
    tried, kept = average("m", "g", beta1), average("m", "g", beta2)

    def advance(state: State, g: Tensor, t: int) -> tuple[Tensor, State]:
        c = tried.write(state["m"], g)
        return read_out(c, c.square(), c.abs(), 0.0), {"m": kept.write(state["m"], g)}

    read = Read(f"{beta1:g} m + {1 - beta1:g} g, before m is written", "M^2", "|M|")
    decay = weight_decay(s, decoupled=s["weight_decouple"], fixed=s["fixed_decay"])
    return build(s, (kept,), read, advance, decay)


def refuse(wrong: bool, optimizer: str, given: str, allowed: str) -> None:
    """Raise `UserError` for a setting that the derivation does not cover."""
    if wrong:
        raise UserError(f"{optimizer} with {given} has no derivation as memories here: only {allowed}")

"""What a learner carries from window to window: everything that a resume needs, as tensors and JSON.

A state that anyone holds is never written in place. A step makes the next one, which shares the tensors that did not
change, so that a fork costs nothing, a refused window leaves no trace, and the last good state is kept by holding on to
it. Only a learner whose state nobody has asked for gives its tensors up for the next (`nestlearn.learner.holder`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nestlearn.convert import ContinualModel
from nestlearn.convert.kept import Kept
from nestlearn.errors import UserError

Tensors = dict[str, Tensor]
SAMPLE = 2048  # tokens of a text that are read again at its end, at most


@dataclass(frozen=True)
class Scale:
    """A running mean and variance; the last 32 windows weigh most.

    >>> Scale().add(2.0, 1.0).add(4.0, 1.0)
    Scale(count=2.0, mean=3.0, variance=1.0)
    """

    count: float = 0.0  # in whole windows
    mean: float = 0.0
    variance: float = 0.0

    HORIZON = 32

    def add(self, value: float, share: float) -> Scale:
        """With the value of one more window, of which ``share`` (0 to 1) was filled."""
        count = self.count + share
        rate = share / min(count, self.HORIZON)
        off = value - self.mean
        return Scale(count, self.mean + rate * off, (1 - rate) * (self.variance + rate * off * off))


@dataclass(frozen=True)
class LevelState:
    """One level: its learned weights and what it has gathered since its last update.

    Args:
        weights: learned, fp32; a name that is absent has its pretrained weight.
        slots: what the rule remembers of earlier updates, for each weight.
        gathered: the gradient summed over the tokens since the last update (Eq. 71).
        kept: what updates leave alone of the texts that were learned (`Level.consolidation`).
        tokens: read since the last update.
        scored: of these, how many were predicted: the gathered sum divided by it is the mean.
        updates: made so far.
        size: ||theta_0|| of the level, from the first update on; not in a snapshot, as the base model has it.
        moved: ||theta - theta_0|| / ||theta_0|| of the level after its last update.
        surprise: running scale of the logarithm of the norm of a window's mean gradient.
    """

    weights: Tensors = field(default_factory=dict)
    slots: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    gathered: Tensors = field(default_factory=dict)
    kept: Mapping[str, Kept] = field(default_factory=dict)
    tokens: int = 0
    scored: int = 0
    updates: int = 0
    size: float | None = None
    moved: float = 0.0
    surprise: Scale = Scale()


@dataclass(frozen=True)
class Source:
    """How far a named source has been read: tokens, their SHA-256, and whether its end was reached."""

    tokens: int
    sha256: str
    finished: bool


@dataclass(frozen=True)
class LearnerState:
    """Everything that a learner has besides the base model.

    Args:
        levels: fast to slow.
        clock: tokens learned from (refused ones do not count).
        read: tokens read, refused ones included.
        context: the last tokens before the next window, (c,) int64 on the CPU; empty where a text begins.
        surprise: running scale of the loss of a window, nats per token.
        refused: windows refused one after the other just now.
        sources: how far each named source has been read.
        reading: the named source whose reading has begun and not ended; the context is of it.
        sample: windows of the text that is read, spread evenly over it, that are read again at its end by what
            consolidates; of the others ``stride - 1`` lie between two of them.
        windows: of the text so far that could have joined the sample.
    """

    levels: tuple[LevelState, ...]
    clock: int = 0
    read: int = 0
    context: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    surprise: Scale = Scale()
    refused: int = 0
    sources: Mapping[str, Source] = field(default_factory=dict)
    reading: str | None = None
    sample: tuple[Tensor, ...] = ()
    stride: int = 1
    windows: int = 0

    @property
    def weights(self) -> Tensors:
        """The learned weights of all levels, by name."""
        return {name: w for level in self.levels for name, w in level.weights.items()}

    def versions(self) -> list[int]:
        """How often each tensor has been written in place."""
        held = [
            t
            for level in self.levels
            for ts in (level.weights.values(), level.gathered.values(), *level.slots.values())
            for t in ts
        ]
        return [t._version for t in held]

    def with_source(self, name: str, source: Source) -> LearnerState:
        return replace(self, sources={**self.sources, name: source})

    def opened(self, source: str | None) -> LearnerState:
        """Where a text begins, or None: with nothing before it."""
        return replace(self, context=self.context[:0], reading=source, sample=(), stride=1, windows=0)

    def sampled(self, window: Tensor) -> LearnerState:
        """With one more window of the text, which joins the sample if its turn has come."""
        sample, stride = self.sample, self.stride
        if self.windows % stride == 0:
            sample = (*sample, window)
        if sum(map(len, sample)) > SAMPLE:
            sample, stride = sample[::2], 2 * stride
        return replace(self, sample=sample, stride=stride, windows=self.windows + 1)

    def to_tensors(self) -> dict[str, Tensors]:
        """Groups of tensors for `nestlearn.learner.store`: ``level-0`` holds the weights of the fastest
        level, ``level-0.rule`` what its rule remembers and what it has gathered, ``level-0.kept`` what it consolidated,
        and so on."""
        groups: dict[str, Tensors] = {}
        for number, level in enumerate(self.levels):
            groups[f"level-{number}"] = dict(level.weights)
            slots = {f"slot-{i}.{name}": t for name, ts in level.slots.items() for i, t in enumerate(ts)}
            gathered = {f"gathered.{name}": g for name, g in level.gathered.items()}
            groups[f"level-{number}.rule"] = slots | gathered
            groups[f"level-{number}.kept"] = {name: kept.matrix for name, kept in level.kept.items()}
        return {name: group for name, group in groups.items() if group}

    def to_json(self) -> dict[str, Any]:
        """The rest, as plain JSON; floats come back to the bit."""
        return {
            "clock": self.clock,
            "read": self.read,
            "context": self.context.tolist(),
            "surprise": asdict(self.surprise),
            "refused": self.refused,
            "reading": self.reading,
            "sample": [window.tolist() for window in self.sample],
            "stride": self.stride,
            "windows": self.windows,
            "sources": {name: asdict(source) for name, source in self.sources.items()},
            "levels": [
                {
                    "tokens": level.tokens,
                    "scored": level.scored,
                    "updates": level.updates,
                    "moved": level.moved,
                    "surprise": asdict(level.surprise),
                    "transposed": [name for name, kept in level.kept.items() if kept.transposed],
                }
                for level in self.levels
            ],
        }

    @classmethod
    def restore(cls, groups: Mapping[str, Tensors], values: Mapping[str, Any]) -> LearnerState:
        """The state that `to_tensors` and `to_json` came from.

        Raises:
            UserError: the values are not those of a learner.

        >>> state = LearnerState((LevelState({"w": torch.ones(2)}, tokens=3),), clock=3)
        >>> LearnerState.restore(state.to_tensors(), state.to_json()).levels[0].weights
        {'w': tensor([1., 1.])}
        """
        try:
            levels = []
            for number, known in enumerate(values["levels"]):
                rule = groups.get(f"level-{number}.rule", {})
                slots: dict[str, dict[int, Tensor]] = {}
                gathered = {}
                for key, tensor in rule.items():
                    kind, _, name = key.partition(".")
                    if kind == "gathered":
                        gathered[name] = tensor
                    else:
                        slots.setdefault(name, {})[int(kind.removeprefix("slot-"))] = tensor
                levels.append(
                    LevelState(
                        weights=dict(groups.get(f"level-{number}", {})),
                        slots={name: tuple(ts[i] for i in sorted(ts)) for name, ts in slots.items()},
                        gathered=gathered,
                        kept={
                            name: Kept(matrix, name in known["transposed"])
                            for name, matrix in groups.get(f"level-{number}.kept", {}).items()
                        },
                        tokens=known["tokens"],
                        scored=known["scored"],
                        updates=known["updates"],
                        moved=known["moved"],
                        surprise=Scale(**known["surprise"]),
                    )
                )
            return cls(
                levels=tuple(levels),
                clock=values["clock"],
                read=values["read"],
                context=torch.tensor(values["context"], dtype=torch.int64),
                surprise=Scale(**values["surprise"]),
                refused=values["refused"],
                reading=values["reading"],
                sample=tuple(torch.tensor(window) for window in values.get("sample", ())),
                stride=values.get("stride", 1),
                windows=values.get("windows", 0),
                sources={name: Source(**source) for name, source in values["sources"].items()},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"the snapshot is not one of a learner ({error}): choose another") from error


def fresh_state(model: ContinualModel) -> LearnerState:
    """Of a learner that has read nothing; its weights are those that the model was given (`ContinualModel.weights`)."""
    own = [{n: w.detach() for n, w in model.weights.items() if n in level.start} for level in model.levels]
    return LearnerState(tuple(LevelState(weights=weights) for weights in own))

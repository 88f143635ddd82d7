"""What to convert: which layers learn, in how many levels, how often and by which rule each (Eq. 71, section 7.3)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from typing import Any

from nestlearn.errors import UserError, nearest

RULES = ("adamw", "sgd", "m3", "delta-momentum")
KINDS = ("depthwise", "split")
PLACES = ("late", "all")
LATE = 4  # the last quarter of the layers, as in TTT-E2E
PERIODS = (512, 1024, 2048)


def default_rate(period: int) -> float:
    """Of "adamw", where none is given: 2e-4 at a period of 512 tokens, growing with the root of the period.

    Measured on 8,192 tokens of a grammar with three levels (SmolLM2, one run each): held-out loss fell by 0.151 nats
    and that of WikiText-2 by 0.044; at 1e-4 for every level by 0.105 and 0.029, at 3e-4 by 0.150 and 0.041.

    >>> [default_rate(period) for period in PERIODS]
    [0.0002, 0.00028, 0.0004]
    """
    return float(f"{2e-4 * math.sqrt(period / 512):.1e}")


def _several(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Level:
    """How one level learns (Eq. 71).

    Args:
        period: C, tokens between two updates.
        lr: eta of the rule: for "adamw" the change of a weight per update, for "sgd" the factor of the mean gradient.
        rule: "adamw", "sgd" (Eq. 1), "m3" (Eq. 75) or "delta-momentum" (Eq. 49).
        clip: the largest norm of the level's gradient, a mean over the tokens of its chunk; longer ones are shortened.
            With "sgd" without its part along what is kept.
        retention: share of the way back to the pretrained weights at each update, 0 to 1; 0 keeps everything learned.
        budget: the largest distance ``||theta - theta_0|| / ||theta_0||`` of the level; None for any.
        consolidation: how much of what it answers to a text when it has learned it is left alone by later updates: a
            step moves the answer to an input of mean size by ``1 / (1 + consolidation)`` of what it would
            (`nestlearn.convert.kept`); 0 keeps nothing. Where texts conflict, as classes that arrive in groups, 3 with
            the rule "sgd" forgot least of what was tried.

    Raises:
        UserError: an unknown rule, or a number out of its range.

    >>> Level(period=512, lr=1e-4).rule
    'adamw'
    """

    period: int
    lr: float
    rule: str = "adamw"
    clip: float = 1.0
    retention: float = 0.0
    budget: float | None = None
    consolidation: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.period, int) or isinstance(self.period, bool) or self.period < 1:
            raise UserError(f"period={self.period!r} of a level: give a whole number of tokens, 1 or more")
        if self.rule not in RULES:
            raise UserError(f"unknown rule {self.rule!r} of a level: {nearest(str(self.rule), RULES)}")
        if not _number(self.lr) or self.lr < 0:
            raise UserError(f"lr={self.lr!r} of a level: give a number, 0 (never learns) or more")
        if not _number(self.clip) or self.clip <= 0:
            raise UserError(f"clip={self.clip!r} of a level: give the largest norm of a gradient, above 0")
        if not _number(self.retention) or not 0 <= self.retention <= 1:
            raise UserError(f"retention={self.retention!r} of a level: give a share from 0 to 1")
        if self.budget is not None and (not _number(self.budget) or self.budget <= 0):
            raise UserError(
                f"budget={self.budget!r} of a level: give the largest relative distance, above 0, or nothing"
            )
        if not _number(self.consolidation) or self.consolidation < 0:
            raise UserError(f"consolidation={self.consolidation!r} of a level: give a number, 0 (none) or more")


@dataclass(frozen=True)
class LevelsConfig:
    """How a pretrained model becomes a continual learner: which MLPs learn, and at which level.

    Args:
        kind: "depthwise" places each chosen layer's MLP at one level, consecutive layers together and late layers fast
            (section 7.3); "split" divides the hidden neurons of each chosen MLP among the levels, whose outputs add up
            (the independent continuum memory of Eq. 74 with all weights one).
        levels: fast to slow, so by period in increasing order; by default 512, 1024 and 2048 tokens, whose rates grow
            with the root of the period (`default_rate`).
        layers: "late", the last quarter (at least one layer a level), "all", or the indices of layers.

    Raises:
        UserError: an unknown kind or place, no level, levels that are not ordered fast to slow, or an index twice.

    >>> LevelsConfig(levels=[Level(256, 1e-4), Level(4096, 3e-5)]).levels[0].period
    256
    """

    kind: str = "depthwise"
    levels: tuple[Level, ...] = tuple(Level(period, default_rate(period)) for period in PERIODS)
    layers: str | tuple[int, ...] = "late"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"unknown kind {self.kind!r} of conversion: {nearest(str(self.kind), KINDS)}")
        if not _several(self.levels) or not self.levels or not all(isinstance(level, Level) for level in self.levels):
            raise UserError(f"levels={self.levels!r}: give one Level or more, fast to slow")
        object.__setattr__(self, "levels", tuple(self.levels))
        if any(slow.period < fast.period for fast, slow in pairwise(self.levels)):
            periods = [level.period for level in self.levels]
            given, ordered = (",".join(map(str, numbers)) for numbers in (periods, sorted(periods)))
            raise UserError(f"the periods {given} of the levels are not ordered fast to slow: give {ordered}")
        if isinstance(self.layers, str):
            if self.layers not in PLACES:
                raise UserError(f"unknown layers {self.layers!r}: {nearest(self.layers, PLACES)}, or a list of indices")
            return
        if not _several(self.layers) or not self.layers or not all(type(index) is int for index in self.layers):
            raise UserError(f"layers={self.layers!r}: give 'late', 'all' or a list of indices of layers")
        if len(set(self.layers)) < len(self.layers):
            raise UserError(f"layers={','.join(map(str, self.layers))}: an index stands there twice")
        object.__setattr__(self, "layers", tuple(sorted(self.layers)))

    def chosen_layers(self, count: int) -> tuple[int, ...]:
        """The indices of the layers that learn, of a model of ``count`` layers, in increasing order.

        Raises `UserError` for an index that the model has not, and for fewer layers than depthwise levels.

        >>> LevelsConfig().chosen_layers(30)
        (22, 23, 24, 25, 26, 27, 28, 29)
        """
        if isinstance(self.layers, str):
            late = max(-(-count // LATE), len(self.levels) if self.kind == "depthwise" else 1)
            chosen = tuple(range(count if self.layers == "all" else min(late, count)))
            chosen = tuple(index + count - len(chosen) for index in chosen)
        else:
            strange = [index for index in self.layers if not 0 <= index < count]
            if strange:
                raise UserError(f"the model has no layer {strange[0]}: give indices from 0 to {count - 1}")
            chosen = self.layers
        if self.kind == "depthwise" and len(chosen) < len(self.levels):
            raise UserError(
                f"{len(self.levels)} depthwise levels need as many layers and there are {len(chosen)}: "
                "give fewer levels, more layers or kind='split'"
            )
        return chosen

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold; `from_dict` is its inverse.

        >>> LevelsConfig.from_dict(LevelsConfig().to_dict()) == LevelsConfig()
        True
        """
        layers = self.layers if isinstance(self.layers, str) else list(self.layers)
        return {"kind": self.kind, "levels": [asdict(level) for level in self.levels], "layers": layers}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LevelsConfig:
        """The configuration that `to_dict` wrote. Raises `UserError` for an unknown key and whatever the class does."""
        given = dict(_known(cls, values))
        if "levels" in given:
            if not _several(given["levels"]) or not all(isinstance(level, Mapping) for level in given["levels"]):
                raise UserError(f"levels={given['levels']!r}: give a list of objects with period and lr")
            given["levels"] = tuple(_level(level) for level in given["levels"])
        return cls(**given)


def _level(values: Mapping[str, Any]) -> Level:
    given = _known(Level, values)
    missing = [name for name in ("period", "lr") if name not in given]
    if missing:
        raise UserError(f"a level has no {missing[0]}: give period and lr")
    return Level(**given)


def _known(cls: type, values: Mapping[str, Any]) -> Mapping[str, Any]:
    names = [field.name for field in fields(cls)]
    for name in values:
        if name not in names:
            raise UserError(f"unknown entry {name!r} of {cls.__name__}: {nearest(str(name), names)}")
    return values

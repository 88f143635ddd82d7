"""How often something is updated (Definition 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from nestlearn.errors import UserError, nearest

UNITS = ("token", "step")
Key = tuple[int, Fraction]


@dataclass(frozen=True)
class UpdateFrequency:
    """Updates per unit of time; the unit is one token of a sequence or one step of the outer optimizer.

    Args:
        rate: updates per unit, exact. `math.inf` is a non-parametric memory, which holds its data as they are and has
            nothing to update; 0 is frozen. See `every`, `NON_PARAMETRIC` and `FROZEN`.
        unit: "token" or "step". A step is one update over one data point of the outer problem, a batch as a rule.
        said: what to print where ``rate`` is only assumed, such as "not given".

    Raises:
        UserError: a rate that is no number or below zero, or an unknown unit.

    >>> print(UpdateFrequency.every(16, "token"), UpdateFrequency.every(1), FROZEN, sep="; ")
    1/16 per token; 1 per step; 0 (frozen)
    """

    rate: Fraction | float
    unit: Literal["token", "step"] = "step"
    said: str = ""

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise UserError(f"unknown unit {self.unit!r} of an update frequency: {nearest(str(self.unit), UNITS)}")
        number = isinstance(self.rate, (int, float, Fraction)) and not isinstance(self.rate, bool)
        if not number or not self.rate >= 0:
            raise UserError(
                f"update frequency {self.rate!r}: it must be a positive number of updates per {self.unit}, "
                "0 for frozen or infinity for non-parametric"
            )
        if self.rate < math.inf:
            rate = Fraction(self.rate)
            if isinstance(self.rate, float) and rate > Fraction(1, 10**9):  # 0.1 is meant as 1/10
                rate = rate.limit_denominator(10**9)
            object.__setattr__(self, "rate", rate)

    @classmethod
    def every(cls, period: int, unit: Literal["token", "step"] = "step", updates: float = 1) -> UpdateFrequency:
        """``updates`` updates in every ``period`` units.

        Raises:
            UserError: a period that is not a positive integer, or updates that are not positive and finite.
        """
        if type(period) is not int or period < 1:
            raise UserError(f"the period of an update is {period!r}: it must be a whole number of {unit}s, 1 or more")
        if not 0 < updates < math.inf:
            raise UserError(f"{updates!r} updates per {period} {unit}s: the number must be positive and finite")
        return cls(Fraction(updates).limit_denominator(10**9) / period, unit)

    @property
    def period(self) -> Fraction | None:
        """Units between two updates; None where there are none."""
        return None if self.rate in (0, math.inf) else 1 / Fraction(self.rate)

    def key(self, tokens_per_step: int | None = None) -> Key:
        """What frequencies sort by, fastest first; equal frequencies have equal keys.

        Tokens and steps compare by ``tokens_per_step``. Without it whatever is updated inside a sequence counts as
        faster than the outer optimizer, which sees a whole batch before it makes a step.
        """
        if self.rate == math.inf:
            return (0, Fraction(0))
        if self.rate == 0:
            return (3, Fraction(0))
        rate = Fraction(self.rate)
        if tokens_per_step is None:
            return (1 if self.unit == "token" else 2, -rate)
        return (1, -rate if self.unit == "token" else -rate / tokens_per_step)

    def __str__(self) -> str:
        """In words."""
        if self.said:
            return self.said
        if self.rate == math.inf:
            return "infinite (non-parametric)"
        return "0 (frozen)" if self.rate == 0 else f"{_short(Fraction(self.rate))} per {self.unit}"


def _short(rate: Fraction) -> str:
    return str(rate) if rate.denominator < 10**6 else f"{float(rate):.3g}"


NON_PARAMETRIC = UpdateFrequency(math.inf)
FROZEN = UpdateFrequency(0)

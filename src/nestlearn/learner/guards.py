"""What keeps a learner from harm: windows that are refused, and a text whose perplexity must not worsen.

The third guard, the budget of a level, is in `nestlearn.learner.update`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nestlearn.errors import UserError
from nestlearn.learner.state import LearnerState, Scale

WARMUP = 8
"""Windows before a surprise is judged; non-finite numbers are refused from the first one."""
FLOOR = 0.25
"""Smallest standard deviation that counts, in nats per token of a loss and in e-folds of a gradient's norm: on a
monotonous stream a small change is no alarm."""


def refusal(state: LearnerState, loss: float, norms: Sequence[float], share: float, deviations: float) -> str | None:
    """Why the state must not learn from a window, or None.

    Refused is a loss or a gradient that is not finite, and, after 8 windows, a surprise far above its running scale:
    more than ``deviations`` standard deviations above the mean, be it the loss or the norm of a level's gradient (on
    a logarithmic scale). Each refusal in a row widens the limit by as much again, so that a single window of noise is
    kept out, and a stream that has really changed gets in after a few windows.

    Args:
        loss: nats per token of the window.
        norms: of the window's mean gradient, for each level; empty before they are known.
        share: how much of a window there was, 0 to 1; a short one may stray further.
        deviations: the limit; infinity refuses only what is not finite.

    >>> refusal(LearnerState(()), float("nan"), [], 1.0, 8.0)
    'the loss is not finite'
    """
    if not math.isfinite(loss):
        return "the loss is not finite"
    limit = _limit(state.surprise, state.refused, share, deviations)
    if loss > limit:
        return f"the loss of {loss:.2f} is far above its running mean of {state.surprise.mean:.2f} (limit {limit:.2f})"
    for number, (norm, level) in enumerate(zip(norms, state.levels, strict=False)):
        if not math.isfinite(norm):
            return f"the gradient of level {number} is not finite"
        limit = _limit(level.surprise, state.refused, share, deviations)
        if norm > 0 and math.log(norm) > limit:
            usual = math.exp(level.surprise.mean)
            return f"the gradient of level {number}, {norm:.2g}, is far above its running mean of {usual:.2g}"
    return None


def _limit(scale: Scale, refused: int, share: float, deviations: float) -> float:
    if scale.count < WARMUP:
        return math.inf
    spread = max(math.sqrt(scale.variance), FLOOR) / math.sqrt(share)
    return scale.mean + deviations * (1 + refused) * spread


@dataclass(frozen=True)
class RetentionProbe:
    """A text that the model must go on predicting well: learning stops when it does not.

    Args:
        text: of the user's choice; a few thousand tokens measure well.
        limit: largest perplexity on it, in units of the pretrained model's: 1.1 allows 10 % more.
        every: tokens read between two measurements.

    Raises:
        UserError: an empty text, or a number out of range.

    >>> RetentionProbe("What it knew.", limit=1.05).every
    8192
    """

    text: str
    limit: float = 1.1
    every: int = 8192

    def __post_init__(self) -> None:
        if not self.text.strip():
            raise UserError("the text of the retention probe is empty: give text that the model must not forget")
        if not 1 <= self.limit < math.inf:
            raise UserError(f"limit={self.limit} of the retention probe: give 1 or more, such as 1.1 for 10 % more")
        if self.every < 1:
            raise UserError(f"every={self.every} of the retention probe: give 1 token or more")

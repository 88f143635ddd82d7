"""What reading did: how surprising the text was, what moved, and what was refused."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from nestlearn.learner.state import LearnerState, Source
from nestlearn.learner.step import Outcome
from nestlearn.train.evaluate import perplexity

SHOWN = 5  # refused windows that are printed one by one


@dataclass(frozen=True)
class Skipped:
    """A window that was refused: ``tokens`` of them from token ``start`` of the text on, and why."""

    start: int
    tokens: int
    reason: str


@dataclass(frozen=True)
class LevelReport:
    """One level over a read.

    Args:
        number: 0 is the fastest.
        updates: made during this read.
        surprise: mean norm of the gradient of a window of the read (a mean over its tokens); None if there was none.
        moved: ||theta - theta_0|| / ||theta_0|| after it, from the pretrained weights.
    """

    number: int
    updates: int
    surprise: float | None
    moved: float


@dataclass(frozen=True)
class ReadReport:
    """A read, or what there is of it so far.

    Args:
        tokens: read, those of refused windows included; not those that an earlier read of the source had read.
        resumed: tokens of the source that an earlier read had read.
        loss: nats per token, each predicted before it was learned; refused windows do not count; None if no token was.
        levels: fast to slow.
        skipped: refused windows, in order.
        seconds: it took.
        stopped: why learning ended before the text did; None if it did not.
    """

    tokens: int
    resumed: int
    loss: float | None
    levels: tuple[LevelReport, ...]
    skipped: tuple[Skipped, ...]
    seconds: float
    stopped: str | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"tokens_per_second": self.tokens_per_second}

    def __str__(self) -> str:
        if self.tokens == 0 and self.stopped is not None:
            return f"nothing was read: {self.stopped}"
        if self.tokens == 0:
            return f"nothing new, {self.resumed:,} tokens were read before" if self.resumed else "nothing to read"
        surprise = "" if self.loss is None else f", loss {self.loss:.3f} (perplexity {perplexity(self.loss):.2f})"
        lines = [f"read {self.tokens:,} tokens{surprise}, {self.tokens_per_second:,.0f} tokens/s"]
        if self.resumed:
            lines[0] += f", after {self.resumed:,} read before"
        for level in self.levels:
            norm = "-" if level.surprise is None else f"{level.surprise:.3g}"
            moved = f"moved {100 * level.moved:.3f} % from the pretrained weights"
            lines.append(f"level {level.number}: {level.updates} updates, surprise {norm}, {moved}")
        lines += [f"skipped {s.tokens:,} tokens from token {s.start:,} on: {s.reason}" for s in self.skipped[:SHOWN]]
        if len(self.skipped) > SHOWN:
            lines.append(f"skipped {len(self.skipped) - SHOWN} more windows")
        if self.stopped:
            lines.append(f"stopped: {self.stopped}")
        return "\n".join(lines)


class Tally:
    """Counts a read as it goes.

    Args:
        state: before it.
        known: how far an earlier read of the source came.
    """

    def __init__(self, state: LearnerState, known: Source | None) -> None:
        self.began = time.perf_counter()
        self.updates = [level.updates for level in state.levels]
        self.resumed = 0 if known is None else known.tokens
        self.tokens, self.scored, self.loss, self.measured = 0, 0, 0.0, 0
        self.norms = [0.0] * len(state.levels)
        self.skipped: list[Skipped] = []

    def add(self, outcome: Outcome, tokens: int) -> None:
        """One more window."""
        if outcome.refused is not None:
            self.skipped.append(Skipped(self.resumed + self.tokens, tokens, outcome.refused))
        elif outcome.scored:
            self.loss += outcome.loss
            self.scored += outcome.scored
            self.norms = [known + norm for known, norm in zip(self.norms, outcome.norms, strict=True)]
            self.measured += 1
        self.tokens += tokens

    def report(self, state: LearnerState, stopped: str | None = None) -> ReadReport:
        """The report when ``state`` is the learner's."""
        levels = tuple(
            LevelReport(number, level.updates - before, norm / self.measured if self.measured else None, level.moved)
            for number, (level, before, norm) in enumerate(zip(state.levels, self.updates, self.norms, strict=True))
        )
        loss = self.loss / self.scored if self.scored else None
        seconds = time.perf_counter() - self.began
        return ReadReport(self.tokens, self.resumed, loss, levels, tuple(self.skipped), seconds, stopped)

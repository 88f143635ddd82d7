"""Models that keep learning: a stream is read, what was learned is kept, named, forked and rolled back."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nestlearn.learner.guards import RetentionProbe
    from nestlearn.learner.learner import ContinualLearner
    from nestlearn.learner.report import LevelReport, ReadReport, Skipped
    from nestlearn.learner.sessions import Sessions
    from nestlearn.learner.state import LearnerState

__all__ = [
    "ContinualLearner",
    "LearnerState",
    "LevelReport",
    "ReadReport",
    "RetentionProbe",
    "Sessions",
    "Skipped",
]

# Loaded when first used: the command line registers the commands of this package without loading torch.
_LAZY = {
    "ContinualLearner": "learner",
    "LearnerState": "state",
    "LevelReport": "report",
    "ReadReport": "report",
    "RetentionProbe": "guards",
    "Sessions": "sessions",
    "Skipped": "report",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)

"""`Holder`: a learner's state, and whether the tensors in it may be written over.

Nobody but the holder has the state until someone asks for it, and from then on it never changes. A state that nobody
has asked for is learned in place (`nestlearn.learner.step.learn`): an update then costs no fresh memory.
"""

from __future__ import annotations

import threading

from torch import Tensor

from nestlearn.convert import ContinualModel
from nestlearn.files import uninterrupted
from nestlearn.learner.reading import Reading
from nestlearn.learner.state import LearnerState, Source
from nestlearn.learner.step import Outcome, Prediction, learn


class CutOff(Exception):
    """Something was raised, or was out of memory, while tensors were written over: the state is of no more use."""


class Holder:
    """See the head of this file.

    Attributes:
        current: the state, to look at, and to replace by one that shares its tensors.

    >>> holder = Holder(LearnerState(()))
    >>> holder.take() is holder.current
    True
    """

    def __init__(self, state: LearnerState) -> None:
        self.current = state
        self._own: set[int] = set()  # numbers of the levels whose tensors are nowhere but here
        self._turn = threading.Lock()  # either the state is given away, or what is its own is written over

    def take(self) -> LearnerState:
        """The state, to keep: what comes next is learned beside it."""
        with self._turn:
            self._own.clear()
            return self.current

    def put(self, state: LearnerState) -> None:
        """Another state, whose tensors others may have."""
        with self._turn:
            self._own.clear()
            self.current = state

    def learn(
        self,
        model: ContinualModel,
        window: Tensor,
        reading: Reading,
        prediction: Prediction,
        position: tuple[str, Source] | None,
    ) -> Outcome:
        """Go on to the state after a window, at a position of a named source. Ctrl-C waits for its end.

        Raises:
            CutOff: from what was raised in the middle of an update, as by the third Ctrl-C; `put` another state.
        """
        with uninterrupted(), self._turn:
            before = self.current.versions()
            try:
                outcome = learn(model, self.current, window, reading, prediction, self._own)
                self.current = outcome.state if position is None else outcome.state.with_source(*position)
            except BaseException as stop:
                if self.current.versions() == before:
                    raise
                raise CutOff from stop
        return outcome

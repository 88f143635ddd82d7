"""Many learners on one base model in memory: one forward pass for all, each row with its own learned weights.

No state can leak: a row's weights are in no other row's loss, and while the same sessions are open a pass has the same
shape, whoever has text and however much, so that not one bit of a session depends on another's text. The cost: who
rests beside one that reads is carried along as an empty row, and every pass is as long as a full window.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestlearn.convert import ContinualModel, convert
from nestlearn.errors import UserError, nearest
from nestlearn.learner.learner import ContinualLearner
from nestlearn.learner.reading import Reading
from nestlearn.learner.report import ReadReport, Tally
from nestlearn.learner.state import LearnerState, fresh_state
from nestlearn.learner.step import flush, rows_of, step
from nestlearn.learner.stream import Text, Windows

NOTHING = torch.empty(0, dtype=torch.int64)


class Sessions:
    """Learned states by name on one base model.

    Args:
        model, tokenizer, window, context, max_surprise: as of `ContinualLearner`.
        rows: sessions in one forward pass. The pass holds a copy of each one's weights; more sessions take turns.

    Raises:
        UserError: as `ContinualLearner`, or ``rows`` below 1.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from nestlearn.data import load_tokenizer
    >>> small = LlamaConfig(vocab_size=258, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
    ...                     num_attention_heads=2)
    >>> sessions = Sessions(LlamaForCausalLM(small), load_tokenizer("bytes"))
    >>> sessions.open("ann"); sessions.open("bob")
    >>> {name: report.tokens for name, report in sessions.read({"ann": "I sail.", "bob": "I ski."}).items()}
    {'ann': 7, 'bob': 6}
    """

    def __init__(
        self,
        model: ContinualModel | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        window: int | None = None,
        context: int = 0,
        max_surprise: float = 6.0,
        rows: int = 8,
    ) -> None:
        if rows < 1:
            raise UserError(f"rows={rows}: give the sessions of a forward pass, 1 or more")
        self.model = model if isinstance(model, ContinualModel) else convert(model)
        self.model.eval()
        self.tokenizer, self.rows = tokenizer, rows
        self.reading = Reading.of(self.model, tokenizer, window, context, max_surprise)
        self.states: dict[str, LearnerState] = {}

    def open(self, name: str, state: LearnerState | None = None) -> None:
        """Begin a session from the model's weights, or from a state, such as that of a learner on the same model.

        Raises `UserError` for a name that is taken.
        """
        if name in self.states:
            raise UserError(f"there is a session {name!r} already: close it first, or choose another name")
        self.states[name] = fresh_state(self.model) if state is None else state

    def close(self, name: str) -> LearnerState:
        """End a session; its last state, from which `open` or a learner can go on."""
        state = self._state(name)
        del self.states[name]
        return state

    def learner(self, name: str) -> ContinualLearner:
        """A learner of its own that goes on from a session's state, to generate, to save, to measure a loss."""
        learner = ContinualLearner(
            self.model,
            self.tokenizer,
            window=self.reading.window,
            context=self.reading.context,
            max_surprise=self.reading.deviations,
        )
        learner.state = self._state(name)
        return learner

    def using(self, names: Sequence[str]) -> AbstractContextManager[None]:
        """A context in which row b of a batch is read by the model with the weights of session ``names[b]``, to
        generate or to score for many sessions at once.

        Raises `UserError` for a session that is not open.
        """
        states = [self._state(name) for name in names]
        return self.model.using(rows_of(self.model, states))

    def read(self, texts: Mapping[str, Text]) -> dict[str, ReadReport]:
        """Learn from a text for each of some sessions, as `ContinualLearner.read` does for one.

        Raises `UserError` for a session that is not open, before anything is read.
        """
        for name in texts:
            self._state(name)
        windows = {name: iter(Windows(text, self.tokenizer, self.reading.window)) for name, text in texts.items()}
        tallies = {name: Tally(self.states[name], None) for name in texts}
        for name in texts:
            self.states[name] = self.states[name].opened(None)
        while windows:
            for begin in range(0, len(self.states), self.rows):
                self._pass(list(self.states)[begin : begin + self.rows], windows, tallies)
        for name in texts:
            self.states[name] = flush(self.model, self.states[name], self.reading).opened(None)
        return {name: tally.report(self.states[name]) for name, tally in tallies.items()}

    def _pass(self, group: list[str], windows: dict[str, Iterator[Tensor]], tallies: Mapping[str, Tally]) -> None:
        """One window of everyone in the group who has one; a source that is at its end leaves ``windows``."""
        given = {}
        for name in group:
            if name not in windows:
                continue
            window = next(windows[name], None)
            if window is None:
                del windows[name]
            else:
                given[name] = window
        if not given:
            return
        states, pieces = [self.states[name] for name in group], [given.get(name, NOTHING) for name in group]
        outcomes = step(self.model, states, pieces, self.reading, fixed=True)
        for name, outcome in zip(group, outcomes, strict=True):
            if name in given:
                self.states[name] = outcome.state
                tallies[name].add(outcome, len(given[name]))

    def _state(self, name: str) -> LearnerState:
        if name not in self.states:
            raise UserError(f"no session {name!r} is open; {nearest(name, self.states)}")
        return self.states[name]

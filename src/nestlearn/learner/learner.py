"""`ContinualLearner`: reads a stream, keeps what it learns, names it, forks it and rolls it back.

How a text is read:

* Its tokens are read in windows of ``window`` tokens, the period of the fastest level unless that does not fit; every
  period is a whole number of windows. The windows depend on the text alone, not on the pieces it comes in, and no more
  of it is held than a window and what the tokenizer needs.
* Each window is predicted once, with the weights as they are: ``context`` tokens before it are visible and not
  predicted again. A text (one call of `read`) begins with no context; several documents in one text are joined by the
  tokenizer's end-of-text token and read as one, as in pretraining.
* Every level gathers the gradient of the loss over its period and then makes one update with the mean (Eq. 71). Clocks
  count tokens and run on over the texts. At the end of a text the partial last window is read, and the levels of the
  shortest period learn from what they have gathered, however little; slower ones go on gathering.
* A window whose surprise is far above what is usual, or not finite, is refused as a whole: no weight, gathered gradient
  or clock changes. It is in the report.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestlearn.convert import ContinualModel, LevelsConfig, base_hash, convert
from nestlearn.errors import UserError
from nestlearn.files import uninterrupted
from nestlearn.learner.guards import RetentionProbe
from nestlearn.learner.holder import CutOff, Holder
from nestlearn.learner.reading import Reading, mean_loss
from nestlearn.learner.report import ReadReport, Tally
from nestlearn.learner.state import LearnerState, LevelState, Tensors, fresh_state
from nestlearn.learner.step import flush, predict
from nestlearn.learner.store import Snapshot, Store
from nestlearn.learner.store.compare import Diff
from nestlearn.learner.stream import Text, Windows
from nestlearn.train.evaluate import perplexity
from nestlearn.train.generate import generate_text

KEPT = 1  # automatic snapshots behind the newest one


class ContinualLearner:
    """A language model that goes on learning from what it reads.

    Args:
        model: what `nestlearn.convert` returned, or a causal language model of transformers, which is converted in
            place with the default levels.
        tokenizer: of the model.
        store: folder of a memory store, or a `Store`. What it holds last is taken up again. Without one, what is
            learned is lost with the object.
        window: tokens predicted at a time; by default the period of the fastest level, or the most of it that divides
            every period and fits the model.
        context: tokens before a window that are visible while it is predicted; their cost is that of reading them.
        probe: a text that must not get worse.
        max_surprise: standard deviations above its running mean from which on a window is refused; infinity refuses
            only what is not finite.
        autosave: tokens between two automatic snapshots during a read, at whose end there is one too; None makes none.
            With a probe a snapshot waits for its next measurement, so that only what has passed is kept.

    Raises:
        UserError: a model that cannot be converted, a number out of range, or a store of another base model or levels.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from nestlearn.data import load_tokenizer
    >>> small = LlamaConfig(vocab_size=258, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
    ...                     num_attention_heads=2)
    >>> learner = ContinualLearner(LlamaForCausalLM(small), load_tokenizer("bytes"))
    >>> learner.read("A manual.").tokens
    9
    """

    def __init__(
        self,
        model: ContinualModel | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        store: str | Path | Store | None = None,
        *,
        window: int | None = None,
        context: int = 0,
        probe: RetentionProbe | None = None,
        max_surprise: float = 6.0,
        autosave: int | None = None,
    ) -> None:
        self.model = model if isinstance(model, ContinualModel) else convert(model)
        self.model.eval()
        self.tokenizer, self.probe, self.autosave = tokenizer, probe, autosave
        self.reading = Reading.of(self.model, tokenizer, window, context, max_surprise)
        if autosave is not None and autosave < 1:
            raise UserError(f"autosave={autosave}: give the tokens between two automatic snapshots, 1 or more")
        self._held = Holder(fresh_state(self.model))
        self.snapshot: Snapshot | None = None  # the last one saved or opened, and the state in it
        self._saved: LearnerState | None = None
        self._good: LearnerState | None = None  # the last state that the probe has passed
        self._baseline: float | None = None  # the pretrained model's loss on the probe
        self.store = store if isinstance(store, Store) or store is None else Store(store, base_hash(self.model))
        if self.store is not None and self.store.head() is not None:
            self._open("head")

    @property
    def state(self) -> LearnerState:
        """What was learned, and all that a resume needs. Whoever has it may keep it: it never changes, as what comes
        next is then learned beside it."""
        return self._held.take()

    @state.setter
    def state(self, state: LearnerState) -> None:
        self._held.put(state)

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, or for another process, which may have the same tensors."""
        return {**self.__dict__, "_held": self.state}

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values, _held=Holder(values["_held"]))

    @property
    def weights(self) -> Tensors:
        """The learned weights by name, for `ContinualModel.using`; a name that is absent has its pretrained weight."""
        return self.state.weights

    @property
    def unsaved(self) -> bool:
        """Whether something was learned since the last snapshot was saved by name or by hand, or opened."""
        if self.snapshot is None:
            return self._held.current.read > 0
        return not self.stored or self.snapshot.automatic

    @property
    def stored(self) -> bool:
        """Whether the store has the state as it is now, in a snapshot of any kind."""
        return self._saved is self._held.current

    @torch.inference_mode(False)
    def read(
        self,
        text: Text,
        *,
        source: str | None = None,
        again: bool = False,
        on_window: Callable[[ReadReport], None] | None = None,
    ) -> ReadReport:
        """Learn from a text, once.

        Args:
            text: a string; an iterable of strings, which are the pieces of one document; or an iterable of iterables of
                strings, which are documents.
            source: a name under which the state notes how far the text has been read. Given again, the text goes on
                from there, after a look whether it begins as before.
            again: read the source from its beginning, whatever has been read of it.
            on_window: called after each window with the report so far.

        Raises:
            UserError: what is given is no text, or the source has changed.
            KeyboardInterrupt: Ctrl-C; all windows before are learned, and saved if the learner saves automatically.
        """
        known = None if source is None or again else self._held.current.sources.get(source)
        windows = Windows(text, self.tokenizer, self.reading.window, source, known)
        tally, began = Tally(self._held.current, known), self._held.current
        if (reason := self._over_limit()) is not None:  # as it was opened: it stays as it is
            return tally.report(self._held.current, reason)
        if known is None or self._held.current.reading != source:
            self._held.current = self._held.current.opened(source)
            if self.probe is not None:
                self._good = self.state
        try:
            reason = self._read(windows, tally, on_window)
        except BaseException as stop:  # of the text or of on_window, too: nothing over the limit is left behind
            if self._over_limit() is not None:
                self._turn_back()
            if isinstance(stop, KeyboardInterrupt):
                self.checkpoint()
            raise
        if reason is not None:
            self._turn_back()
        if tally.tokens:
            self.checkpoint()
        elif known is not None and known.finished:
            self._held.current = began
        return tally.report(self._held.current, reason)

    def _read(self, windows: Windows, tally: Tally, on_window: Callable[[ReadReport], None] | None) -> str | None:
        """Why reading has stopped before the end of the text, None if it has not."""
        source, unsaved = windows.name, False
        for window in windows:
            before = self._held.current.read
            (prediction,) = predict(self.model, [self._held.current], [window], self.reading)
            position = None if source is None else (source, windows.position)
            try:
                outcome = self._held.learn(self.model, window, self.reading, prediction, position)
            except CutOff as cut:
                raise self._back() from cut
            state = self._held.current
            del prediction  # its gradient is as large as all that learns
            tally.add(outcome, len(window))
            if on_window is not None:
                on_window(tally.report(self._held.current))
            due = self.probe is not None and _passed(before, state.read, self.probe.every)
            if due and (reason := self._over_limit()):
                return reason
            unsaved |= self.autosave is not None and _passed(before, state.read, self.autosave)
            if unsaved and (due or self.probe is None):
                self.checkpoint()
                unsaved = False
        end = self._held.current
        if tally.tokens or (windows.read is not None and not windows.read.finished):
            end = flush(self.model, end, self.reading)
        end = end.opened(None)
        if source is not None:
            end = end.with_source(source, replace(windows.position, finished=True))
        self._held.current = end
        return self._over_limit()

    def _back(self) -> UserError:
        """Go back from an update that was cut off, to what the store has or to what the learner began with."""
        back = "what it began with"
        if self.snapshot is None:
            self.state = fresh_state(self.model)
        else:
            self._open(self.snapshot.id)
            back = f"snapshot {self.snapshot.name or self.snapshot.short}"
        return UserError(f"an update was cut off in its middle: the learner is back at {back}")

    def loss(self, text: Text) -> float:
        """Nats per token of a text with the learned weights, read as `read` does, and not learned.

        Raises `UserError` for a text without a token to predict.
        """
        return mean_loss(self.model, self.tokenizer, self.reading, self.weights, text)

    def probe_loss(self, weights: Tensors | None = None) -> float:
        """`loss` on the text of the probe, with other weights if they are given. Raises `UserError` without a probe."""
        if self.probe is None:
            raise UserError(
                "the learner has no probe: give one, as in ContinualLearner(..., probe=RetentionProbe(text))"
            )
        own = self.weights if weights is None else weights
        return mean_loss(self.model, self.tokenizer, self.reading, own, self.probe.text)

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        top_p: float = 1.0,
        seed: int | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """Continue a prompt with the learned weights; see `nestlearn.train.generate.generate_text`."""
        with self.model.using(self.weights):
            return generate_text(
                self.model.base,
                self.tokenizer,
                prompt,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                on_text=on_text,
            )

    def save(self, name: str | None = None) -> Snapshot:
        """Keep the whole state as a snapshot. Raises `UserError` without a store, or for a name that is taken."""
        return self._save(name, auto=False)

    def checkpoint(self) -> None:
        """An automatic snapshot of the state as it is, if the learner makes any; one behind it is kept."""
        if self.autosave is not None and self.store is not None:
            self._save(None, auto=True)

    def rollback(self, ref: str) -> Snapshot:
        """Go back to a snapshot: a name, an id or its first digits, "head", "head~2". Nothing is removed."""
        store = self._stored()
        found = store.get(ref)
        state = LearnerState.restore(*self._load(found.id))  # before anything moves: it may be damaged
        self.snapshot = store.rollback(found.id)
        self.state = self._saved = state
        return self.snapshot

    def forget(self) -> None:
        """Back to the pretrained weights, with nothing read. The snapshots stay."""
        self.state = LearnerState((LevelState(),) * len(self.model.levels))

    def log(self) -> list[Snapshot]:
        """The snapshots behind this state, newest first."""
        return self._stored().log()

    def diff(self, a: str, b: str) -> Diff:
        """How far each level moved between two snapshots, which weights most, and the loss on the probe with each."""
        measures = {}
        if self.probe is not None:
            losses = [self.probe_loss(LearnerState.restore(*self._load(ref)).weights) for ref in (a, b)]
            measures["loss on the probe"] = (losses[0], losses[1])
        return self._stored().diff(a, b, measures, self._start)

    def merge(self, a: str, b: str, weight: float = 0.5, name: str | None = None) -> Snapshot:
        """Go on from the average of what two snapshots learned, ``weight`` of it from b: see `Store.merge`."""
        store = self._stored()
        for ref in (a, b):
            self._check_levels(store.get(ref))
        snapshot = store.merge(a, b, weight, name, start=self._start)
        self._open(snapshot.id)
        return snapshot

    def fork(self, name: str | None = None) -> ContinualLearner:
        """Another learner on the same model that goes on from this state; neither sees what the other learns.

        Args:
            name: of the branch of the store that it saves to; None gives it no store.
        """
        store = None
        if name is not None:
            snapshot = self.snapshot if self.stored and self.snapshot is not None else self.save()
            store = self._stored().fork(name, snapshot.id)
        other = ContinualLearner(
            self.model,
            self.tokenizer,
            window=self.reading.window,
            context=self.reading.context,
            probe=self.probe,
            max_surprise=self.reading.deviations,
            autosave=self.autosave if store is not None else None,
        )
        other.store, other.state = store, self.state
        other.snapshot, other._saved = self.snapshot, self._saved
        other._good, other._baseline = self._good, self._baseline
        return other

    def _stored(self) -> Store:
        if self.store is None:
            raise UserError(
                "the learner has no store: give one, as in ContinualLearner(model, tokenizer, store='memory')"
            )
        return self.store

    def _over_limit(self) -> str | None:
        """Why learning must not go on from this state, by the probe; the state that passes is kept as the good one."""
        if self.probe is None or self._held.current is self._good:
            return None
        if self._baseline is None:
            self._baseline = self.probe_loss({})
        loss = self.probe_loss()
        if not math.isfinite(loss):
            return "the loss on the probe is not finite"
        worse = perplexity(loss - self._baseline)
        if worse > self.probe.limit:
            return (
                f"the perplexity of the probe is {worse:.3f} times the pretrained model's (limit {self.probe.limit:g})"
            )
        self._good = self.state
        return None

    def _turn_back(self) -> None:
        """To the last state that the probe has passed."""
        if self._good is not None:
            self.state = self._good

    def _save(self, name: str | None, *, auto: bool) -> Snapshot:
        state = self.state
        meta = {
            "auto": auto,
            "tokens": state.clock,
            "loss": state.surprise.mean if state.surprise.count else None,
            "config": self.model.config_levels.to_dict(),
            "reading": {"window": self.reading.window, "context": self.reading.context},
            "learner": state.to_json(),
        }
        with uninterrupted():  # what is saved is in the store and known to be there, or neither
            self.snapshot, self._saved = self._stored().save(state.to_tensors(), meta, name=name), state
            self._stored().prune(keep_last=KEPT)
        return self.snapshot

    def _load(self, ref: str) -> tuple[dict[str, Tensors], dict[str, Any]]:
        """The tensors of a snapshot, and the JSON beside them. Raises `UserError` if it does not fit the model."""
        groups, snapshot = self._stored().load(ref)
        self._check_levels(snapshot)
        device = self.model.device
        # Copied out of the mapped file, so that every tensor lies as it would without a stop, to the bit of every sum.
        copies = {g: {n: t.to(device, copy=True) for n, t in tensors.items()} for g, tensors in groups.items()}
        return copies, snapshot.meta.get("learner", {})

    def _check_levels(self, snapshot: Snapshot) -> None:
        config = snapshot.meta.get("config")
        if config is None or LevelsConfig.from_dict(config) != self.model.config_levels:
            raise UserError(
                f"snapshot {snapshot.name or snapshot.short} was learned with other levels than the model has: convert "
                "the model with those of its meta, or give another store"
            )

    def _open(self, ref: str) -> None:
        """Take up the state of a snapshot."""
        self.state = self._saved = LearnerState.restore(*self._load(ref))
        self.snapshot = self._stored().get(ref)

    @property
    def _start(self) -> ChainMap[str, Tensor]:
        return ChainMap(*(level.start for level in self.model.levels))  # pyrefly: ignore[bad-argument-type]


def _passed(before: int, after: int, every: int) -> bool:
    """Whether a multiple of ``every`` lies between two counts."""
    return after // every > before // every

"""What watches a run: throughput, the progress bar, ``metrics.jsonl`` and the stop by Ctrl-C.

Of several processes the first alone writes and shows.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState

from nestlearn.errors import UserError
from nestlearn.files import parse_json, write_atomic
from nestlearn.train.processes import any_of, join


class Throughput(TrainerCallback):
    """Tokens per second of training steps alone: evaluation and saving do not count.

    ``window()`` is the rate since it was last called (0.0 without a step in between), kept in ``last``.
    """

    def __init__(self) -> None:
        self.last = 0.0
        self._seconds, self._tokens = 0.0, 0
        self._began, self._seen = 0.0, 0

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._began, self._seen = time.perf_counter(), state.num_input_tokens_seen

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._seconds += time.perf_counter() - self._began
        self._tokens += state.num_input_tokens_seen - self._seen

    def window(self) -> float:
        self.last = self._tokens / self._seconds if self._seconds else 0.0
        self._seconds, self._tokens = 0.0, 0
        return self.last


class Metrics(TrainerCallback):
    """One JSON line in ``path`` for every logged training loss and every evaluation.

    Keys: model, step, tokens, and either loss (nats per token, mean since the last line), learning_rate,
    grad_norm and tokens_per_second, or eval_loss (nats per token of the validation set). On resume the lines
    after the checkpoint's step are dropped, for those steps are run again.
    """

    def __init__(self, path: Path, model: str, throughput: Throughput) -> None:
        self.path, self.model, self.throughput = path, model, throughput

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        lines = [_line(row) for row in read_metrics(self.path) if row["step"] <= state.global_step]
        write_atomic(self.path, lambda path: path.write_text("".join(lines)))

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:  # the curves end where the run does
            control.should_log = control.should_evaluate = True

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        logs = logs or {}
        row: dict[str, Any] = {"model": self.model, "step": state.global_step, "tokens": state.num_input_tokens_seen}
        if "loss" in logs:
            row |= {name: logs[name] for name in ("loss", "learning_rate", "grad_norm") if name in logs}
            row["tokens_per_second"] = self.throughput.window()
        elif "eval_loss" in logs:
            row["eval_loss"] = logs["eval_loss"]
        else:
            return  # the Trainer's own summary at the end
        with self.path.open("a") as file:
            file.write(_line(row))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a last line that a killed process left unfinished is skipped.

    Raises `UserError` for a file that holds something else.
    """
    try:
        return list(_rows(path))
    except FileNotFoundError:
        return []
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not the lines that a run writes"
        raise UserError(
            f"{path} is damaged ({reason}): move it away, then the curves begin at the last checkpoint"
        ) from error


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            row = parse_json(line)
            keys = {"step", "tokens", *(["tokens_per_second"] if "loss" in row else [])}
            if not all(isinstance(row[key], (int, float)) for key in keys):
                raise TypeError(f"no numbers in {line!r}")
            yield row


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


class Progress(TrainerCallback):
    """A tqdm bar on stderr: steps, time left, training and validation loss, tokens per second."""

    def __init__(self, model: str, throughput: Throughput) -> None:
        self.model, self.throughput = model, throughput
        self._bar: tqdm | None = None
        self._shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        # A log file gets a line now and then instead of ten a second.
        interval = 0.1 if sys.stderr.isatty() else 20.0
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.model,
            unit="step",
            dynamic_ncols=True,
            mininterval=interval,
            file=sys.stderr,
        )

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kwargs: Any
    ) -> None:
        logs = logs or {}
        if "loss" in logs:
            self._shown["loss"] = f"{logs['loss']:.3f}"
            self._shown["tokens/s"] = f"{self.throughput.last:,.0f}"
        if "eval_loss" in logs:
            self._shown["val"] = f"{logs['eval_loss']:.3f}"
        if self._bar is not None:
            self._bar.set_postfix(self._shown, refresh=False)

    def close(self) -> None:
        """Leave the bar as it stands; also after an error, when the Trainer calls nothing more."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class Interrupt(TrainerCallback):
    """Ctrl-C ends the run after the step at hand, with a checkpoint; a second one ends it at once.

    Used as a context manager around training; ``requested`` tells afterwards. Of several processes one is enough.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # only there may handlers be set
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if join().is_main_process:
            print("\nstopping after this step (Ctrl-C again: at once)", file=sys.stderr, flush=True)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.requested = any_of(self.requested)
        if self.requested:
            control.should_save = control.should_training_stop = True

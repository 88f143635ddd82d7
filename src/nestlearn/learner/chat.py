"""A conversation in the terminal with a model that learns from it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from nestlearn.data.text_files import find_path, read_documents
from nestlearn.errors import UserError, nearest
from nestlearn.learner.learner import ContinualLearner
from nestlearn.learner.report import ReadReport
from nestlearn.learner.stream import opening
from nestlearn.train.generate import check_options
from nestlearn.train.positions import longest

HELP = """\
/read FILE      learn from a text, .jsonl or .parquet file
/save NAME      keep what was learned under a name
/rollback REF   go back to a snapshot: a name, an id, head, head~2
/log            list the snapshots
/forget         go back to the start of this chat; /forget all: to the pretrained weights
/quit           save and leave, as Ctrl-D does; Ctrl-C stops an answer
anything else is said to the model, which learns from each exchange"""
USER, MODEL = "\nUser: ", "\nAssistant: "  # for a tokenizer without a chat template

Message = dict[str, str]


class Chat:
    """Reads lines from standard input until it ends. Every exchange is learned as a text of its own.

    Args:
        learner: with a store; if it saves automatically, then after every exchange too.
        max_new_tokens, temperature, top_p, seed: of an answer, as in `ContinualLearner.generate`.
        as_json: print a JSON object a line, an answer when it is whole.

    Raises:
        UserError: one of these is out of its range.
    """

    def __init__(
        self,
        learner: ContinualLearner,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.7,
        top_p: float = 0.95,
        seed: int | None = None,
        as_json: bool = False,
    ) -> None:
        check_options(max_new_tokens, temperature, top_p, seed)
        self.learner, self.seed, self.as_json = learner, seed, as_json
        self.branch = self._branch()
        self.max_new_tokens, self.temperature, self.top_p = max_new_tokens, temperature, top_p
        self.start = learner.state
        self.messages: list[Message] = []
        self.commands: dict[str, Callable[[str], None]] = {
            "/read": self.read,
            "/save": self.save,
            "/rollback": self.rollback,
            "/log": self.log,
            "/forget": self.forget,
            "/help": lambda _: self._print(HELP, help=HELP),
        }

    def run(self) -> None:
        """Until /quit or the end of the input; what was learned is saved then.

        Raises `UserError` if standard input is closed or no UTF-8.
        """
        if sys.stdin is None:
            raise UserError("a chat reads standard input, which is closed: run it in a terminal, or pipe lines in")
        human = sys.stdin.isatty() and not self.as_json
        if human:
            print("It learns from what you say; /help lists the commands.")
        while True:
            try:
                line = input("> " if human else "").strip()
            except EOFError:
                break
            except UnicodeDecodeError:
                raise UserError("standard input is not UTF-8 text: convert it; all before is kept") from None
            except KeyboardInterrupt:
                self._print("\n/quit or Ctrl-D leaves", help="/quit or Ctrl-D leaves")
                continue
            if line == "/quit":
                break
            try:
                self.take(line)
            except UserError as error:
                self._print(f"error: {error}", error=str(error))
            except KeyboardInterrupt:  # while it learns; what came before the window at hand is learned
                self._print("\ninterrupted", error="interrupted")
            self._tell_branch()
        if self.learner.unsaved:
            snapshot = self.learner.save()
            self._print(f"saved as {snapshot.short}", saved=snapshot.id)
            self._tell_branch()

    def _tell_branch(self) -> None:
        """Say once that another process has moved the branch, so that this chat is on one of its own."""
        before, self.branch = self.branch, self._branch()
        if self.branch != before:
            remedy = f"this chat is kept on {self.branch}, go on with --branch {self.branch}"
            self._print(f"another process has moved {before}: {remedy}", branch=self.branch)

    def _branch(self) -> str | None:
        return None if self.learner.store is None else self.learner.store.branch

    def take(self, line: str) -> None:
        """One line of the user. Raises `UserError` for a command that is unknown or fails."""
        if not line:
            return
        if not line.startswith("/"):
            self.say(line)
            return
        command, _, rest = line.partition(" ")
        if command not in self.commands:
            raise UserError(f"unknown command {command}; {nearest(command, [*self.commands, '/quit'])}")
        self.commands[command](rest.strip())

    def say(self, text: str) -> None:
        """Answer, piece by piece as it comes, and learn from the exchange."""
        said = [*self.messages, {"role": "user", "content": text}]
        answer = self._answer(said)
        self._print("", answer=answer)
        exchange = [said[-1], {"role": "assistant", "content": answer}]
        document = self._render(exchange)
        self.messages = [*said, exchange[1]]
        self._tell("this exchange", self.learner.read(document))

    def read(self, name: str) -> None:
        if not name:
            raise UserError("/read needs a file: /read manual.txt")
        path: Path = find_path(name, "file")
        report = self.learner.read(read_documents(path), source=str(path.resolve()), again=True)
        self._tell(name, report)

    def save(self, name: str) -> None:
        if not name:
            raise UserError("/save needs a name: /save before-manual")
        self._print(f"saved as {name}", saved=self.learner.save(name).id)

    def rollback(self, ref: str) -> None:
        if not ref:
            raise UserError("/rollback needs a snapshot: /log lists them")
        found = self.learner.rollback(ref)
        self.messages = []
        self._print(f"back at {found.name or found.short}; this conversation begins anew", back=found.id)

    def log(self, _: str) -> None:
        lines = []
        for snapshot in self.learner.log():
            created, tokens = snapshot.created[:16].replace("T", " "), f"{snapshot.meta['tokens']:,} tokens"
            lines.append(f"{snapshot.short}  {created}  {tokens:>16}  {snapshot.name or ''}".rstrip())
        ids = [snapshot.id for snapshot in self.learner.log()]
        self._print("\n".join(lines) or "no snapshot yet: /save NAME makes one", log=ids)

    def forget(self, what: str) -> None:
        if what not in ("", "all"):
            raise UserError(f"/forget {what}: give nothing, for this chat, or all")
        if what:
            self.learner.forget()
        else:
            self.learner.state = self.start
        self.learner.checkpoint()  # else what was forgotten is back after a kill
        self.messages = []
        place = "the pretrained weights" if what else "the start of this chat"
        self._print(f"back at {place}", back=place)

    def _answer(self, messages: list[Message]) -> str:
        prompt, room = self._prompt(messages)
        pieces: list[str] = []
        shown = 0

        def show(piece: str) -> None:
            nonlocal shown
            pieces.append(piece)
            text = "".join(pieces).partition(USER)[0]
            if not self.as_json:
                print(text[shown:], end="", flush=True)
            shown = len(text)
            if len(text) < len("".join(pieces)):  # without a template a model goes on with the user's part
                raise _Enough

        with suppress(_Enough, KeyboardInterrupt):
            self.learner.generate(
                prompt,
                max_new_tokens=room,
                temperature=self.temperature,
                top_p=self.top_p,
                seed=self.seed,
                on_text=show,
            )
        return "".join(pieces).partition(USER)[0]

    def _prompt(self, messages: list[Message]) -> tuple[str, int]:
        """The conversation as far as it fits, and the most tokens of an answer; what does not fit has been learned.

        Raises `UserError` if the last message alone leaves no room.
        """
        size = longest(self.learner.model.base) or sys.maxsize
        while True:
            prompt = self._render(messages, answer=True)
            tokens = len(self.learner.tokenizer(prompt, verbose=False)["input_ids"])
            if tokens + self.max_new_tokens <= size:
                return prompt, self.max_new_tokens
            if len(messages) == 1:
                break
            messages = messages[2:]
        if tokens >= size:
            raise UserError(f"this message takes {tokens:,} tokens, the model sees {size:,}: give /read a file of it")
        return prompt, size - tokens

    def _render(self, messages: list[Message], answer: bool = False) -> str:
        """Messages as text; with ``answer`` up to where the model's answer begins."""
        tokenizer = self.learner.tokenizer
        if tokenizer.chat_template is None:
            parts = [(USER if m["role"] == "user" else MODEL) + m["content"] for m in messages]
            return "".join([*parts, MODEL if answer else "\n"])
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer)
        assert isinstance(text, str)
        begin = tokenizer.bos_token
        # The tokenizer puts its first token before every text; a template that does so too would give it twice.
        if begin and opening(tokenizer) == [tokenizer.bos_token_id]:
            text = text.removeprefix(begin)
        return text

    def _tell(self, what: str, report: ReadReport) -> None:
        updated = [str(level.number) for level in report.levels if level.updates]
        loss = "" if report.loss is None else f", loss {report.loss:.3f}"
        levels = f"level {', '.join(updated)} updated" if updated else "no level updated"
        lines = [f"[learned from {what}: {report.tokens} tokens{loss}, {levels}]"]
        lines += [f"[not learned: {skipped.tokens} tokens, as {skipped.reason}]" for skipped in report.skipped]
        if report.stopped:
            lines.append(f"[stopped: {report.stopped}]")
        self._print("\n".join(lines), learned=what, report=report.to_json())

    def _print(self, text: str, **values: Any) -> None:
        print(json.dumps(values) if self.as_json else text, flush=True)


class _Enough(Exception):
    """The answer has ended."""

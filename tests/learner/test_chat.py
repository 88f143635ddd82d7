"""A conversation: what the model is shown, what stops an answer, and what is learned of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from nestlearn.convert import ContinualModel
from nestlearn.errors import UserError
from nestlearn.learner import ContinualLearner
from nestlearn.learner.chat import Chat

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


class Scripted(ContinualLearner):
    """Answers with given pieces, and notes what it was shown and what it read."""

    def script(self, *pieces: str) -> None:
        self.pieces, self.shown, self.given = pieces, [], []

    def generate(self, prompt: str, *, on_text: Callable[[str], None] | None = None, **_: object) -> str:
        self.shown.append(prompt)
        for piece in self.pieces:
            if piece == "^C":
                raise KeyboardInterrupt
            assert on_text is not None
            on_text(piece)
        return "".join(self.pieces)

    def read(self, text, **options):  # type: ignore[no-untyped-def]
        self.given.append(text)
        return super().read(text, **options)


def test_the_model_is_shown_the_conversation_and_learns_each_exchange(
    model: ContinualModel, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    learner = Scripted(model, tokenizer)
    learner.script("fine", ", thanks\nUs", "er: and", " what comes next")
    chat = Chat(learner, max_new_tokens=20)
    chat.take("how are you")
    chat.take("good")
    first = "\nUser: how are you\nAssistant: fine, thanks"
    assert learner.shown == ["\nUser: how are you\nAssistant: ", f"{first}\nUser: good\nAssistant: "]
    assert learner.given == [first + "\n", "\nUser: good\nAssistant: fine, thanks\n"]
    assert capsys.readouterr().out.startswith("fine, thanks")


def test_ctrl_c_stops_the_answer_and_what_was_said_is_learned(
    model: ContinualModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    learner = Scripted(model, tokenizer)
    learner.script("so far", "^C")
    Chat(learner).take("tell")
    assert learner.given == ["\nUser: tell\nAssistant: so far\n"]


def test_a_template_is_used_and_its_first_token_is_not_given_twice(
    model: ContinualModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = TEMPLATE
    learner = Scripted(model, plain)
    learner.script("b")
    Chat(learner).take("a")
    assert learner.shown == ["<|endoftext|>[user]a[assistant]"]
    opening = copy.deepcopy(plain)
    opening.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    learner = Scripted(model, opening)
    learner.script("b")
    Chat(learner).take("a")
    assert (learner.shown, learner.given) == (["[user]a[assistant]"], ["[user]a[assistant]b"])


def test_a_long_conversation_loses_its_oldest_exchanges(
    model: ContinualModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    learner = Scripted(model, tokenizer)
    learner.script("yes")
    chat = Chat(learner, max_new_tokens=100)
    for number in range(9):
        chat.take(f"question number {number}")
    assert all(len(prompt) + 100 <= 256 for prompt in learner.shown)
    assert "number 8" in learner.shown[-1]
    assert "number 7" in learner.shown[-1]
    assert "number 0" not in learner.shown[-1]


def test_an_exchange_is_kept_at_once_and_what_was_forgotten_does_not_come_back(
    model: ContinualModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """As if the process had been killed after each line: what is opened next is what the chat stood at."""
    learner = Scripted(model, tokenizer, tmp_path, autosave=1000)
    learner.script("fine")
    chat = Chat(learner)
    chat.take("how are you")
    assert ContinualLearner(model, tokenizer, tmp_path).state.clock == learner.state.clock > 0
    begun = learner.state.clock
    later = Chat(learner)
    later.take("good")
    assert learner.state.clock > begun
    for what, clock in (("/forget", begun), ("/forget all", 0)):
        later.take(what)
        assert ContinualLearner(model, tokenizer, tmp_path).state.clock == learner.state.clock == clock


def test_an_answer_gets_the_room_that_is_left_and_a_message_that_leaves_none_is_refused(
    model: ContinualModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    learner = ContinualLearner(model, tokenizer)
    chat = Chat(learner, max_new_tokens=10_000, temperature=0)
    prompt = len("\nUser: hello\nAssistant: ")
    answer, room = chat._prompt([{"role": "user", "content": "hello"}])
    assert (len(answer), room) == (prompt, 256 - prompt)
    with pytest.raises(UserError, match=r"this message takes 319 tokens, the model sees 256: give /read a file of it"):
        chat.take("x" * 300)
    assert (learner.state.read, chat.messages) == (0, [])

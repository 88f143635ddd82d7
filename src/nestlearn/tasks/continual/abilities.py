"""What a language model can do: continue passages, answer questions, chat as it used to, predict prose.

Every measure comes as an accuracy in percent or as nats per token, of fixed items.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nestlearn.tasks.continual.choice import Trie, label_scores, lay_out
from nestlearn.tasks.continual.late import LateModel
from nestlearn.tasks.continual.streams import Question

FILES = [
    "lambada/lambada_openai.jsonl",
    "commonsense/arc_easy.jsonl",
    "wikitext2/test.txt",
    "nq_open/NQ-open.dev.jsonl",
]
BATCH = 8  # texts in a forward pass
REPLY = 40  # tokens of a chat reply, at most


class Abilities:
    """Old abilities, on the first items of each data set; made of the model before it learns.

    Args:
        late: the model, read through `LateModel`.
        tokenizer: of the model.
        data: the folder of real data.
        items: of LAMBADA and of questions.
        chats: replies.
        windows: of WikiText-2, of 512 tokens each.
    """

    def __init__(
        self, late: LateModel, tokenizer: PreTrainedTokenizerBase, data: str, items: int, chats: int, windows: int
    ) -> None:
        self.late, self.tokenizer = late, tokenizer
        folder = Path(data)
        self.passages = [(row["context"], " " + row["continuation"].strip()) for row in _rows(folder / FILES[0], items)]
        self.questions = [
            Question(row["query"] + "\nAnswer:", tuple(f" {c}" for c in row["choices"]), row["gold"])
            for row in _rows(folder / FILES[1], items)
        ]
        prose = detokenise((folder / FILES[2]).read_text(encoding="utf-8")[: 3000 * windows])
        ids = tokenizer(prose, add_special_tokens=False)["input_ids"]
        self.prose = [ids[begin : begin + 512] for begin in range(0, len(ids) - 511, 512)][:windows]
        self.chats = [self._chat(row["question"]) for row in _rows(folder / FILES[3], chats)]

    def measure(self) -> dict[str, float]:
        """``lambada`` and ``questions`` (percent right), ``lambada_nats``, ``questions_nats`` (of the right choice
        among the choices), ``chat_nats`` (per token of the replies that the model gave before it learned) and
        ``prose_nats`` (per token of WikiText-2).
        """
        tokens = [(self._ids(before), self._ids(word)) for before, word in self.passages]
        losses, right = continuations(self.late, tokens, self.tokenizer.eos_token_id)
        answered = answer(self.late, self.tokenizer, self.questions)
        prose, _ = continuations(self.late, [(ids[:1], ids[1:]) for ids in self.prose], self.tokenizer.eos_token_id)
        chat, _ = continuations(self.late, self.chats, self.tokenizer.eos_token_id)
        return {
            "lambada": 100 * right.double().mean().item(),
            "lambada_nats": (losses.sum() / sum(len(word) for _, word in tokens)).item(),
            "questions": answered["right"],
            "questions_nats": answered["nats"],
            "chat_nats": (chat.sum() / sum(len(reply) for _, reply in self.chats)).item(),
            "prose_nats": (prose.sum() / sum(len(ids) - 1 for ids in self.prose)).item(),
        }

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def _chat(self, question: str) -> tuple[list[int], list[int]]:
        """A prompt in the chat format, and the model's own likeliest reply with the token that ends it."""
        said = [{"role": "user", "content": question.strip().capitalize() + "?"}]
        prompt: Any = self.tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        ids = self._ids(prompt)
        model: Any = self.late.model
        given = torch.tensor([ids], device=model.device)
        options: dict[str, Any] = dict(max_new_tokens=REPLY, do_sample=False, pad_token_id=self.tokenizer.eos_token_id)
        made = model.generate(given, attention_mask=torch.ones_like(given), **options)
        return ids, made[0, len(ids) :].tolist()


@torch.no_grad()
def continuations(late: LateModel, texts: Sequence[tuple[list[int], list[int]]], pad: int) -> tuple[Tensor, Tensor]:
    """Of ``(before, after)`` tokens, the nats of each ``after`` as a whole, and whether every token of it is the
    likeliest, (N,) each.
    """
    order = sorted(range(len(texts)), key=lambda i: sum(map(len, texts[i])))
    losses, right = torch.zeros(len(texts)), torch.zeros(len(texts), dtype=torch.bool)
    for begin in range(0, len(order), BATCH):
        group = order[begin : begin + BATCH]
        hidden = late.hidden(lay_out([texts[i][0] + texts[i][1][:-1] for i in group], None, pad))
        for i, states in zip(group, hidden, strict=True):
            after = torch.tensor(texts[i][1], device=hidden.device)
            logp = late.logits(states[-len(after) :]).float().log_softmax(-1)
            losses[i] = -logp.gather(1, after[:, None]).sum()
            right[i] = bool((logp.argmax(-1) == after).all())
    return losses, right


@torch.no_grad()
def answer(late: LateModel, tokenizer: PreTrainedTokenizerBase, questions: Sequence[Question]) -> dict[str, float]:
    """``right`` in percent, and ``nats`` of the right choice among the choices, which are scored per token."""
    losses, right = [], []
    for question in questions:
        prompt, *choices = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (question.prompt, *question.choices)
        )
        trie = Trie.of(choices)
        sheet = lay_out([prompt], trie, tokenizer.eos_token_id)
        scores = label_scores(late.hidden(sheet), late.logits, sheet, trie)[0].cpu()
        scores = scores / torch.tensor([len(choice) for choice in choices])
        losses.append(-scores.log_softmax(0)[question.gold].item())
        right.append(int(scores.argmax()) == question.gold)
    return {"right": 100 * sum(right) / len(right), "nats": sum(losses) / len(losses)}


def detokenise(text: str) -> str:
    """WikiText's raw tokens as prose.

    >>> detokenise(" It was , he said , 3 @,@ 000 @-@ fold ( or more ) . ")
    'It was, he said, 3,000-fold (or more).'
    """
    text = re.sub(r" @([,.-])@ ", r"\1", text)
    text = re.sub(r" ([,.;:!?)\]])", r"\1", text)
    text = re.sub(r"([(\[]) ", r"\1", text)
    text = re.sub(r'" ([^"\n]*) "', r'"\1"', text)
    text = text.replace(" 's", "'s").replace(" n't", "n't")
    return re.sub(r" *\n *", "\n", text).strip()


def _rows(path: Path, count: int) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]

"""Learners of classes that arrive in groups: by gradients, by demonstrations in context, by Gaussians of classes.

Each reads the examples of a group once it arrives, and later scores every label for a text; the examples of earlier
groups may only be used again by those that keep them as their memory (ICL, InCA).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestlearn.tasks.continual.choice import Sheet, Trie, label_scores, lay_out
from nestlearn.tasks.continual.classes import Example
from nestlearn.tasks.continual.late import LateModel
from nestlearn.tasks.continual.rules import Rule

SCORED_AT_ONCE = 8  # prompts in one forward pass
SHRINKAGE = 0.1  # of the shared covariance toward its mean variance


class ClassLearner(Protocol):
    """A method of class-incremental learning."""

    parameters: int  # that gradients change

    def learn(self, examples: Sequence[Example]) -> None:
        """Learn a group. Its texts are not given again."""
        ...

    def scores(self, examples: Sequence[Example], labels: int) -> Tensor:
        """Of each example (its label is not looked at), a number for each of the first ``labels`` labels."""
        ...


class Reader:
    """Texts and labels as tokens of a model; the labels end with the line."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, labels: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.endings = [f" {label}\n" for label in labels]
        self.labels = [self.tokens(ending) for ending in self.endings]
        self.trie = Trie.of(self.labels)
        self.pad = tokenizer.eos_token_id

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def solved(self, example: Example) -> str:
        """The example with its label, as it stands in a context."""
        return example.prompt + self.endings[example.label] + "\n"

    def behind(self, shown: Sequence[Example], example: Example) -> str:
        """The prompt of an example behind others that are solved."""
        return "".join(map(self.solved, shown)) + example.prompt


class Embedder:
    """Texts as vectors: the mean over the tokens of the model's last hidden states."""

    def __init__(self, model: PreTrainedModel, reader: Reader) -> None:
        self.late, self.reader = LateModel(model, 0), reader
        self.known: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, examples: Sequence[Example]) -> Tensor:
        """(N, D) float64."""
        new = {e.text: self.reader.tokens(e.text) for e in examples if e.text not in self.known}
        alike = sorted(new, key=lambda text: len(new[text]))
        for begin in range(0, len(alike), SCORED_AT_ONCE):
            texts = alike[begin : begin + SCORED_AT_ONCE]
            hidden = self.late.hidden(lay_out([new[text] for text in texts], None, self.reader.pad))
            for text, states in zip(texts, hidden, strict=True):
                self.known[text] = states[-len(new[text]) :].double().mean(0).cpu()
        return torch.stack([self.known[example.text] for example in examples])


class Memory:
    """Examples that are kept, and those of them that are most like a text, by cosine of centred embeddings."""

    def __init__(self, embed: Embedder) -> None:
        self.embed = embed
        self.kept: list[Example] = []

    def add(self, examples: Sequence[Example]) -> None:
        self.kept += examples

    def like(self, examples: Sequence[Example], count: int) -> list[list[Example]]:
        """For each example so many kept ones, the most alike last; the example itself is never among them."""
        vectors = self.embed(self.kept)
        centre = vectors.mean(0)
        near = _unit(self.embed(examples) - centre) @ _unit(vectors - centre).T
        same = torch.tensor([[kept.text == example.text for kept in self.kept] for example in examples])
        order = near.masked_fill(same, -torch.inf).argsort(dim=1, stable=True)
        found = []
        for row, places in enumerate(order.tolist()):
            able = [place for place in places if not same[row, place]]
            found.append([self.kept[place] for place in able[-count:]])
        return found


class GradientLearner:
    """Learns ``text -> label`` from the loss of the label's tokens.

    A group is dealt into batches once, and read ``epochs`` times, the batches in another order each time. The loss is
    that of the language model, over its whole vocabulary: no method is told which labels there are.

    Args:
        late, rule, reader: the model, how it learns, and what it reads.
        epochs: how often a group is read.
        batch: examples of a step.
        generator: deals and orders the batches.
    """

    def __init__(
        self,
        late: LateModel,
        rule: Rule,
        reader: Reader,
        *,
        epochs: int,
        batch: int,
        generator: np.random.Generator,
    ) -> None:
        self.late, self.rule, self.reader = late, rule, reader
        self.epochs, self.batch, self.generator = epochs, batch, generator
        self.parameters = rule.parameters
        self.sheets: dict[Any, Sheet] = {}

    def learn(self, examples: Sequence[Example]) -> None:
        order = self.generator.permutation(len(examples))
        parts = np.array_split(order, -(-len(order) // self.batch))
        losses = [self._loss([examples[i] for i in part]) for part in parts]
        for _ in range(self.epochs):
            for place in self.generator.permutation(len(losses)):
                loss, scored, tokens = losses[place]
                with self.rule.reading():
                    value = loss()
                if not torch.isfinite(value):
                    raise FloatingPointError("the loss is not finite")
                self.rule.step(value, scored, tokens)
        with self.rule.reading():
            self.rule.end_group([self._loss([example])[0] for example in examples])

    @torch.no_grad()
    def scores(self, examples: Sequence[Example], labels: int) -> Tensor:
        found = []
        for begin in range(0, len(examples), SCORED_AT_ONCE):
            texts = tuple(example.prompt for example in examples[begin : begin + SCORED_AT_ONCE])
            sheet = self.sheets.get(texts)
            if sheet is None:
                sheet = lay_out([self.reader.tokens(t) for t in texts], self.reader.trie, self.reader.pad)
                self.sheets[texts] = sheet
            with self.rule.reading():
                hidden = self.late.hidden(sheet)
                found.append(label_scores(hidden, self.late.logits, sheet, self.reader.trie)[:, :labels].cpu())
        return torch.cat(found)

    def _loss(self, examples: Sequence[Example]) -> tuple[Callable[[], Tensor], int, int]:
        """The summed loss of the labels of some examples, how many tokens are predicted, and how many are read."""
        prompts = [self.reader.tokens(example.prompt) for example in examples]
        labels = [self.reader.labels[example.label] for example in examples]
        rows = [prompt + label[:-1] for prompt, label in zip(prompts, labels, strict=True)]
        sheet = lay_out(rows, None, self.reader.pad)
        longest = sheet.ids.shape[1]
        where = torch.tensor(
            [[row, longest - len(label) + n] for row, label in enumerate(labels) for n in range(len(label))]
        )
        targets = torch.tensor([token for label in labels for token in label])

        def loss() -> Tensor:
            hidden = self.late.hidden(sheet)
            logits = self.late.logits(hidden[where[:, 0], where[:, 1]])
            return torch.nn.functional.cross_entropy(logits.float(), targets.to(logits.device), reduction="sum")

        return loss, len(targets), sum(map(len, rows))


class _InContext:
    """What ICL and InCA share: a frozen model, examples that are kept, and labels scored behind demonstrations."""

    parameters = 0

    def __init__(self, model: PreTrainedModel, reader: Reader, embed: Embedder) -> None:
        self.reader, self.embed = reader, embed
        self.late = LateModel(model, 0)
        self.memory = Memory(embed)

    def learn(self, examples: Sequence[Example]) -> None:
        self.memory.add(examples)

    @torch.no_grad()
    def _label_scores(self, shown: Sequence[Example], example: Example, labels: int) -> Tensor:
        sheet = lay_out([self.reader.tokens(self.reader.behind(shown, example))], self.reader.trie, self.reader.pad)
        scores = label_scores(self.late.hidden(sheet), self.late.logits, sheet, self.reader.trie)
        return scores[0, :labels].cpu()


class Demonstrations(_InContext):
    """ICL: the kept examples that are most like the text stand before it.

    Args:
        shown: how many.
    """

    def __init__(self, model: PreTrainedModel, reader: Reader, embed: Embedder, *, shown: int) -> None:
        super().__init__(model, reader, embed)
        self.shown = shown

    def scores(self, examples: Sequence[Example], labels: int) -> Tensor:
        shown = self.memory.like(examples, self.shown)
        return torch.stack([self._label_scores(s, e, labels) for s, e in zip(shown, examples, strict=True)])


class ClassGaussians(_InContext):
    """InCA (Momeni et al. 2024): Gaussians of classes name candidates, the model chooses among them in context.

    The embeddings of a class have its mean and one covariance that all share; each group updates them and needs no
    earlier one. The classes nearest to a text by Mahalanobis distance are the candidates; an example of each, the one
    most like the text, stands before it, the nearest class last. In place of the summaries of classes that the authors
    have a large model write, kept examples describe a class, as many as ICL keeps.

    Args:
        candidates: how many classes the model chooses from. With 1 the Gaussians alone decide.
        shown: examples of each candidate.
    """

    def __init__(self, model: PreTrainedModel, reader: Reader, embed: Embedder, *, candidates: int, shown: int) -> None:
        super().__init__(model, reader, embed)
        self.candidates, self.shown = candidates, shown
        self.means: dict[int, Tensor] = {}
        self.scatter: Tensor | float = 0.0
        self.count = 0

    def learn(self, examples: Sequence[Example]) -> None:
        super().learn(examples)
        vectors, labels = self.embed(examples), torch.tensor([example.label for example in examples])
        for label in labels.unique().tolist():
            own = vectors[labels == label]
            self.means[label] = own.mean(0)
            self.scatter = self.scatter + (own - own.mean(0)).T @ (own - own.mean(0))
            self.count += len(own)

    def distances(self, examples: Sequence[Example], labels: int) -> Tensor:
        """Squared Mahalanobis distances to the means of the first ``labels`` classes, (N, labels)."""
        means = torch.stack([self.means[label] for label in range(labels)])
        covariance = torch.as_tensor(self.scatter) / self.count
        size = len(covariance)
        mean_variance = covariance.diagonal().mean()
        covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * mean_variance * torch.eye(size, dtype=covariance.dtype)
        white = torch.linalg.cholesky(covariance)
        x, m = (torch.linalg.solve_triangular(white, v.T, upper=False).T for v in (self.embed(examples), means))
        return torch.cdist(x, m).square()

    def scores(self, examples: Sequence[Example], labels: int) -> Tensor:
        distances = self.distances(examples, labels)
        if self.candidates == 1:
            return -distances
        order = distances.argsort(dim=1, stable=True)[:, : self.candidates]
        kept = self.memory.kept
        vectors, memory = _unit(self.embed(examples)), _unit(self.embed(kept))
        rows = []
        for row, (example, nearest) in enumerate(zip(examples, order.tolist(), strict=True)):
            near = (memory @ vectors[row]).tolist()
            shown = []
            for label in reversed(nearest):
                own = [place for place, one in enumerate(kept) if one.label == label]
                shown += [kept[place] for place in sorted(own, key=near.__getitem__)[-self.shown :]]
            scores = torch.full((labels,), -torch.inf)
            scores[nearest] = self._label_scores(shown, example, labels)[nearest]
            rows.append(scores)
        return torch.stack(rows)


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x, dim=-1)

"""Which of many labels a language model finds likeliest after a prompt, exactly, in one forward pass.

What the labels begin with forms a trie of tokens. The prompt is followed by the nodes of the trie, each at the position
that it would have in its label, and each sees the prompt and its own ancestors alone. So the log-probability of every
label is read off one pass, and what labels have in common is computed once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Trie:
    """All proper beginnings of labels, the nodes; the last token of a label is only predicted, never read.

    Args:
        tokens: of each node, (N,) int64; a parent stands before its children.
        depth: of each node, (N,) int64, 0 for a first token.
        parent: of each node, (N,) int64, -1 for a first token.
        paths: of each label its tokens, each with the place that predicts it: 0 for the end of the prompt, n + 1 for
            node n.
    """

    tokens: Tensor
    depth: Tensor
    parent: Tensor
    paths: list[list[tuple[int, int]]]

    @classmethod
    def of(cls, labels: Sequence[Sequence[int]]) -> Trie:
        """From the tokens of every label, which should end in a token of their own kind, as a line end: otherwise a
        label that begins another one is always the likelier. Raises ``ValueError`` for an empty label.

        >>> trie = Trie.of([[5, 6, 1], [5, 7, 1], [5, 1]]); trie.tokens.tolist(), trie.parent.tolist()
        ([5, 6, 7], [-1, 0, 0])
        >>> trie.paths[1]
        [(0, 5), (1, 7), (3, 1)]
        """
        nodes: dict[tuple[int, ...], int] = {}
        paths = []
        for label in labels:
            if not label:
                raise ValueError("a label without a token")
            places = [0]
            for n in range(1, len(label)):
                places.append(nodes.setdefault(tuple(label[:n]), len(nodes)) + 1)
            paths.append(list(zip(places, label, strict=True)))
        rows = [[node[-1], len(node) - 1, nodes.get(node[:-1], -1)] for node in nodes]
        tokens, depth, parent = torch.tensor(rows, dtype=torch.long).reshape(-1, 3).unbind(1)
        return cls(tokens, depth, parent, paths)

    def ancestors(self) -> Tensor:
        """Which nodes (columns) a node (row) sees: its ancestors and itself, (N, N) bool."""
        seen = torch.eye(len(self.tokens), dtype=torch.bool)
        for node, parent in enumerate(self.parent.tolist()):
            if parent >= 0:
                seen[node] |= seen[parent]
        return seen


@dataclasses.dataclass(frozen=True)
class Sheet:
    """Prompts with the trie behind each, as one batch for a forward pass.

    Args:
        ids: (B, T) int64, the prompts left-padded, then the nodes.
        positions: (B, T) int64.
        mask: (B, 1, T, T) bool, true where a query (row) sees a key (column).
        prompt: tokens of the longest prompt; the nodes begin there.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    prompt: int


def lay_out(prompts: Sequence[Sequence[int]], trie: Trie | None, pad: int) -> Sheet:
    """One batch of prompts, each of one token at least; without a trie they stand alone, left-padded."""
    nodes = 0 if trie is None else len(trie.tokens)
    longest = max(map(len, prompts))
    size = longest + nodes
    ids = torch.full((len(prompts), size), pad)
    positions = torch.zeros(len(prompts), size, dtype=torch.long)
    mask = torch.zeros(len(prompts), 1, size, size, dtype=torch.bool)
    tree = None if trie is None else trie.ancestors()
    for row, prompt in enumerate(prompts):
        begin = longest - len(prompt)
        ids[row, begin:longest] = torch.tensor(prompt)
        positions[row, begin:longest] = torch.arange(len(prompt))
        mask[row, 0, begin:longest, begin:longest] = torch.ones(len(prompt), len(prompt)).tril().bool()
        mask[row, 0, :begin, :begin] = torch.eye(begin).bool()  # a pad sees itself, or its softmax is empty
        if trie is not None and tree is not None:
            ids[row, longest:] = trie.tokens
            positions[row, longest:] = len(prompt) + trie.depth
            mask[row, 0, longest:, begin:longest] = True
            mask[row, 0, longest:, longest:] = tree
    return Sheet(ids, positions, mask, longest)


def label_scores(hidden: Tensor, head: Callable[[Tensor], Tensor], sheet: Sheet, trie: Trie) -> Tensor:
    """Log-probability of every label, (B, labels), from the last hidden states of a sheet, (B, T, D).

    ``head`` maps hidden states to logits.
    """
    logp = head(hidden[:, sheet.prompt - 1 :]).float().log_softmax(-1)  # (B, 1 + N, vocabulary)
    scores = []
    for path in trie.paths:
        places, tokens = torch.tensor(path, device=hidden.device).unbind(1)
        scores.append(logp[:, places, tokens].sum(-1))
    return torch.stack(scores, dim=1)

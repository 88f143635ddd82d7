"""The likeliest label in one pass: the same log-probabilities as one pass for every label."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestlearn.tasks.continual.choice import Trie, label_scores, lay_out
from nestlearn.tasks.continual.late import LateModel
from nestlearn.tasks.continual.pretrained import load_model

END = 10
TOKENS = st.lists(st.integers(11, 14), min_size=1, max_size=4)


def plainly(model: torch.nn.Module, prompt: list[int], label: list[int]) -> float:
    """The log-probability of a label, in a pass of its own without padding."""
    logits = model(torch.tensor([prompt + label])).logits[0].log_softmax(-1)
    return sum(logits[len(prompt) - 1 + n, token].item() for n, token in enumerate(label))


@settings(max_examples=25, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 200), min_size=1, max_size=9), min_size=1, max_size=3),
    labels=st.lists(TOKENS, min_size=1, max_size=6, unique_by=tuple),
    first=st.integers(0, 4),
)
def test_scores_are_those_of_a_pass_for_each_label(
    prompts: list[list[int]], labels: list[list[int]], first: int
) -> None:
    model, _ = load_model("tiny")
    ended = [[*label, END] for label in labels]
    trie = Trie.of(ended)
    sheet = lay_out(prompts, trie, 0)
    late = LateModel(model, min(first, 3))
    with torch.no_grad():
        for _ in range(2):  # the second time from what was kept
            scores = label_scores(late.hidden(sheet), late.logits, sheet, trie)
        expected = torch.tensor([[plainly(model, prompt, label) for label in ended] for prompt in prompts])
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-4)


def test_what_labels_share_is_read_once_and_their_last_tokens_never() -> None:
    trie = Trie.of([[5, 6, END], [5, 6, 7, END], [8, END]])
    assert trie.tokens.tolist() == [5, 6, 7, 8]
    assert trie.ancestors().int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]
    assert Trie.of([[3], [4]]).tokens.shape == (0,)
    with pytest.raises(ValueError, match="a label without a token"):
        Trie.of([[1], []])


def test_gradients_above_the_cut_are_those_of_the_whole_model() -> None:
    ids = [[1, 2, 3, 4], [5, 6]]
    found = []
    for first in (0, 2):
        model, _ = load_model("tiny")
        late = LateModel(model, first)
        late.logits(late.hidden(lay_out(ids, None, 0)))[:, -1].logsumexp(-1).sum().backward()
        found.append(model.model.layers[2].mlp.up_proj.weight.grad)
        assert (model.model.layers[1].mlp.up_proj.weight.grad is None) == bool(first)
    torch.testing.assert_close(*found, atol=1e-6, rtol=1e-5)

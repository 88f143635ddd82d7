"""Learners that keep examples: in context, and by Gaussians of classes."""

import torch

from nestlearn.tasks.continual.classes import Example
from nestlearn.tasks.continual.learners import ClassGaussians, Demonstrations, Embedder, Memory, Reader
from nestlearn.tasks.continual.pretrained import load_model
from tests.tasks.continual.small_data import EXAMPLES, LABELS


class Told(Embedder):
    """Embeddings that are given."""

    def __init__(self, vectors: dict[str, list[float]]) -> None:
        self.vectors = vectors

    def __call__(self, examples: object) -> torch.Tensor:
        return torch.tensor([self.vectors[e.text] for e in examples], dtype=torch.float64)  # type: ignore[attr-defined]


def test_gaussians_use_the_shared_covariance() -> None:
    model, tokenizer = load_model("tiny")
    # Wide along the first axis, narrow along the second: "far" is nearer to class 1 by the plain distance alone.
    points = {"a": [-4.0, 0.1], "b": [4.0, -0.1], "c": [0.0, 3.0], "d": [8.0, 3.2], "far": [6.0, 0.2]}
    embed = Told({name: [float(x) for x in point] for name, point in points.items()})
    inca = ClassGaussians(model, Reader(tokenizer, LABELS), embed, candidates=1, shown=1)
    inca.learn([Example("a", 0), Example("b", 0)])
    inca.learn([Example("c", 1), Example("d", 1)])
    assert inca.scores([Example("far", 1)], 2).argmax(1).tolist() == [0]
    assert inca.scores([Example("far", 1)], 2).isfinite().all()


def test_in_context_only_candidates_and_seen_labels_can_win() -> None:
    model, tokenizer = load_model("tiny")
    reader = Reader(tokenizer, [*LABELS, "green"])
    embed = Embedder(model, reader)
    inca = ClassGaussians(model, reader, embed, candidates=2, shown=1)
    icl = Demonstrations(model, reader, embed, shown=3)
    seen = [*EXAMPLES, Example("a leaf", 2), Example("the grass", 2)]
    for one in (inca, icl):
        one.learn(seen[:4])
        one.learn(seen[4:])
    scores = inca.scores(seen, 3)
    assert (scores.isfinite().sum(1) == 2).all()
    assert icl.scores(seen, 3).isfinite().all()
    assert icl.scores(seen[:1], 2).shape == (1, 2)


def test_memory_gives_what_is_most_alike_last_and_never_the_example_itself() -> None:
    points = {"a": [0.0, 1.0], "b": [1.0, 1.0], "c": [5.0, 0.0], "like c": [6.0, 0.1]}
    memory = Memory(Told(points))
    kept = [Example(name, n) for n, name in enumerate("abc")]
    memory.add(kept)
    assert [e.text for e in memory.like([Example("like c", 0)], 2)[0]][-1] == "c"
    own = memory.like(kept, 3)
    assert [sorted(e.text for e in shown) for shown in own] == [["b", "c"], ["a", "c"], ["a", "b"]]

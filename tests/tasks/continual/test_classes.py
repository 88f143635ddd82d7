"""Classes in groups."""

from collections import Counter

import pytest

from nestlearn.tasks.continual.classes import FILES, load_groups


@pytest.mark.parametrize("name", list(FILES))
def test_groups_have_their_classes_and_no_example_twice(data: str, name: str) -> None:
    problem = load_groups(data, name, classes=5, groups=2, train=4, validation=2, test=3, seed=1)
    assert problem.groups == [[0, 1, 2], [3, 4]]
    assert sorted(problem.labels) == ["pay bill", "play music", "set alarm", "translate", "weather"]
    for group, train, validation, test in zip(
        problem.groups, problem.train, problem.validation, problem.test, strict=True
    ):
        assert Counter(e.label for e in train) == dict.fromkeys(group, 4)
        assert Counter(e.label for e in validation) == dict.fromkeys(group, 2)
        assert Counter(e.label for e in test) == dict.fromkeys(group, 3)
        for e in (*train, *validation, *test):  # the class stands in our texts
            assert "".join(problem.labels[e.label].split()) in e.text.lower().replace("_", "")
        texts = [e.text for e in (*train, *validation)]
        assert len(set(texts)) == len(texts)
    assert problem == load_groups(data, name, 5, 2, 4, 2, 3, seed=1)
    assert problem != load_groups(data, name, 5, 2, 4, 2, 3, seed=2)


def test_the_prompt_ends_where_the_label_begins(data: str) -> None:
    example = load_groups(data, "clinc150", 2, 1, 1, 1, 1, seed=0).train[0][0]
    assert example.prompt == f"Text: {example.text}\nLabel:"

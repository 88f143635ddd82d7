"""What a learner of groups of classes keeps, from its accuracies after every group.

``accuracies[i][j]`` is the accuracy on the test examples of group j after group i was learned, for j <= i. It is taken
among the classes of all groups up to i, so that it falls even for a perfect memory as the choice grows.
"""

from __future__ import annotations

from collections.abc import Sequence

Accuracies = Sequence[Sequence[float]]


def average_accuracy(accuracies: Accuracies) -> list[float]:
    """After every group, the mean over the groups seen so far (Lopez-Paz and Ranzato 2017, ACC).

    >>> average_accuracy([[1.0], [0.5, 1.0]])
    [1.0, 0.75]
    """
    return [sum(row) / len(row) for row in accuracies]


def forgetting(accuracies: Accuracies) -> list[float]:
    """After every group, how far the earlier groups have fallen from their best, on average (Chaudhry et al. 2018).

    The best is over all earlier moments, so a group that is now better than ever counts negative. 0 after the first.

    >>> forgetting([[1.0], [0.5, 1.0], [0.75, 0.5, 1.0]])
    [0.0, 0.5, 0.375]
    """
    found = [0.0]
    for now in range(1, len(accuracies)):
        falls = [max(accuracies[i][j] for i in range(j, now)) - accuracies[now][j] for j in range(now)]
        found.append(sum(falls) / now)
    return found


def backward_transfer(accuracies: Accuracies) -> list[float]:
    """After every group, how the earlier groups have changed since each was learned (Lopez-Paz and Ranzato 2017, BWT).

    Negative where later groups have hurt. 0 after the first.

    >>> backward_transfer([[1.0], [0.5, 1.0], [0.75, 0.5, 1.0]])
    [0.0, -0.5, -0.375]
    """
    found = [0.0]
    for now in range(1, len(accuracies)):
        found.append(sum(accuracies[now][j] - accuracies[j][j] for j in range(now)) / now)
    return found

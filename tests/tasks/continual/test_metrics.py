"""Accuracy, forgetting and backward transfer of matrices that were worked out by hand."""

import pytest

from nestlearn.tasks.continual.metrics import average_accuracy, backward_transfer, forgetting

FALLS = [[0.9], [0.5, 0.8], [0.6, 0.4, 1.0]]


def test_of_a_learner_that_forgets() -> None:
    assert average_accuracy(FALLS) == pytest.approx([0.9, 0.65, 2 / 3])
    assert forgetting(FALLS) == pytest.approx([0, 0.4, (0.3 + 0.4) / 2])
    assert backward_transfer(FALLS) == pytest.approx([0, -0.4, (-0.3 - 0.4) / 2])


def test_forgetting_is_from_the_best_moment_and_transfer_from_the_first() -> None:
    rises_then_falls = [[0.2], [0.8, 0.5], [0.5, 0.5, 0.5]]
    assert forgetting(rises_then_falls)[-1] == pytest.approx((0.3 + 0.0) / 2)
    assert backward_transfer(rises_then_falls)[-1] == pytest.approx((0.3 + 0.0) / 2)


def test_what_becomes_better_than_ever_counts_negative() -> None:
    assert forgetting([[0.5], [0.75, 1.0]]) == [0.0, -0.25]
    assert backward_transfer([[0.5], [0.75, 1.0]]) == [0.0, 0.25]

# SPDX-License-Identifier: Apache-2.0
"""The rules that decide: errors by hand, and each word in the case that it is for."""

import math

import numpy as np
import pytest

from lab.rules import Figure, Table, Word, all_above, all_within, figure


def test_an_error_is_of_items_and_of_seeds():
  values = np.array([[0.0, 1.0, 1.0], [1.0, 1.0, 1.0]])  # [seeds, items]
  of_items = np.var([0.5, 1.0, 1.0], ddof=1) / 3
  of_seeds = np.var([2 / 3, 1.0], ddof=1) / 2
  found = figure(values)
  assert found.mean == pytest.approx(5 / 6)
  assert found.error == pytest.approx(math.sqrt(of_items + of_seeds))


def test_a_difference_is_paired_by_item():
  hard = np.array([[0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0]])
  table = Table({"a": {"m": hard + 0.1}, "b": {"m": hard}})
  found = table.difference("a", "b", "m")
  assert found.mean == pytest.approx(0.1)
  assert found.error == pytest.approx(0.0, abs=1e-9)
  assert table.mean("b", "m").error > 0.1


@pytest.mark.parametrize(
  ("means", "word"),
  [
    ((0.3, 0.3), Word.REPRODUCED),
    ((0.3, 0.1), Word.UNDECIDED),  # the second is within two standard errors
    ((0.3, -0.3), Word.NOT),
    ((-0.1, -0.1), Word.UNDECIDED),
  ],
)
def test_differences_must_exceed_two_standard_errors(means, word):
  assert all_above({str(i): Figure(m, 0.1) for i, m in enumerate(means)}).word is word


@pytest.mark.parametrize(
  ("mean", "error", "word"),
  [
    (0.01, 0.01, Word.REPRODUCED),
    (0.01, 0.10, Word.UNDECIDED),  # no difference was seen, and none is excluded
    (0.20, 0.01, Word.NOT),
    (-0.20, 0.01, Word.NOT),
  ],
)
def test_equivalence_needs_small_errors_not_only_small_differences(mean, error, word):
  assert all_within({"x": Figure(mean, error)}, 0.05).word is word

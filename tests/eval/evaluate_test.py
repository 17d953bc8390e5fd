# SPDX-License-Identifier: Apache-2.0
"""Means over trials and paired differences, against figures made by hand."""

import math

import numpy as np
import pytest

from mm1_jax.eval.evaluate import difference, mean_of_trials, over_trials
from mm1_jax.eval.metrics.statistics import Estimate
from mm1_jax.eval.task import EvalError, Scores
from tests.helpers.evaluations import make_result, make_task, said


def scored(per_item, ids=None, **job):
  answered = said(["x"] * len(per_item))
  if ids is not None:
    by_id = {a.item.id: a for a in said(["x"] * 10)}
    answered = [by_id[str(id)] for id in ids]
  scores = Scores({"m": Estimate(float(np.nanmean(per_item)), 0.1, 3)}, np.array(per_item, float))
  return make_result(answered, scores=scores, **job)


class TestTrials:
  def test_one_is_itself(self):
    assert mean_of_trials([Estimate(0.5, 0.25, 9)]) == Estimate(0.5, 0.25, 9)

  def test_the_error_has_the_items_part_and_the_draws(self):
    # Mean of the variances 0.09 and 0.25: 0.17. Variance of means 1 and 2: 0.5, over 2 trials.
    found = mean_of_trials([Estimate(1.0, 0.3, 9), Estimate(2.0, 0.5, 9)])
    assert found.mean == 1.5
    assert found.n == 9
    assert found.standard_error == pytest.approx(math.sqrt(0.17 + 0.25))

  def test_equal_trials_do_not_shrink_the_error_of_the_items(self):
    assert mean_of_trials([Estimate(1.0, 0.3, 9)] * 100).standard_error == pytest.approx(0.3)

  def test_each_metric(self):
    results = [scored([0, 1, 1], shots=4, trial=0), scored([1, 1, 1], shots=4, trial=1)]
    found = over_trials(results)
    assert list(found) == ["m"]
    assert found["m"].mean == pytest.approx(5 / 6)

  def test_a_benchmark_without_scores_has_none(self):
    task = make_task(score=None)
    assert over_trials([make_result(said(["x"]), task=task)]) == {}


class TestDifference:
  def test_by_hand(self):
    # 1 - 0, 0 - 1, 1 - 0, 1 - 1: mean 1/4; deviations 3/4, -5/4, 3/4, -1/4.
    found = difference(scored([1, 0, 1, 1]), scored([0, 1, 0, 1]))
    assert found.mean == 0.25
    assert found.standard_error == pytest.approx(math.sqrt((9 + 25 + 9 + 1) / 16 / 3 / 4))
    assert found.n == 4

  def test_items_are_paired_by_id_not_by_place(self):
    found = difference(scored([5, 7, 2], ids=[1, 2, 3]), scored([2, 7, 9], ids=[3, 2, 4]))
    assert found == Estimate(0.0, 0.0, 2)

  def test_items_without_a_value_are_left_out(self):
    found = difference(scored([1, math.nan, 1]), scored([0, 1, math.nan]))
    assert (found.mean, found.n) == (1.0, 1)

  def test_nothing_in_common(self):
    with pytest.raises(EvalError, match="no items in common"):
      difference(scored([1], ids=[1]), scored([1], ids=[2]))

  def test_a_benchmark_that_is_not_scored_here(self):
    task = make_task(score=None)
    with pytest.raises(EvalError, match="have no scores here"):
      difference(scored([1]), make_result(said(["x"]), task=task))

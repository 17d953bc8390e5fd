# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest

from mm1_jax.eval.metrics import statistics


def test_an_estimate_is_the_mean_and_its_error():
  assert statistics.estimate([0, 1, 1, 0]) == (0.5, pytest.approx(math.sqrt(1 / 3) / 2), 4)


def test_one_item_has_no_error():
  mean, error, n = statistics.estimate([0.25])
  assert (mean, n) == (0.25, 1)
  assert math.isnan(error)


@pytest.mark.parametrize(
  "values", [[], [1.0, float("nan")], [float("inf")], [[1.0, 2.0]]], ids=repr
)
def test_what_is_no_row_of_numbers_is_refused(values):
  with pytest.raises(ValueError, match="values"):
    statistics.estimate(values)


def test_a_paired_difference_is_surer_than_two_means():
  draw = np.random.default_rng(0)
  hard = draw.random(500)
  a, b = hard + 0.02, hard + draw.normal(scale=0.01, size=500)
  difference = statistics.paired(a, b)
  assert difference.mean == pytest.approx(0.02, abs=0.002)
  assert difference.standard_error < 0.1 * statistics.estimate(a).standard_error
  with pytest.raises(ValueError, match="2 beside 3"):
    statistics.paired([1, 2], [1, 2, 3])


def test_a_bootstrap_of_a_mean_is_its_standard_error():
  values = np.random.default_rng(1).random(400)
  error = statistics.bootstrap(lambda items: float(np.mean(values[items])), 400, seed=3)
  assert error == pytest.approx(statistics.estimate(values).standard_error, rel=0.1)
  assert error == statistics.bootstrap(lambda items: float(np.mean(values[items])), 400, seed=3)
  with pytest.raises(ValueError, match="0 items"):
    statistics.bootstrap(lambda items: 0.0, 0, seed=3)

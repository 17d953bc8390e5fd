# SPDX-License-Identifier: Apache-2.0
"""Means over items and how sure they are."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
  """The mean of a metric over items.

  Attributes:
    mean: in the metric's own unit.
    standard_error: of the mean, in the same unit; NaN for one item.
    n: items.
  """

  mean: float
  standard_error: float
  n: int


def estimate(values: Sequence[float] | np.ndarray) -> Estimate:
  """Returns the mean of items' values, and its standard error: sample deviation / sqrt(n).

  Raises:
    ValueError: there are no values, or one is not a finite number.
  """
  values = _finite(values)
  n = len(values)
  error = float(np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else float("nan")
  return Estimate(float(np.mean(values)), error, n)


def paired(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> Estimate:
  """Returns the mean of a - b over the same items, and its standard error.

  Items that both find easy or both find hard cancel: the error is smaller than that of two
  separate means.

  Raises:
    ValueError: a and b differ in length, are empty, or hold what is not a finite number.
  """
  if len(a) != len(b):
    raise ValueError(f"a paired difference needs the same items: {len(a)} beside {len(b)} values")
  return estimate(_finite(a) - _finite(b))


def bootstrap(
  statistic: Callable[[np.ndarray], float], n: int, seed: int, resamples: int = 1000
) -> float:
  """Returns the standard error of a statistic that is no mean of items, such as F1.

  Args:
    statistic: from indices of items, int[n] with repetitions, to the number.
    n: items.
    seed: of the resampling.
    resamples: how many draws of n items the deviation is taken of.

  Raises:
    ValueError: there are no items, or fewer than 2 resamples.
  """
  if n < 1 or resamples < 2:
    raise ValueError(f"a bootstrap needs items and 2 resamples: {n} items, {resamples} resamples")
  random = np.random.default_rng(seed)
  draws = [statistic(random.integers(n, size=n)) for _ in range(resamples)]
  return float(np.std(draws, ddof=1))


def _finite(values: Sequence[float] | np.ndarray) -> np.ndarray:
  values = np.asarray(values, np.float64)
  if values.ndim != 1 or not len(values):
    raise ValueError(f"an estimate needs a row of values; their shape is {values.shape}")
  wrong = np.flatnonzero(~np.isfinite(values))
  if len(wrong):
    raise ValueError(
      f"{len(wrong)} of {len(values)} values are no finite numbers, first {wrong[0]}"
    )
  return values

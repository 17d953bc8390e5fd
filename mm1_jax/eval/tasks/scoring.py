# SPDX-License-Identifier: Apache-2.0
"""Scores that are means over items, in total and by group."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mm1_jax.eval.metrics.limits import LONGEST, is_cut
from mm1_jax.eval.metrics.statistics import Estimate, estimate
from mm1_jax.eval.metrics.strings import exact_match
from mm1_jax.eval.task import EvalError, Item, Likelihood, Reply, Score, Scores

# The value of an item's answer.
Value = Callable[[Item, str], float]


def mean_score(metrics: Mapping[str, Value], group: str = "") -> Score:
  """Returns the score that is the mean of each metric over items.

  Args:
    metrics: by name, from 0 to 1; the first is the headline, and from 0.5 an answer is right.
    group: detail of items by which the headline is told too, as `metric/group`; "" for none.
  """

  def score(items: Sequence[Item], replies: Sequence[Reply]) -> Scores:
    answers = texts(items, replies)
    columns = {
      name: np.array([value(item, answer) for item, answer in zip(items, answers, strict=True)])
      for name, value in metrics.items()
    }
    values = {name: estimate(column) for name, column in columns.items()}
    headline, first = next(iter(columns.items()))
    values |= by_group(headline, first, items, group)
    return Scores(values, first, first >= 0.5, seen(answers))

  return score


def is_accepted(item: Item, answer: str) -> float:
  """Returns 1.0 if an answer is one of the item's, case and punctuation ignored; else 0.0."""
  return exact_match(answer.strip(), item.answers)


def texts(items: Sequence[Item], replies: Sequence[Reply]) -> list[str]:
  """Returns the answers to items whose truth is known.

  Raises:
    EvalError: there are no items, or one has no published answer.
  """
  check_answered(items)
  answers = [reply for reply in replies if isinstance(reply, str)]
  if len(answers) != len(items):
    raise EvalError(f"{len(items)} items have {len(answers)} generated answers.")
  return answers


def likelihoods(items: Sequence[Item], replies: Sequence[Reply]) -> list[tuple[Likelihood, ...]]:
  """Returns the options' likelihoods of items whose truth is known.

  Raises:
    EvalError: as `texts`.
  """
  check_answered(items)
  found = [reply for reply in replies if not isinstance(reply, str)]
  if len(found) != len(items):
    raise EvalError(f"{len(items)} items have {len(found)} sets of likelihoods.")
  return found


def check_answered(items: Sequence[Item]) -> None:
  if not items:
    raise EvalError("there is no item to score.")
  if without := [item.id for item in items if not item.answers]:
    raise EvalError(
      f"{len(without)} of {len(items)} items have no published answer, first '{without[0]}': this "
      f"split is scored by the benchmark's server. Write the answer file, or choose another split."
    )


def by_group(
  name: str, values: np.ndarray, items: Sequence[Item], group: str
) -> dict[str, Estimate]:
  """Returns the mean of each group, by the groups' names."""
  if not group:
    return {}
  of = np.array([str(item.details.get(group, "")) for item in items])
  groups = sorted(set(of) - {""})
  return {f"{name}/{one}": estimate(values[of == one]) for one in groups}


def seen(answers: Sequence[str]) -> dict[str, int]:
  """Returns how many answers are empty, and how many a metric read only the beginning of."""
  return {
    "empty": sum(not answer.strip() for answer in answers),
    f"longer than {LONGEST:,} characters": sum(map(is_cut, answers)),
  }

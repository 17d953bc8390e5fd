# SPDX-License-Identifier: Apache-2.0
"""Examples that are left out of their rows, and how many of them end a run."""

import collections
from collections.abc import Mapping

from mm1_jax.data.sources import DataError

MIN_EXAMPLES_TO_JUDGE = 100  # a share of dropped examples means little below this many


class Drops:
  """Counts dropped examples, and ends a run that drops too many.

  Attributes:
    reasons: those of this process, by reason.
  """

  def __init__(self, limit: float):
    """Allows `limit`, a fraction of the examples (`data.max_drop_fraction`)."""
    self.reasons: collections.Counter = collections.Counter()
    self._limit = limit
    self._num_examples = self._num_dropped = 0

  def note(self, reasons: Mapping[str, int]) -> None:
    """Takes what this process dropped of a batch, by reason."""
    self.reasons.update(reasons)

  def count(self, num_examples: int, num_dropped: int) -> None:
    """Takes how many examples are in a batch, and how many were dropped for it.

    The counts may be of one process or of all; `reasons`, in the message, are of this process.

    Raises:
      DataError: more were dropped so far than the limit allows.
    """
    self._num_examples += num_examples + num_dropped
    self._num_dropped += num_dropped
    enough = self._num_examples >= MIN_EXAMPLES_TO_JUDGE
    if enough and self._num_dropped > self._limit * self._num_examples:
      raise DataError(
        f"{self._num_dropped} of {self._num_examples} examples were dropped "
        f"({dict(self.reasons)}), more than data.max_drop_fraction {self._limit} allows. Repair "
        "the source, or raise it."
      )

# SPDX-License-Identifier: Apache-2.0
"""How many dropped examples are too many."""

import pytest

from mm1_jax.data.drops import MIN_EXAMPLES_TO_JUDGE, Drops
from mm1_jax.data.sources import DataError


def test_over_the_limit_is_an_error_that_has_the_reasons():
  drops = Drops(0.1)
  drops.count(num_examples=90, num_dropped=10)  # as many as are allowed
  drops.note({"captions: unreadable image": 2})
  with pytest.raises(DataError, match=r"13 of 103 examples were dropped \(\{'captions: unread"):
    drops.count(num_examples=0, num_dropped=3)


def test_few_examples_are_no_share():
  drops = Drops(0.0)
  drops.count(num_examples=0, num_dropped=MIN_EXAMPLES_TO_JUDGE - 1)
  with pytest.raises(DataError):
    drops.count(num_examples=1, num_dropped=0)

# SPDX-License-Identifier: Apache-2.0
"""Counts of a step by process, and their sums over all processes."""

from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from mm1_jax import distributed
from mm1_jax.data.pipeline import BatchStats


class Tally(NamedTuple):
  """Counts of a step by one process; summed over those that have rows of their own."""

  processes: float  # 1 of each
  stopping: float  # processes that were asked to stop
  padded_fraction: float
  empty_slot_fraction: float
  num_positions: float
  num_images: float
  num_examples: float
  num_dropped: float

  @classmethod
  def of(cls, stats: BatchStats, stopping: bool) -> "Tally":
    counts = stats.num_positions, stats.num_images, stats.num_examples, sum(stats.drops.values())
    return cls(1, stopping, stats.padded_fraction, stats.empty_slot_fraction, *counts)

  def over_processes(self, mesh: Mesh) -> jax.Array | np.ndarray:
    """Returns the sum over processes, which a step that is dispatched later does not delay."""
    return distributed.sum_over_processes(np.array(self, np.float32), mesh)

  @classmethod
  def read(cls, sums: jax.Array | np.ndarray) -> "Tally":
    """Returns the tally of an array, once it is there."""
    return cls(*np.asarray(sums).tolist())

# SPDX-License-Identifier: Apache-2.0
"""What a run is evaluated on while it is trained."""

import dataclasses

from mm1_jax.config.group import Group
from mm1_jax.ranges import Count, CountOrZero, Seed


@dataclasses.dataclass(frozen=True)
class EvalTaskConfig(Group, where="eval_tasks.{name}: "):
  """A small, fixed part of a benchmark."""

  made_by_name = True

  name: str  # in metrics and overrides
  task: str = ""  # of `python -m mm1_jax.eval --list`, or a file; "" takes `name`
  data: str = "."  # folder of the benchmark's official files
  every: Count = 1000  # steps; the last one is evaluated, too
  limit: Count = 64  # items, drawn by `seed`, the same each time
  shots: CountOrZero = 0  # demonstrations in front of each
  form: str | None = None  # protocol; None takes the first that fits the model
  split: str | None = None  # None takes the task's default
  seed: Seed = 0  # of the draw of items and demonstrations

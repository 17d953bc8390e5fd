# SPDX-License-Identifier: Apache-2.0
"""Held-out loss: every example of each evaluation source, once."""

import contextlib
from collections.abc import Callable
from typing import Protocol

from clu import metrics as clu_metrics
from jax.sharding import Mesh

from mm1_jax.config import RunConfig
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import device_batch
from mm1_jax.train.feed import held_out_batches
from mm1_jax.train.step import eval_step_on

HELD_OUT = "held out"  # name of the held-out loss among evaluations


class Evaluator(Protocol):
  """What else is measured of a run's params; `mm1_jax.eval.in_training` has those of benchmarks."""

  name: str
  every: int  # steps

  def __call__(self, params: MM1, mesh: Mesh, check: Callable[[], None]) -> dict[str, float]:
    """Returns scalars by name; called by all processes alike.

    `check` is called between batches; what it raises ends the evaluation.
    """
    ...


class HeldOutLoss:
  """The held-out loss of a run, as an evaluator."""

  name = HELD_OUT

  def __init__(self, run: RunConfig):
    self.every, self._run = run.train.eval_every, run

  def __call__(self, params: MM1, mesh: Mesh, check: Callable[[], None]) -> dict[str, float]:
    return held_out_loss(params, self._run, mesh, check)


def held_out_loss(
  model: MM1, run: RunConfig, mesh: Mesh, check: Callable[[], None] = lambda: None
) -> dict[str, float]:
  """Returns nats per target as `eval/loss/{source}`, over `run.train.eval_batches` batches each.

  `check` is called after each batch, and may raise.
  """
  losses, evaluate = {}, eval_step_on(mesh)
  for source in run.data.eval_sources:
    total = clu_metrics.Average.empty()
    with contextlib.closing(held_out_batches(run, source, mesh)) as batches:
      for batch in batches:
        total = total.merge(evaluate(model, device_batch(batch, mesh), run=run))
        check()
    losses[f"eval/loss/{source.name}"] = float(total.compute())
  return losses

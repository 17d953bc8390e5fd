# SPDX-License-Identifier: Apache-2.0
"""Held-out loss: every example of each evaluation source, once."""

from typing import Protocol

from clu import metrics as clu_metrics
from jax.sharding import Mesh

from mm1_jax.config import RunConfig
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import device_batch
from mm1_jax.train.feed import held_out_batches
from mm1_jax.train.step import eval_step_on


class Evaluator(Protocol):
  """What else is measured of a run's params; `mm1_jax.eval.in_training` has those of benchmarks."""

  every: int  # steps

  def __call__(self, params: MM1, mesh: Mesh) -> dict[str, float]:
    """Returns scalars by name; called by all processes alike."""
    ...


def held_out_loss(model: MM1, run: RunConfig, mesh: Mesh) -> dict[str, float]:
  """Returns nats per target as `eval/loss/{source}`, over `run.train.eval_batches` batches each."""
  losses, evaluate = {}, eval_step_on(mesh)
  for source in run.data.eval_sources:
    total = clu_metrics.Average.empty()
    for batch in held_out_batches(run, source, mesh):
      total = total.merge(evaluate(model, device_batch(batch, mesh), run=run))
    losses[f"eval/loss/{source.name}"] = float(total.compute())
  return losses

# SPDX-License-Identifier: Apache-2.0
"""Held-out loss: every example of each evaluation source, once."""

import jax
from clu import metrics as clu_metrics
from jax.sharding import Mesh

from mm1_jax.config import RunConfig
from mm1_jax.data.pipeline import make_eval_batches
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import device_batch
from mm1_jax.train.step import eval_step


def held_out_loss(model: MM1, run: RunConfig, mesh: Mesh) -> dict[str, float]:
  """Returns nats per target as `eval/loss/{source}`, over `run.train.eval_batches` batches each."""
  losses = {}
  for source in run.data.eval_sources:
    total = clu_metrics.Average.empty()
    for batch in make_eval_batches(
      source,
      run.data,
      image_size=run.model.vision.image_size,
      tokens_per_image=run.model.connector.num_tokens,
      image_token_id=run.model.image_token_id,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
      limit=run.train.eval_batches,
    ):
      total = total.merge(eval_step(model, device_batch(batch, mesh), run=run))
    losses[f"eval/loss/{source.name}"] = float(total.compute())
  return losses

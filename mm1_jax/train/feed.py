# SPDX-License-Identifier: Apache-2.0
"""A run's batches on this process: the data pipeline, told what the model expects."""

from collections.abc import Iterator
from typing import Any

from jax.sharding import Mesh

from mm1_jax.batch import Batch
from mm1_jax.config import RunConfig, SourceConfig
from mm1_jax.data.pipeline import Pipeline, make_eval_batches, make_pipeline
from mm1_jax.distributed import process_rows


def training_batches(run: RunConfig, state: dict[str, Any] | None, mesh: Mesh) -> Pipeline:
  """Returns the training batches, from the first or from where `state` was taken."""
  return make_pipeline(run.data, state=state, **_expected(run, mesh))


def held_out_batches(run: RunConfig, source: SourceConfig, mesh: Mesh) -> Iterator[Batch]:
  """Yields a held-out source once, up to `run.train.eval_batches` batches."""
  return make_eval_batches(source, run.data, limit=run.train.eval_batches, **_expected(run, mesh))


def _expected(run: RunConfig, mesh: Mesh) -> dict[str, Any]:
  share, num_shares = process_rows(mesh)
  return {
    "image_size": run.model.vision.image_size,
    "tokens_per_image": run.model.connector.num_tokens,
    "image_token_id": run.model.image_token_id,
    "process_index": share,
    "process_count": num_shares,
  }

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
  return make_pipeline(run.data, run.input_spec, state=state, **_share(mesh))


def held_out_batches(run: RunConfig, source: SourceConfig, mesh: Mesh) -> Iterator[Batch]:
  """Yields a held-out source once, up to `run.train.eval_batches` batches."""
  limit = run.train.eval_batches
  return make_eval_batches(source, run.data, run.input_spec, limit=limit, **_share(mesh))


def _share(mesh: Mesh) -> dict[str, int]:
  index, count = process_rows(mesh)
  return {"process_index": index, "process_count": count}

# SPDX-License-Identifier: Apache-2.0
"""Batches that are made by several processes, stopped and begun anew, as hashes of their rows."""

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
from collections.abc import Sequence
from typing import Any, NamedTuple

from mm1_jax.config import DataConfig, InputSpec
from mm1_jax.data.pipeline import make_pipeline


class Leg(NamedTuple):
  """A part of a run without interruption, up to batch `stop`."""

  stop: int
  processes: int = 1
  workers: int = 0  # of each process


def run(data: DataConfig, inputs: InputSpec, legs: Sequence[Leg]) -> list[list[str]]:
  """Returns the hashes of the rows, batch by batch, that the legs make one after another."""
  batches: list[list[str]] = []
  state = None
  for leg in legs:
    config = dataclasses.replace(data, num_workers=leg.workers)
    job = (config, inputs, state, leg.stop - len(batches), leg.processes)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(leg.processes, mp_context=context) as pool:
      slices = list(pool.map(_make, [(*job, index) for index in range(leg.processes)]))
    state = slices[0][1]
    assert all(other == state for _, other in slices), "processes of one run differ in its state"
    for parts in zip(*(hashes for hashes, _ in slices), strict=True):
      batches.append([row for rows in parts for row in rows])
  return batches


def _make(job: tuple) -> tuple[list[list[str]], dict[str, Any]]:
  """Returns the rows' hashes of one process, and the state after them."""
  data, inputs, state, num_batches, process_count, process_index = job
  pipeline = make_pipeline(
    data, inputs, process_index=process_index, process_count=process_count, state=state
  )
  hashes = []
  for _ in range(num_batches):
    rows = zip(*next(pipeline)[0], strict=True)
    hashes.append([hashlib.sha256(b"".join(f.tobytes() for f in row)).hexdigest() for row in rows])
  saved = json.loads(json.dumps(pipeline.state()))  # as a checkpoint has it
  pipeline.close()
  return hashes, saved

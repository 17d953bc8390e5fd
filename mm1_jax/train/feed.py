# SPDX-License-Identifier: Apache-2.0
"""A run's batches on this process: the data pipeline, told what the model expects, in a thread."""

import multiprocessing
import queue
import threading
import time
from collections.abc import Generator
from typing import Any

import jax
from jax.sharding import Mesh

from mm1_jax.batch import Batch
from mm1_jax.config import RunConfig, SourceConfig
from mm1_jax.data.pipeline import (
  BatchStats,
  Pipeline,
  PipelineError,
  WorkerKilled,
  make_eval_batches,
  make_pipeline,
)
from mm1_jax.distributed import process_rows
from mm1_jax.train.stop import Stop, Stopped

LAST_BATCH_SECONDS = 5.0  # that a batch may take after a signal to stop
CLOSE_SECONDS = 5.0
LOOK_SECONDS = 0.5


def training_batches(run: RunConfig, state: dict[str, Any] | None, mesh: Mesh) -> Pipeline:
  """Returns the training batches, from the first or from where `state` was taken."""
  return make_pipeline(run.data, run.input_spec, state=state, **_share(mesh))


def held_out_batches(run: RunConfig, source: SourceConfig, mesh: Mesh) -> Generator[Batch]:
  """Yields a held-out source once, up to `run.train.eval_batches` batches."""
  limit = run.train.eval_batches
  return make_eval_batches(source, run.data, run.input_spec, limit=limit, **_share(mesh))


def _share(mesh: Mesh) -> dict[str, int]:
  index, count = process_rows(mesh)
  return {"process_index": index, "process_count": count}


class Feed:
  """The batches of a pipeline, taken by a thread, so that the main one can stop to wait for one.

  A worker that hangs, or a file system that does not answer, would hold the main thread, and
  a run that is told to stop could save nothing. A batch is taken when it is asked for, not before.

  Attributes:
    state: the pipeline's, with the batch that comes next; also where that one never comes.
    tokenizer: the pipeline's.
  """

  def __init__(self, pipeline: Pipeline, stop: Stop):
    self._pipeline, self._stop = pipeline, stop
    self.state, self.tokenizer = pipeline.state(), pipeline.tokenizer
    self._asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
    self._taken: queue.SimpleQueue[Any] = queue.SimpleQueue()
    self._busy = False
    self._thread = threading.Thread(target=self._take, name="feed", daemon=True)
    self._thread.start()

  def __iter__(self) -> "Feed":
    return self

  def __next__(self) -> tuple[Batch, BatchStats]:
    """Returns the next batch.

    Raises:
      Stopped: the run was told to stop, and the batch does not come. One process of several waits
        nevertheless: all have to take the same steps.
      DataError, WorkerKilled, PipelineError: as the pipeline.
    """
    self._busy = True
    self._asked.put(True)
    alone = jax.process_count() == 1
    while True:
      try:
        made, error, state = self._taken.get(timeout=LOOK_SECONDS)
        break
      except queue.Empty:
        at = self._stop.at
        if alone and at is not None and time.monotonic() - at > LAST_BATCH_SECONDS:
          raise Stopped from None
    self._busy = False
    if isinstance(error, WorkerKilled | PipelineError) and alone and self._stop.at:
      raise Stopped from error  # the signal has reached workers that were only starting
    if error is not None:
      raise error
    self.state = state
    return made

  def close(self) -> None:
    """Ends threads and workers; kills workers that do not come back, and waits for no thread."""
    self._asked.put(False)
    if self._busy:
      _kill_workers()
    closing = threading.Thread(target=self._close, name="closing the data", daemon=True)
    closing.start()
    closing.join(CLOSE_SECONDS)
    if closing.is_alive():
      _kill_workers()
      closing.join(CLOSE_SECONDS)
    if closing.is_alive():
      self._stop.stuck = "the data"

  def _close(self) -> None:
    self._thread.join()
    self._pipeline.close()

  def _take(self) -> None:
    while self._asked.get():
      try:
        self._taken.put((next(self._pipeline), None, self._pipeline.state()))
      except BaseException as e:
        self._taken.put((None, e, None))


def _kill_workers() -> None:
  for worker in multiprocessing.active_children():  # a run has no other children
    worker.kill()

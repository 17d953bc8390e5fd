# SPDX-License-Identifier: Apache-2.0
"""What a run says of its steps: scalars and tables on disk, and the progress line."""

import concurrent.futures
import contextlib
import time
from collections.abc import Iterator

import jax
import numpy as np
from absl import logging
from clu import metrics as clu_metrics

from mm1_jax.batch import Batch
from mm1_jax.config import RunConfig
from mm1_jax.data.pipeline import BatchStats
from mm1_jax.legend import STANDARD_ERROR
from mm1_jax.metrics import (
  MetricWriter,
  StepTimer,
  load_scalars,
  peak_memory_gib,
  progress_line,
)
from mm1_jax.models.flops import model_flops
from mm1_jax.train.step import Metrics
from mm1_jax.train.tally import Tally

MIN_IMAGE_SPREAD = 0.02  # below it a run is warned; 0.1 and more in runs that learn from pictures


class StepLog:
  """Accumulates metrics over `log_every` steps; writes them, and prints the progress line."""

  def __init__(
    self,
    run: RunConfig,
    writer: MetricWriter,
    *,
    launched: float,
    compile_seconds: float = 0.0,
  ):
    """Begins. The first progress line has the time since `launched`, of it `compile_seconds`."""
    self._launched = launched
    self.writer, self.save_seconds = writer, 0.0  # of the newest save, while nothing is trained
    self._start: dict[str, float] | None = {"speed/compile_seconds": compile_seconds}
    self._saves: list[float] = []
    self.timer = StepTimer(flops=lambda num_images: model_flops(run, num_images)["total"])
    self._run = run
    self._sums: Metrics | None = None
    self._load: clu_metrics.Average | None = None  # of experts, since it was last written whole
    self._tallies: list[Tally] = []
    self._data_wait = 0.0
    self._warned = False  # of collapsed image tokens
    self._watcher = concurrent.futures.ThreadPoolExecutor(1, "step_watcher")
    self._finished: concurrent.futures.Future[float] | None = None  # when the newest step was

  @contextlib.contextmanager
  def saving(self, step: int) -> Iterator[None]:
    """Times a save, in the block; the next progress line has the mean of those before it."""
    begin = time.perf_counter()
    yield
    self.save_seconds = time.perf_counter() - begin
    self._saves.append(self.save_seconds)
    self.writer.write_event(step, "saved", seconds=round(self.save_seconds, 3))

  @contextlib.contextmanager
  def evaluating(self, step: int, name: str) -> Iterator[None]:
    """Times an evaluation, in the block, and leaves it out of the speed."""
    begin = time.perf_counter()
    with self.timer.excluded():
      yield
    seconds = round(time.perf_counter() - begin, 3)
    self.writer.write_event(step, "evaluated", name=name, seconds=seconds)
    self.writer.flush()

  def fetch(self, pipeline: Iterator[tuple[Batch, BatchStats]]) -> tuple[Batch, BatchStats]:
    """Returns the next batch, timing how long the devices wait for it."""
    idle_since = time.perf_counter()
    batch, stats = next(pipeline)
    now = time.perf_counter()
    if self._finished is not None:  # while they still run the step before, they do not wait
      idle_since = max(idle_since, self._finished.result()) if self._finished.done() else now
    self._data_wait += now - idle_since
    return batch, stats

  def dispatched(self, metrics: Metrics) -> None:
    """Takes the metrics of a step that was just dispatched, to tell when it has ended."""
    self._finished = self._watcher.submit(_when_ready, metrics)

  def write(self, step: int, scalars: dict[str, float]) -> None:
    """Writes scalars and shows them on a line, with their errors where these are among them."""
    self.writer.write_scalars(step, scalars)
    shown = []
    for name, value in scalars.items():
      if not name.endswith(STANDARD_ERROR):
        error = scalars.get(f"{name}{STANDARD_ERROR}")
        shown.append(f"{name} {value:.4f}" + ("" if error is None else f" ± {error:.4f}"))
    if shown:
      logging.info("step %d | %s", step, " | ".join(shown))

  def write_tables(self, step: int) -> None:
    """Writes the load of each expert, as a mean over the steps since the last time."""
    if self._load is not None:
      self.writer.write_tables(step, {"moe/load": _relative(self._load)})
    self._load = None

  def add(self, step: int, metrics: Metrics, tally: Tally) -> None:
    """Takes the metrics of a step that has ended, on the host."""
    if self._start is not None and "speed/start_seconds" not in self._start:
      self._start["speed/start_seconds"] = time.time() - self._launched
      self.writer.write_event(step, "first step")
    self.timer.tick(
      tokens=int(tally.num_positions), images=int(tally.num_images), data_wait=self._data_wait
    )
    self._data_wait = 0.0
    self._sums = metrics if self._sums is None else _merge(self._sums, metrics)
    if (load := metrics.get("moe/load")) is not None:
      self._load = load if self._load is None else self._load.merge(load)
    self._tallies.append(tally)
    if step % self._run.train.log_every == 0 or step == self._run.train.num_steps:
      self._report(step)

  def _report(self, step: int) -> None:
    assert self._sums is not None
    load = self._sums.pop("moe/load", None)
    scalars = {k: float(m.compute()) for k, m in self._sums.items() if np.sum(m.count) > 0}
    scalars |= load_scalars(_relative(load)) if load is not None else {}
    total = Tally(*np.sum(np.array(self._tallies), axis=0).tolist())
    scalars |= {
      "data/padded_fraction": total.padded_fraction / total.processes,
      "data/empty_slot_fraction": total.empty_slot_fraction / total.processes,
      "data/dropped": total.num_dropped,
      "memory/peak_gib": peak_memory_gib(),
    }
    scalars |= self._start or {}
    if self._saves:
      scalars["speed/save_seconds"] = float(np.mean(self._saves))
    self._start, self._saves = None, []
    self._warn_of_collapse(step, scalars.get("image_spread"))
    rates = self.timer.rates
    self.writer.write_scalars(step, scalars | (rates.scalars() if rates else {}))
    if jax.process_index() == 0:
      print(progress_line(step, self._run.train.num_steps, scalars, rates), flush=True)
    self._sums, self._tallies = None, []

  def _warn_of_collapse(self, step: int, spread: float | None) -> None:
    """Warns once that the decoder gets the same for all pictures: the loss does not show it."""
    if spread is None or spread >= MIN_IMAGE_SPREAD or self._warned:
      return
    self._warned = True
    logging.warning(
      "step %d: image tokens of different pictures differ by %.2g%% of their size (image_spread; "
      "below %.0f%% is too little to learn from). The image encoder or the connector gives the "
      "decoder the same for every picture, and will not recover. Start again with lower "
      "optimizer.vit_learning_rate and optimizer.connector_learning_rate (4e-4 for a small encoder "
      "from random weights), or from a trained encoder: docs/reference/training.md, 'Rates of an "
      "encoder'.",
      step,
      100 * spread,
      100 * MIN_IMAGE_SPREAD,
    )


def _relative(load: clu_metrics.Average) -> np.ndarray:
  """Returns the experts' load, [U, E], 1 where it is even."""
  shares = np.asarray(load.compute(), np.float64)
  return shares * shares.shape[1]


def _when_ready(metrics: Metrics) -> float:
  jax.block_until_ready(metrics)
  return time.perf_counter()


def _merge(sums: Metrics, metrics: Metrics) -> Metrics:
  with np.errstate(invalid="ignore"):  # clu divides 0 by 0 where a source has no position yet
    return {name: sums[name].merge(metric) for name, metric in metrics.items()}

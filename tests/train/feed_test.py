# SPDX-License-Identifier: Apache-2.0
"""Whether the devices are kept fed: batches come while steps run, and waiting is told apart.

The loop is the real one, on the sample. Its steps only keep the device busy, and its batches come
as slowly as a test says.
"""

import functools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clu import metrics as clu_metrics

from mm1_jax.config import RunConfig
from mm1_jax.configs import mm1_debug
from mm1_jax.data.sources import DataError
from mm1_jax.metrics import MetricWriter, read_metrics
from mm1_jax.train import feed, log, loop
from mm1_jax.train.step import train_step
from mm1_jax.train.stop import Stop, Stopped
from tests.helpers import tiny

pytestmark = pytest.mark.compiles

NUM_STEPS = 8
SMALL = {
  "model": {
    "vision": {"image_size": (16, 16), "patch_size": 8, "width": 16, "depth": 1, "mlp_dim": 16},
    "connector": {"kind": "average_pool", "token_grid": (1, 1)},
    "decoder": {"width": 16, "depth": 1, "head_dim": 8, "mlp_dim": 16},
  },
  "data": {"batch_size": 2, "seq_len": 64, "images_per_row": 2, "window_rows": 8},
  "train": {"num_steps": NUM_STEPS, "log_every": NUM_STEPS, "eval_every": 100},
}


class Paced:
  """Batches of a pipeline; one is made ahead, in `seconds`."""

  def __init__(self, pipeline, seconds: float):
    self._pipeline, self._seconds = pipeline, seconds
    self._ready = time.perf_counter() + seconds

  def __next__(self):
    time.sleep(max(0.0, self._ready - time.perf_counter()))
    self._ready = time.perf_counter() + self._seconds
    return next(self._pipeline)

  def __getattr__(self, name: str):
    return getattr(self._pipeline, name)


@jax.jit
def work(step: jax.Array, num: int) -> jax.Array:
  """Returns `step + 1`, after products of matrices that keep a device busy without Python."""
  square = jax.lax.fori_loop(0, num, lambda _, x: jnp.tanh(x @ x), jnp.full((128, 128), 0.01))
  return step + 1 + (square[0, 0] * 0).astype(step.dtype)


def seconds_of_work(num: int) -> float:
  jax.block_until_ready(work(jnp.zeros((), jnp.int32), num))
  begin = time.perf_counter()
  jax.block_until_ready(work(jnp.zeros((), jnp.int32), num))
  return time.perf_counter() - begin


class Watch(NamedTuple):
  """When each step began and ended on the device, and when its batch was put there."""

  begun: list[float]
  ended: list[float]
  put: list[float]

  @property
  def idle(self) -> float:
    """Share of time without a step, from the second one on: the first is not measured either."""
    idle = sum(b - e for b, e in zip(self.begun[2:], self.ended[1:-1], strict=True))
    return idle / (self.ended[-1] - self.ended[1])


def small_run() -> RunConfig:
  config = mm1_debug.get_config("dense").to_dict()
  for part, changes in SMALL.items():
    for key, value in changes.items():
      config[part][key] = {**config[part][key], **value} if isinstance(value, dict) else value
  config["data"]["eval_sources"] = {}
  return RunConfig.from_dict(config)


def forge_steps(monkeypatch, take: Callable) -> None:
  """Has the loop call `take(step)` for the next `step` instead of training."""
  metrics = {}

  def step(state, batch, *, run):
    """What comes back is of the same form as of training."""
    if not metrics:
      _, shapes = jax.eval_shape(functools.partial(train_step, run=run), state, batch)
      metrics.update(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes))
    step = take(state.step)
    skipped = clu_metrics.LastValue.from_model_output(step * 0)
    return state._replace(step=step), {**metrics, "skipped_in_a_row": skipped}

  monkeypatch.setattr(loop, "make_mesh", lambda run: tiny.mesh(1, 1, 1, 1))
  monkeypatch.setattr(loop, "train_step_on", lambda mesh: step)
  monkeypatch.setattr(loop, "start_compiling", lambda *args: None)  # it is no JAX function


@pytest.fixture
def paced_run(tmp_path, monkeypatch):
  """Runs the loop with steps and batches that take so many seconds."""

  def run(step_seconds: float, batch_seconds: float) -> Watch:
    num = int(step_seconds / seconds_of_work(1000) * 1000)
    watch, watcher = Watch([], [], []), ThreadPoolExecutor(1)
    device_batch, training_batches = loop.device_batch, loop.training_batches

    def note_end(step: jax.Array, dispatched: float) -> None:
      jax.block_until_ready(step)
      watch.begun.append(max([dispatched, *watch.ended[-1:]]))
      watch.ended.append(time.perf_counter())

    def take(step: jax.Array) -> jax.Array:
      step = work(step, num)
      watcher.submit(note_end, step, time.perf_counter())
      return step

    def put(*args):
      watch.put.append(time.perf_counter())
      return device_batch(*args)

    forge_steps(monkeypatch, take)
    monkeypatch.setattr(loop, "device_batch", put)
    monkeypatch.setattr(
      loop, "training_batches", lambda *args: Paced(training_batches(*args), batch_seconds)
    )
    loop.train(small_run(), tmp_path)
    watcher.shutdown()
    return watch

  return run


def test_a_batch_is_put_before_the_step_before_it_is_waited_for(tmp_path, monkeypatch):
  events, device_batch, flush = [], loop.device_batch, loop.Results.flush

  def take(step: jax.Array) -> jax.Array:
    events.append(f"step {int(step) + 1}")
    return step + 1

  def put(*args):
    events.append(f"put {sum(event.startswith('put') for event in events) + 1}")
    return device_batch(*args)

  def read(results: loop.Results) -> None:
    if results._pending is not None:
      events.append(f"read {results._pending[0]}")
    flush(results)

  forge_steps(monkeypatch, take)
  monkeypatch.setattr(loop, "device_batch", put)
  monkeypatch.setattr(loop.Results, "flush", read)
  loop.train(small_run(), tmp_path)
  expected = ["put 1", "step 1"]
  for n in range(2, NUM_STEPS + 1):
    expected += [f"put {n}", f"step {n}", f"read {n - 1}"]
  assert events == [*expected, f"read {NUM_STEPS}"]


@pytest.mark.parametrize(
  ("ended", "waited"),
  [
    (None, 0.0),  # the step still runs
    (5.0, 3.0),  # it ended before the batch was asked for
    (11.0, 2.0),  # while it was waited for
  ],
)
def test_devices_wait_from_the_end_of_a_step(ended, waited, tmp_path, monkeypatch):
  """The batch is asked for at 10 s, and is there at 13 s."""
  step_log = log.StepLog(small_run(), MetricWriter(tmp_path), launched=0.0)
  finished: Future[float] = Future()
  if ended is not None:
    finished.set_result(ended)
  step_log._finished = finished
  clock = iter([10.0, 13.0])
  monkeypatch.setattr(log.time, "perf_counter", lambda: next(clock))
  step_log.fetch(iter([(None, None)]))
  monkeypatch.undo()
  assert step_log._data_wait == waited


@pytest.mark.slow
def test_a_batch_is_on_its_way_while_the_step_before_runs(paced_run):
  watch = paced_run(step_seconds=0.2, batch_seconds=0.02)
  assert len(watch.ended) == len(watch.put) == NUM_STEPS
  early = [end - put for end, put in zip(watch.ended[1:-1], watch.put[2:], strict=True)]
  steps = np.subtract(watch.ended[2:], watch.begun[2:])  # on a busy machine not what was asked for
  print([round(seconds, 3) for seconds in early], np.round(steps, 3))
  assert np.median(early) > np.median(steps) / 2
  assert watch.idle < 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
  ("step_seconds", "batch_seconds", "least", "most"),
  [
    (0.2, 0.02, 0, 0.1),
    (0.3, 0.4, 0, 0.5),  # the host waits all the time, the device only for the last 0.1 s of it
    (0.1, 0.3, 0.2, 0.9),
  ],
)
def test_share_of_time_that_the_devices_wait(
  paced_run, tmp_path, step_seconds: float, batch_seconds: float, least: float, most: float
):
  watch = paced_run(step_seconds, batch_seconds)
  waited = read_metrics(tmp_path)["speed/data_wait"][NUM_STEPS]
  print(f"{waited:.3f} of {watch.idle:.3f}")
  assert waited == pytest.approx(watch.idle, abs=0.2)
  assert least <= waited <= most


# --- waiting for a batch


class Still:
  """A pipeline of numbers, that stands still at the third one."""

  def __init__(self):
    self.tokenizer, self.batch, self.moves, self.closed = None, 0, threading.Event(), False

  def state(self) -> dict[str, int]:
    return {"batch": self.batch}

  def __next__(self):
    if self.batch == 2:
      self.moves.wait(60)
    if self.batch == 3:
      raise DataError("no more")
    self.batch += 1
    return self.batch

  def close(self) -> None:
    self.closed = True


@pytest.fixture
def still(monkeypatch):
  monkeypatch.setattr(feed, "LAST_BATCH_SECONDS", 0.3)
  monkeypatch.setattr(feed, "LOOK_SECONDS", 0.05)
  monkeypatch.setattr(feed, "CLOSE_SECONDS", 0.3)
  return Still()


def test_a_batch_that_does_not_come_is_given_up_after_a_signal(still):
  """The state is then still that before it, whenever it comes after all."""
  stop = Stop()
  batches = feed.Feed(still, stop)
  assert [next(batches), next(batches), batches.state] == [1, 2, {"batch": 2}]
  stop.requested, stop.at = "SIGTERM", time.monotonic()
  with pytest.raises(Stopped):
    next(batches)
  assert time.monotonic() - stop.at >= 0.3
  still.moves.set()
  deadline = time.monotonic() + 10
  while still.batch == 2 and time.monotonic() < deadline:
    time.sleep(0.01)
  assert (still.state(), batches.state) == ({"batch": 3}, {"batch": 2})
  batches.close()
  assert still.closed
  assert stop.stuck is None


def test_closing_does_not_wait_for_what_never_ends(still):
  stop = Stop()
  batches = feed.Feed(still, stop)
  next(batches), next(batches)
  stop.at = 0.0
  with pytest.raises(Stopped):
    next(batches)
  batches.close()
  assert stop.stuck == "the data"
  still.moves.set()


def test_errors_come_through_and_leave_the_state(still):
  still.moves.set()
  batches = feed.Feed(still, Stop())
  assert [next(batches) for _ in range(3)] == [1, 2, 3]
  for _ in range(2):
    with pytest.raises(DataError, match="no more"):
      next(batches)
  assert batches.state == {"batch": 3}
  batches.close()

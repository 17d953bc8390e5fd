# SPDX-License-Identifier: Apache-2.0
"""The story of a run, for every stage: restore or initialise, then step, log, evaluate, save."""

import collections
import concurrent.futures
import contextlib
import functools
import signal
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
import PIL.Image
from absl import logging
from clu import metrics as clu_metrics
from clu import parameter_overview
from etils import epath
from jax.sharding import Mesh
from jax.typing import ArrayLike

from mm1_jax import checkpoint, distributed, extras
from mm1_jax.batch import Batch
from mm1_jax.checkpoint import Checkpointer
from mm1_jax.config import RunConfig
from mm1_jax.data.examples import make_encoder
from mm1_jax.data.pipeline import BatchStats, Pipeline, check_drops
from mm1_jax.metrics import (
  MetricWriter,
  StepTimer,
  load_scalars,
  model_flops,
  peak_memory_gib,
  progress_line,
)
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import abstract_batch, abstract_state, device_batch, make_mesh
from mm1_jax.train import start
from mm1_jax.train.feed import training_batches
from mm1_jax.train.guard import TrainingDiverged, Verdicts
from mm1_jax.train.heldout import held_out_loss
from mm1_jax.train.step import Metrics, TrainState, init_state, train_step_on

PROGRAMS = "programs"  # folder of compiled ones, in the workdir
MIN_IMAGE_SPREAD = 0.02  # below it a run is warned; 0.2 and more in runs that learn from pictures


def train(run: RunConfig, workdir: epath.PathLike, *, launched: float | None = None) -> TrainState:
  """Trains `run` in `workdir` up to `run.train.num_steps`, going on from its newest checkpoint.

  SIGTERM and SIGINT, to any of the processes, save the state and return after the current step.

  Args:
    launched: when the command was, by `time.time()`, for the time to the first step; else now.

  Raises:
    ConfigError, DataError, CheckpointError: a user's mistake, with what to do.
    TrainingDiverged: `run.train.max_skipped` steps in a row were skipped; the message names the
      last good checkpoint.
  """
  launched = launched or time.time()
  keep_programs(workdir)
  mesh = make_mesh(run)
  distributed.check_shared(workdir)
  with jax.set_mesh(mesh), Checkpointer(workdir, run.checkpoint) as checkpointer:
    # Data first: a wrong path is found before any param is made.
    latest = checkpointer.latest_step
    before = None if latest is None else start.check_resume(run, workdir)
    data_state = None if latest is None else checkpointer.restore_data(latest)
    with contextlib.closing(training_batches(run, data_state, mesh)) as pipeline:
      distributed.check_same("the data", pipeline.state())
      abstract = abstract_state(functools.partial(_fresh, run), mesh)
      check_start(run, abstract, checkpointer)
      unfinished = (latest or 0) < run.train.num_steps
      compiling = start_compiling(run, mesh, abstract) if unfinished else None
      state = restore_or_init(run, abstract, checkpointer)
      if before is not None:
        accepted = int(state.guard.accepted)
        start.log_resume(before, run, step=int(state.step), accepted=accepted)
      if jax.process_index() == 0 and (unfinished or before is None):
        checkpoint.write_run_files(workdir, run)
      names = checkpoint.to_names(state.model)
      logging.info("%s", parameter_overview.get_parameter_overview(names, include_stats=False))
      logging.info("mesh %s on %s", dict(mesh.shape), jax.devices()[0].device_kind)
      with (
        MetricWriter(workdir, start_step=int(state.step)) as writer,
        distributed.before_exit(writer.flush),
      ):
        compile_seconds = compiling.result() if compiling else 0.0
        verdicts = Verdicts(run, checkpointer)
        log = StepLog(run, writer, verdicts, launched=launched, compile_seconds=compile_seconds)
        return _run_steps(run, workdir, mesh, state, pipeline, checkpointer, log)


def _run_steps(
  run: RunConfig,
  workdir: epath.PathLike,
  mesh: Mesh,
  state: TrainState,
  pipeline: Pipeline,
  checkpointer: Checkpointer,
  log: "StepLog",
) -> TrainState:
  """Takes the steps that are left. The order inside is a contract.

  The state of step n is evaluated and saved with the data that comes next, and only then is a batch
  drawn. Metrics of a step are read while the next one runs. Nothing is saved after a refused step:
  a save that is due waits for the next accepted one, and a run that would end with a refused step
  takes a few more, until one is accepted.
  """
  step, save_due = int(state.step), False
  take_step, verdicts = train_step_on(mesh), log.verdicts

  def evaluate() -> None:
    log.flush()  # what is left of the step is not part of evaluating
    with log.timer.excluded():
      log.write(step, held_out_loss(state.model, run, mesh))
      log.write_tables(step)
      log.writer.flush()

  def accepted() -> bool:
    log.flush()
    return verdicts.in_a_row == 0

  def save() -> None:
    with log.timer.excluded(), log.saving():
      log.writer.flush()
      train = state._replace(model=None)
      checkpointer.save(step, params=state.model, train=train, data=pipeline.state())

  with Stop() as stop:
    while (step < run.train.num_steps or not accepted()) and not stop.agreed:
      batch, stats = log.fetch(pipeline)
      if step == 0:
        _draw(batch, pipeline, run, log.writer, workdir)
      on_device = device_batch(batch, mesh)
      tally = Tally.of(stats, stop.requested is not None)
      sums = distributed.sum_over_processes(np.array(tally, np.float32), mesh)
      state, metrics = take_step(state, on_device, run=run)
      step += 1
      stop.votes = log.step(step, metrics, sums).stopping
      if step % run.train.eval_every == 0:
        evaluate()
      save_due |= step % run.checkpoint.every == 0
      if save_due and accepted():
        save()
        save_due = False
    log.flush()
    if step % run.train.eval_every and not stop.agreed:
      evaluate()
    log.write_tables(step)  # of a run that is stopped, what no evaluation has written
    if checkpointer.latest_step != step and accepted():
      save()
    with log.saving():
      checkpointer.wait()
    logging.info("waited %.2f s for the last save to be on disk", log.save_seconds)
    if stop.agreed:
      by, newest = stop.requested or "another process", checkpointer.latest_step
      logging.info("stopped by %s; saved at step %s, run again to go on", by, newest)
      if newest != step:
        logging.warning("steps since then are not saved: the last one, %d, was skipped", step)
  return state


def keep_programs(workdir: epath.PathLike) -> None:
  """Keeps compiled programs in the workdir, so that a run that goes on need not compile again.

  Not where JAX is told of another folder ($JAX_COMPILATION_CACHE_DIR), nor on a CPU, whose programs
  are of the instructions of one model, for the folder may come to another machine.
  """
  given = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
  if given is None and jax.default_backend() != "cpu":
    jax.config.update("jax_compilation_cache_dir", str(checkpoint.absolute(workdir) / PROGRAMS))


def start_compiling(
  run: RunConfig, mesh: Mesh, abstract: TrainState
) -> concurrent.futures.Future[float]:
  """Compiles the train step in a thread, for instance while the state is restored.

  Its program is the one that JAX has at hand when the step is first called.

  Returns:
    The seconds that it will have taken.
  """

  def compile_step() -> float:
    begin = time.perf_counter()
    with jax.set_mesh(mesh):  # a thread has none of its own
      train_step_on(mesh).lower(abstract, abstract_batch(run, mesh), run=run).compile()
    return time.perf_counter() - begin

  pool = concurrent.futures.ThreadPoolExecutor(1, "compiling")
  seconds = pool.submit(compile_step)
  pool.shutdown(wait=False)
  return seconds


def _fresh(run: RunConfig) -> TrainState:
  return init_state(MM1(jax.random.key(run.train.seed), run.model), run)


def check_start(run: RunConfig, abstract: TrainState, checkpointer: Checkpointer) -> None:
  """Finds a user's mistake in what a run goes on from, before anything is compiled.

  Raises:
    CheckpointError: the checkpoint is damaged or of another model, or `init_from` does not fit.
  """
  latest = checkpointer.latest_step
  if latest is not None:
    checkpointer.check(latest, params=abstract.model, train=abstract._replace(model=None))
  elif run.train.init_from:
    start.check_init_from(run, abstract.model)


def restore_or_init(run: RunConfig, abstract: TrainState, checkpointer: Checkpointer) -> TrainState:
  """Returns the state to go on from. The first that applies:

  1. this run's newest checkpoint;
  2. a fresh state with the params of `train.init_from`;
  3. a fresh state.
  """
  latest = checkpointer.latest_step
  if latest is not None:
    params, train = checkpointer.restore(
      latest, params=abstract.model, train=abstract._replace(model=None)
    )
    logging.info("resuming at step %d", latest)
    return train._replace(model=params)
  # Initialisation runs once: on a CPU its compile time is what counts.
  options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
  state = jax.jit(functools.partial(_fresh, run), compiler_options=options)()
  if run.train.init_from:
    parts = start.fresh_parts(run)
    model = checkpoint.init_from(run.train.init_from, state.model, fresh_parts=parts)
    state = state._replace(model=model)
  return state


class Tally(NamedTuple):
  """What each process knows of a step by itself; summed over those that have rows of their own."""

  processes: float  # 1 of each
  stopping: float  # processes that were asked to stop
  padded_fraction: float
  empty_slot_fraction: float
  num_positions: float
  num_images: float
  num_examples: float
  num_dropped: float

  @classmethod
  def of(cls, stats: BatchStats, stopping: bool) -> "Tally":
    counts = stats.num_positions, stats.num_images, stats.num_examples, sum(stats.drops.values())
    return cls(1, stopping, stats.padded_fraction, stats.empty_slot_fraction, *counts)


class StepLog:
  """Accumulates metrics over `log_every` steps; writes them, and prints the progress line."""

  def __init__(
    self,
    run: RunConfig,
    writer: MetricWriter,
    verdicts: Verdicts,
    *,
    launched: float,
    compile_seconds: float = 0.0,
  ):
    """Begins. The first progress line has the time since `launched`, of it `compile_seconds`."""
    self._launched, self.verdicts = launched, verdicts
    self.writer, self.save_seconds = writer, 0.0  # of the newest save, while nothing is trained
    self._start: dict[str, float] | None = {"speed/compile_seconds": compile_seconds}
    self._saves: list[float] = []
    self.timer = StepTimer(flops=lambda num_images: model_flops(run, num_images)["total"])
    self._run = run
    self._pending: tuple[int, Metrics, Tally] | None = None
    self._sums: Metrics | None = None
    self._load: clu_metrics.Average | None = None  # of experts, since it was last written whole
    self._tallies: list[Tally] = []
    self._num_examples = self._num_dropped = 0.0  # of all processes
    self._drops: collections.Counter = collections.Counter()  # of this one, by reason
    self._data_wait = 0.0
    self._warned = False  # of collapsed image tokens
    self._watcher = concurrent.futures.ThreadPoolExecutor(1, "step_watcher")
    self._finished: concurrent.futures.Future[float] | None = None  # when the newest step was

  @contextlib.contextmanager
  def saving(self) -> Iterator[None]:
    """Times a save, in the block; the next progress line has the mean of those before it."""
    begin = time.perf_counter()
    yield
    self.save_seconds = time.perf_counter() - begin
    self._saves.append(self.save_seconds)

  def fetch(self, pipeline: Iterator[tuple[Batch, BatchStats]]) -> tuple[Batch, BatchStats]:
    """Returns the next batch, timing how long the devices wait for it."""
    idle_since = time.perf_counter()
    batch, stats = next(pipeline)
    now = time.perf_counter()
    if self._finished is not None:  # while they still run the step before, they do not wait
      idle_since = max(idle_since, self._finished.result()) if self._finished.done() else now
    self._data_wait += now - idle_since
    self._drops.update(stats.drops)
    return batch, stats

  def step(self, step: int, metrics: Metrics, sums: ArrayLike) -> Tally:
    """Takes a dispatched step's metrics and tally, and reads the metrics of the step before.

    The tally was dispatched in front of the step, so it can be read, and is returned, already.
    """
    self._finished = self._watcher.submit(_when_ready, metrics)
    if self._pending is not None:
      self._read(*self._pending)
    tally = Tally(*np.asarray(sums).tolist())
    self._pending = step, metrics, tally
    return tally

  def flush(self) -> None:
    """Reads the last step's metrics too."""
    if self._pending is not None:
      self._read(*self._pending)
      self._pending = None

  def write(self, step: int, scalars: dict[str, float]) -> None:
    """Writes scalars and shows them on a line."""
    self.writer.write_scalars(step, scalars)
    if scalars:
      logging.info("step %d | %s", step, " | ".join(f"{k} {v:.4f}" for k, v in scalars.items()))

  def write_tables(self, step: int) -> None:
    """Writes the load of each expert, as a mean over the steps since the last time."""
    if self._load is not None:
      self.writer.write_tables(step, {"moe/load": _relative(self._load)})
    self._load = None

  def _read(self, step: int, metrics: Metrics, tally: Tally) -> None:
    metrics = jax.device_get(metrics)  # waits for the step
    if self._start is not None:
      self._start.setdefault("speed/start_seconds", time.time() - self._launched)
    self.timer.tick(
      tokens=int(tally.num_positions), images=int(tally.num_images), data_wait=self._data_wait
    )
    self._data_wait = 0.0
    self._sums = metrics if self._sums is None else _merge(self._sums, metrics)
    if (load := metrics.get("moe/load")) is not None:
      self._load = load if self._load is None else self._load.merge(load)
    self._tallies.append(tally)
    self._num_examples += tally.num_examples + tally.num_dropped
    self._num_dropped += tally.num_dropped
    limit = self._run.data.max_drop_fraction
    check_drops(int(self._num_dropped), int(self._num_examples), limit, self._drops)
    if step % self._run.train.log_every == 0 or step == self._run.train.num_steps:
      self._report(step)
    try:
      self.verdicts.read(step, int(metrics["skipped_in_a_row"].compute()))
    except TrainingDiverged:
      self.writer.flush()
      raise

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
    """Says once that pictures have become the same to the decoder: the loss does not show it."""
    if spread is None or spread >= MIN_IMAGE_SPREAD or self._warned:
      return
    self._warned = True
    logging.warning(
      "step %d: image tokens of different pictures differ by %.2g%% of their size (image_spread; "
      "below %.0f%% is too little to learn from). The image encoder or the connector gives the "
      "decoder the same for every picture, and will not recover. Start again with lower "
      "optimizer.vit_learning_rate and optimizer.connector_learning_rate (4e-4 for a small encoder "
      "from random weights), or from a trained encoder: docs/training.md, 'Rates of an encoder'.",
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


class Stop:
  """Turns SIGTERM and Ctrl-C into a request to stop; a second one is not caught any more.

  Attributes:
    requested: the signal that this process was sent.
    votes: processes that had been sent one when they last told each other.
  """

  def __init__(self):
    self.requested: str | None = None
    self.votes = 0.0

  @property
  def agreed(self) -> bool:
    """Whether to stop: the same on all processes, as each of them must take the same steps."""
    return self.votes > 0 if jax.process_count() > 1 else self.requested is not None

  def __enter__(self) -> "Stop":
    self._handlers = {s: signal.signal(s, self._request) for s in (signal.SIGTERM, signal.SIGINT)}
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._handlers.items():
      signal.signal(number, handler)

  def _request(self, number: int, _) -> None:
    self.requested = signal.Signals(number).name
    for s, handler in self._handlers.items():
      signal.signal(s, handler)


def _draw(
  batch: Batch, pipeline: Pipeline, run: RunConfig, writer: MetricWriter, workdir: epath.PathLike
) -> None:
  """Draws the first batch: the cheapest way to see a mistake in the data."""
  if jax.process_index() != 0:
    return
  if message := extras.lacking("draw"):
    logging.info("first_batch.png is not drawn: %s", message)
    return
  from mm1_jax.data.inspect.picture import draw_batch  # not in a base install

  encoder = make_encoder(
    run.data,
    pipeline.tokenizer,
    image_size=run.model.vision.image_size,
    tokens_per_image=run.model.connector.num_tokens,
  )
  picture = draw_batch(batch, encoder, [source.name for source in run.data.leaves])
  writer.write_images(0, {"first_batch": picture})
  with (epath.Path(workdir) / "first_batch.png").open("wb") as file:
    PIL.Image.fromarray(picture).save(file, "PNG")

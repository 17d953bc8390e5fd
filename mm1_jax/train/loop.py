# SPDX-License-Identifier: Apache-2.0
"""The training loop of every stage: restore or initialise, then step, log, evaluate, save."""

import concurrent.futures
import contextlib
import functools
import time
from collections.abc import Sequence
from typing import Any

import jax
import PIL.Image
from absl import logging
from clu import parameter_overview
from etils import epath
from jax.sharding import Mesh

from mm1_jax import checkpoint, distributed, extras
from mm1_jax.batch import Batch
from mm1_jax.checkpoint import Checkpointer, DamagedError
from mm1_jax.config import RunConfig
from mm1_jax.data.drops import Drops
from mm1_jax.data.examples import make_encoder
from mm1_jax.data.pipeline import Pipeline
from mm1_jax.metrics import MetricWriter
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import abstract_batch, abstract_state, device_batch, make_mesh
from mm1_jax.train import replicas, start
from mm1_jax.train.feed import training_batches
from mm1_jax.train.guard import TrainingDiverged, Verdicts
from mm1_jax.train.heldout import Evaluator, held_out_loss
from mm1_jax.train.log import StepLog
from mm1_jax.train.step import Metrics, TrainState, init_state, train_step_on
from mm1_jax.train.stop import Stop
from mm1_jax.train.tally import Tally

PROGRAMS = "programs"  # folder of compiled ones, in the workdir


def train(
  run: RunConfig,
  workdir: epath.PathLike,
  *,
  launched: float | None = None,
  evaluators: Sequence[Evaluator] = (),
) -> TrainState:
  """Trains `run` in `workdir` up to `run.train.num_steps`, from its newest checkpoint if any.

  SIGTERM and SIGINT, to any of the processes, save the state and return after the current step.

  Args:
    evaluators: what is measured beside the held-out loss, each at its own interval and at the end.
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
    before = None if checkpointer.latest_step is None else start.check_resume(run, workdir)
    newest, data_state = checkpointer.newest_data() or (0, None)
    with contextlib.ExitStack() as opened:
      pipeline = training_batches(run, data_state, mesh)
      opened.callback(pipeline.close)
      distributed.check_same("the data", pipeline.state())
      abstract = abstract_state(functools.partial(_fresh, run), mesh)
      check_start(run, abstract, checkpointer)
      unfinished = newest < run.train.num_steps
      compiling = start_compiling(run, mesh, abstract) if unfinished else None
      state, resumed_data = restore_or_init(run, abstract, checkpointer)
      if resumed_data != data_state:  # of an older step: the newest one's arrays are damaged
        pipeline.close()
        pipeline = training_batches(run, resumed_data, mesh)
        opened.callback(pipeline.close)
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
        log = StepLog(run, writer, launched=launched, compile_seconds=compile_seconds)
        return _run_steps(run, mesh, state, pipeline, checkpointer, log, evaluators)


def _run_steps(
  run: RunConfig,
  mesh: Mesh,
  state: TrainState,
  pipeline: Pipeline,
  checkpointer: Checkpointer,
  log: StepLog,
  evaluators: Sequence[Evaluator],
) -> TrainState:
  """Takes the steps that are left. The order inside is a contract.

  The state of step n is evaluated and saved with the data that comes next, and only then is a batch
  drawn. Metrics of a step are read while the next one runs. Nothing is saved after a refused step:
  a save that is due waits for the next accepted one, and a run that would end with a refused step
  takes a few more, until one is accepted.
  """
  step, save_due, take_step = int(state.step), False, train_step_on(mesh)
  verdicts, drops = Verdicts(run, checkpointer), Drops(run.data.max_drop_fraction)
  results = Results(log, verdicts, drops)

  def evaluate(*, last: bool = False) -> None:
    """Measures what is due at this step; at the last one, what was not measured at it."""
    held_out = (step % run.train.eval_every == 0) != last
    due = [e for e in evaluators if (step % e.every == 0) != last]
    if not (held_out or due):
      return
    results.flush()  # what is left of the step is not part of evaluating
    with log.timer.excluded():
      if held_out:
        log.write(step, held_out_loss(state.model, run, mesh))
        log.write_tables(step)
      for evaluator in due:
        log.write(step, evaluator(state.model, mesh))
      log.writer.flush()

  def accepted() -> bool:
    results.flush()
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
        _draw(batch, pipeline, run, log.writer)
      on_device = device_batch(batch, mesh)
      drops.note(stats.drops)
      sums = Tally.of(stats, stop.requested is not None).over_processes(mesh)
      state, metrics = take_step(state, on_device, run=run)
      step += 1
      log.dispatched(metrics)
      tally = Tally.read(sums)
      results.put(step, metrics, tally)
      stop.votes = tally.stopping
      if run.train.replica_check_every and step % run.train.replica_check_every == 0:
        replicas.check(step, state.model)
      evaluate()
      save_due |= step % run.checkpoint.every == 0
      if save_due and accepted():
        save()
        save_due = False
    results.flush()
    if not stop.agreed:
      evaluate(last=True)
    log.write_tables(step)  # of a run that is stopped, what no evaluation has written
    if checkpointer.latest_step != step and accepted():
      save()
    with log.saving():
      checkpointer.wait()
    logging.info("waited %.2f s for the last save to be on disk", log.save_seconds)
    if stop.agreed:
      by, newest = stop.requested or "another process", checkpointer.latest_step
      logging.info("stopped by %s; saved at step %s, run again to continue", by, newest)
      if newest != step:
        logging.warning("steps since then are not saved: the last one, %d, was skipped", step)
  return state


def keep_programs(workdir: epath.PathLike) -> None:
  """Keeps compiled programs in the workdir, so that a resumed run need not compile again.

  Not where JAX is given another folder ($JAX_COMPILATION_CACHE_DIR). Nor on a CPU: its programs use
  the instructions of one CPU model, and the folder may be moved to another machine.
  """
  given = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
  if given is None and jax.default_backend() != "cpu":
    jax.config.update("jax_compilation_cache_dir", str(checkpoint.absolute(workdir) / PROGRAMS))


def start_compiling(
  run: RunConfig, mesh: Mesh, abstract: TrainState
) -> concurrent.futures.Future[float]:
  """Compiles the train step in a thread, for instance while the state is restored.

  JAX finds the compiled program when the step is first called.

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
  """Finds a user's mistake in what a run starts from, before anything is compiled.

  Raises:
    CheckpointError: the checkpoint is of another model, or `init_from` does not fit.
  """
  latest = checkpointer.latest_step
  if latest is not None:
    with contextlib.suppress(DamagedError):  # an older one may be whole
      checkpointer.check(latest, params=abstract.model, train=abstract._replace(model=None))
  elif run.train.init_from:
    start.check_init_from(run, abstract.model)


def restore_or_init(
  run: RunConfig, abstract: TrainState, checkpointer: Checkpointer
) -> tuple[TrainState, dict[str, Any] | None]:
  """Returns the state to start from, and that of the data with it. The first that applies:

  1. this run's newest checkpoint that is whole;
  2. a fresh state with the params of `train.init_from`;
  3. a fresh state.
  """
  if checkpointer.latest_step is not None:
    train = abstract._replace(model=None)
    restored = checkpointer.restore_newest(params=abstract.model, train=train)
    logging.info("resuming at step %d", restored.step)
    return restored.train._replace(model=restored.params), restored.data
  # Initialisation runs once: on a CPU its compile time is what counts.
  options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
  state = jax.jit(functools.partial(_fresh, run), compiler_options=options)()
  if run.train.init_from:
    parts = start.fresh_parts(run)
    model = checkpoint.init_from(run.train.init_from, state.model, fresh_parts=parts)
    state = state._replace(model=model)
  return state, None


class Results:
  """Reads each step's metrics while the next one runs; logs them; ends a run that has to end."""

  def __init__(self, log: StepLog, verdicts: Verdicts, drops: Drops):
    self._log, self._verdicts, self._drops = log, verdicts, drops
    self._pending: tuple[int, Metrics, Tally] | None = None

  def put(self, step: int, metrics: Metrics, tally: Tally) -> None:
    """Takes a dispatched step's metrics and tally, and reads those of the step before."""
    self.flush()
    self._pending = step, metrics, tally

  def flush(self) -> None:
    """Reads the newest step's results too.

    Raises:
      DataError: too many examples were dropped.
      TrainingDiverged: too many steps in a row were refused.
    """
    if self._pending is None:
      return
    (step, metrics, tally), self._pending = self._pending, None
    metrics = jax.device_get(metrics)  # waits for the step
    self._drops.count(int(tally.num_examples), int(tally.num_dropped))
    self._log.add(step, metrics, tally)
    try:
      self._verdicts.read(step, int(metrics["skipped_in_a_row"].compute()))
    except TrainingDiverged:
      self._log.writer.flush()
      raise


def _draw(batch: Batch, pipeline: Pipeline, run: RunConfig, writer: MetricWriter) -> None:
  """Draws the first batch: the cheapest way to see a mistake in the data."""
  if jax.process_index() != 0:
    return
  if message := extras.lacking("draw"):
    logging.info("first_batch.png is not drawn: %s", message)
    return
  from mm1_jax.data.inspect.picture import draw_batch  # not in a base install

  encoder = make_encoder(run.data, pipeline.tokenizer, run.input_spec)
  picture = draw_batch(batch, encoder, [source.name for source in run.data.leaves])
  writer.write_images(0, {"first_batch": picture})
  with (writer.workdir / "first_batch.png").open("wb") as file:
    PIL.Image.fromarray(picture).save(file, "PNG")

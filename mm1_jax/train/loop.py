# SPDX-License-Identifier: Apache-2.0
"""The training loop of every stage: restore or initialise, then step, log, save, evaluate."""

import concurrent.futures
import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import PIL.Image
from absl import logging
from clu import parameter_overview
from etils import epath
from jax.sharding import Mesh

from mm1_jax import checkpoint, distributed, extras
from mm1_jax.batch import Batch
from mm1_jax.checkpoint import Checkpointer, CheckpointError, DamagedError
from mm1_jax.config import RunConfig, UserError
from mm1_jax.data.drops import Drops
from mm1_jax.data.examples import make_encoder
from mm1_jax.data.pipeline import PipelineError
from mm1_jax.data.tokenizer import Tokenizer
from mm1_jax.goodput import read_goodput
from mm1_jax.metrics import MetricWriter, read_events
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import abstract_batch, abstract_state, device_batch, make_mesh
from mm1_jax.train import owner, replicas, start
from mm1_jax.train.feed import Feed, training_batches
from mm1_jax.train.guard import TrainingDiverged, Verdicts
from mm1_jax.train.heldout import HELD_OUT, Evaluator, HeldOutLoss
from mm1_jax.train.log import StepLog
from mm1_jax.train.step import Metrics, TrainState, init_state, train_step_on
from mm1_jax.train.stop import Stop, Stopped
from mm1_jax.train.tally import Tally
from mm1_jax.train.watchdog import Watchdog

DEVICES = "the devices, or another process"
# No save can follow these.
OF_STATE = (TrainingDiverged, CheckpointError, replicas.ReplicaError, owner.WorkdirInUse)
PROGRAMS = "programs"  # folder of compiled ones, in the workdir


def train(
  run: RunConfig,
  workdir: epath.PathLike,
  *,
  launched: float | None = None,
  evaluators: Sequence[Evaluator] = (),
  stop: Stop | None = None,
) -> TrainState:
  """Trains `run` in `workdir` up to `run.train.num_steps`, from its newest checkpoint if any.

  SIGTERM, SIGHUP and SIGINT, to any of the processes, save the state and return after the current
  step.

  Args:
    run: what is trained.
    workdir: where; one run at a time (see `train.owner`).
    evaluators: what is measured beside the held-out loss, each at its own interval and at the end.
    launched: when the command was, by `time.time()`, for the time to the first step; else now.
    stop: takes signals already; one of the loop's own if not given.

  Raises:
    ConfigError, DataError, CheckpointError: a user's mistake, with what to do.
    WorkdirInUse: another run has the workdir.
    TrainingDiverged: `run.train.max_skipped` steps in a row were skipped; the message names the
      last good checkpoint.
  """
  launched = launched or time.time()
  mesh = make_mesh(run)
  with (
    jax.set_mesh(mesh),
    controlled(run, workdir, stop) as control,
    Checkpointer(workdir, run.checkpoint) as checkpointer,
  ):
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
      feed = opened.enter_context(contextlib.closing(Feed(pipeline, control.stop)))
      step = int(state.step)
      if before is not None:
        start.log_resume(before, run, step=step, accepted=int(state.guard.accepted))
      if jax.process_index() == 0 and (unfinished or before is None):
        checkpoint.write_run_files(workdir, run)
      names = checkpoint.to_names(state.model)
      logging.info("%s", parameter_overview.get_parameter_overview(names, include_stats=False))
      logging.info("mesh %s on %s", dict(mesh.shape), jax.devices()[0].device_kind)
      with (
        MetricWriter(workdir, start_step=step, launched=launched) as writer,
        distributed.before_exit(writer.flush),
      ):
        with control.watch.waiting("the compiler"):
          compile_seconds = compiling.result() if compiling else 0.0
        log = StepLog(run, writer, launched=launched, compile_seconds=compile_seconds)
        measure = Evaluations([HeldOutLoss(run), *evaluators], mesh, log, control)
        measure.note_done(workdir, step)
        return _run_steps(run, mesh, state, feed, checkpointer, log, measure, control)


class Control(NamedTuple):
  """What may end a run early, and what tells what it waits for."""

  stop: Stop
  watch: Watchdog
  lock: owner.Lock


@contextlib.contextmanager
def controlled(run: RunConfig, workdir: epath.PathLike, stop: Stop | None) -> Iterator[Control]:
  """Owns the workdir, takes signals, and watches the clock, in the block."""
  with contextlib.ExitStack() as stack:
    lock = stack.enter_context(owner.owning(workdir))
    keep_programs(workdir)
    distributed.check_shared(workdir)
    stop = stop or stack.enter_context(Stop())
    watch = Watchdog(
      stop,
      stall_seconds=run.train.stall_seconds,
      stop_seconds=run.train.stop_seconds,
      where=f"process {jax.process_index()}: " if jax.process_count() > 1 else "",
    )
    stop.look = watch.look
    stack.callback(setattr, stop, "look", None)
    yield Control(stop, watch, lock)


def _run_steps(
  run: RunConfig,
  mesh: Mesh,
  state: TrainState,
  feed: Feed,
  checkpointer: Checkpointer,
  log: StepLog,
  measure: "Evaluations",
  control: Control,
) -> TrainState:
  """Takes the steps that are left. The order inside is a contract.

  The state of step n is saved with the data that comes next, then evaluated, and only then is a
  batch drawn. Metrics of a step are read while the next one runs. Nothing is saved after a refused
  step: a save that is due waits for the next accepted one, and a run that would end with a refused
  step takes a few more, until one is accepted.
  """
  step, save_due, take_step = int(state.step), False, train_step_on(mesh)
  verdicts, drops = Verdicts(run, checkpointer), Drops(run.data.max_drop_fraction)
  results, (stop, watch, lock) = Results(log, verdicts, drops, control.watch), control
  saves = Saves(checkpointer, feed, log, results, control)
  stop.begin_steps()
  watch.begin(step)
  try:
    measure(step, state.model)  # what a command that ended at this step had not
    while (step < run.train.num_steps or not results.accepted()) and not stop.agreed:
      try:
        with watch.waiting("the next batch"):
          batch, stats = log.fetch(feed)
      except Stopped:
        break
      if step == 0:
        _draw(batch, feed.tokenizer, run, log.writer)
      on_device = device_batch(batch, mesh)
      drops.note(stats.drops)
      sums = Tally.of(stats, stop.requested is not None).over_processes(mesh)
      state, metrics = take_step(state, on_device, run=run)
      step += 1
      log.dispatched(metrics)
      with watch.waiting(DEVICES):
        tally = Tally.read(sums)
      results.put(step, metrics, tally)
      watch.progress(step)
      stop.votes = tally.stopping
      if run.train.replica_check_every and step % run.train.replica_check_every == 0:
        replicas.check(step, state.model)
      lock.check()
      checkpointer.check_saved()
      save_due |= step % run.checkpoint.every == 0
      if save_due and results.accepted():
        saves.begin(step, state)
        save_due = False
      if measure.due(step):
        results.flush()  # what is left of the step is not part of evaluating
        measure(step, state.model)
    saves.last(step, state)
    log.write_tables(step)  # of a run that is stopped, what no save has written
    if not stop.agreed:
      measure(step, state.model, last=True)
    stop.left_out = step < run.train.num_steps or bool(measure.due(step, last=True))
    saves.wait()
  except (UserError, PipelineError) as e:
    saves.before(e, step, state)
    raise
  _tell_end(step, checkpointer.latest_step, log, stop)
  return state


def _tell_end(step: int, newest: int | None, log: StepLog, stop: Stop) -> None:
  logging.info("waited %.2f s for the last save to be on disk", log.save_seconds)
  log.writer.write_event(step, "ended", done=not stop.left_out)
  log.writer.flush()
  if jax.process_index() == 0 and (spent := read_goodput(log.writer.workdir)):
    logging.info("%s", spent)
  if stop.agreed:
    by = stop.requested or "another process"
    saved = "nothing to save" if newest is None else f"saved at step {newest}"
    logging.info("stopped by %s; %s, run again to continue", by, saved)
    if newest not in (None, step):
      logging.warning("steps since then are not saved: the last one, %d, was skipped", step)


class Saves:
  """Saves the state of a step with the data that comes next."""

  def __init__(
    self,
    checkpointer: Checkpointer,
    feed: Feed,
    log: StepLog,
    results: "Results",
    control: Control,
  ):
    self._checkpointer, self._feed, self._log, self._results = checkpointer, feed, log, results
    self._control = control

  def begin(self, step: int, state: TrainState) -> None:
    """Begins a save; arrays may be donated as soon as it returns."""
    log, watch = self._log, self._control.watch
    log.write_tables(step)  # a run that resumes here has not seen the steps they are of
    with (
      watch.waiting(f"the save of step {step} to begin", saving=True),
      log.timer.excluded(),
      log.saving(step),
    ):
      log.writer.flush()
      train = state._replace(model=None)
      self._checkpointer.save(step, params=state.model, train=train, data=self._feed.state)
    watch.progress()

  def last(self, step: int, state: TrainState) -> None:
    """Begins a save of the newest step, unless it is saved or was refused."""
    if step > 0 and self._checkpointer.latest_step != step and self._results.accepted():
      self.begin(step, state)

  def wait(self) -> None:
    """Waits until what is saved is on disk."""
    step = self._checkpointer.latest_step or 0
    with self._control.watch.waiting("the last save", saving=True), self._log.saving(step):
      self._checkpointer.wait()

  def before(self, error: Exception, step: int, state: TrainState) -> None:
    """Saves the newest step before an error ends the run, if that is not of the state.

    Such an error is of the data, its workers or an evaluation. One process of several cannot save
    alone: the others have begun a step that it will not take.
    """
    if jax.process_count() > 1 or isinstance(error, OF_STATE):
      return
    try:
      self.last(step, state)
      self.wait()
    except (UserError, OSError) as e:
      logging.warning("step %d could not be saved before the error that follows: %s", step, e)
      return
    newest = self._checkpointer.latest_step
    logging.info("saved at step %s before the error that follows", newest)


class Evaluations:
  """The held-out loss and benchmarks: each at its own interval, and at the last step.

  One that a signal interrupts writes nothing; a run that resumes at its step begins with it.
  """

  def __init__(self, evaluators: Sequence[Evaluator], mesh: Mesh, log: StepLog, control: Control):
    self._evaluators, self._mesh, self._log, self._control = evaluators, mesh, log, control
    self._done: set[tuple[int, str]] = set()

  def note_done(self, workdir: epath.PathLike, step: int) -> None:
    """Takes from the workdir's log what an earlier command has measured at its last step."""
    events = read_events(workdir, step) if step and jax.process_index() == 0 else []
    names = [event["name"] for event in events if event["event"] == "evaluated"]
    self._done |= {(step, name) for name in distributed.from_first("evaluated", names)}

  def due(self, step: int, *, last: bool = False) -> list[Evaluator]:
    """Returns what is still to be measured at a step."""
    due = [e for e in self._evaluators if last or (step > 0 and step % e.every == 0)]
    return [e for e in due if (step, e.name) not in self._done]

  def __call__(self, step: int, params: MM1, *, last: bool = False) -> None:
    """Measures what is due at a step; its results must have been read."""
    log = self._log
    for evaluator in self.due(step, last=last):
      if evaluator.name == HELD_OUT:
        log.write_tables(step)
      try:
        with (
          self._control.watch.waiting(f"the evaluation '{evaluator.name}'"),
          log.evaluating(step, evaluator.name),
        ):
          log.write(step, evaluator(params, self._mesh, self._check))
      except Stopped:
        return
      self._done.add((step, evaluator.name))

  def _check(self) -> None:
    self._control.watch.progress()
    if self._control.stop.poll(self._mesh):
      raise Stopped


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

  def __init__(self, log: StepLog, verdicts: Verdicts, drops: Drops, watch: Watchdog):
    self._log, self._verdicts, self._drops, self._watch = log, verdicts, drops, watch
    self._pending: tuple[int, Metrics, Tally] | None = None

  def put(self, step: int, metrics: Metrics, tally: Tally) -> None:
    """Takes a dispatched step's metrics and tally, and reads those of the step before."""
    self.flush()
    self._pending = step, metrics, tally

  def accepted(self) -> bool:
    """Returns whether the newest step was, after `flush`."""
    self.flush()
    return self._verdicts.in_a_row == 0

  def flush(self) -> None:
    """Reads the newest step's results too.

    Raises:
      DataError: too many examples were dropped.
      TrainingDiverged: too many steps in a row were refused.
    """
    if self._pending is None:
      return
    (step, metrics, tally), self._pending = self._pending, None
    with self._watch.waiting(DEVICES):
      metrics = jax.device_get(metrics)  # waits for the step
    self._log.add(step, metrics, tally)
    try:
      self._verdicts.read(step, int(metrics["skipped_in_a_row"].compute()))
    except TrainingDiverged:
      self._log.writer.flush()
      raise
    # After the verdict: the state may be saved before this error.
    self._drops.count(int(tally.num_examples), int(tally.num_dropped))


def _draw(batch: Batch, tokenizer: Tokenizer, run: RunConfig, writer: MetricWriter) -> None:
  """Draws the first batch: the cheapest way to see a mistake in the data."""
  if jax.process_index() != 0:
    return
  if message := extras.lacking("draw"):
    logging.info("first_batch.png is not drawn: %s", message)
    return
  from mm1_jax.data.inspect.picture import draw_batch  # not in a base install

  encoder = make_encoder(run.data, tokenizer, run.input_spec)
  picture = draw_batch(batch, encoder, [source.name for source in run.data.leaves])
  writer.write_images(0, {"first_batch": picture})
  with (writer.workdir / "first_batch.png").open("wb") as file:
    PIL.Image.fromarray(picture).save(file, "PNG")

# SPDX-License-Identifier: Apache-2.0
"""Runs of the lab: what one is, training it, and keeping what it was measured at.

A run is kept under a hash of all that defines it and its seed, so findings share runs, and what was
stopped continues. Runs of one shape and config share a compiled program.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np
from absl import logging

from lab import base
from lab.stream import Batches, Mixture
from mm1_jax import checkpoint
from mm1_jax.checkpoint import Checkpointer
from mm1_jax.config import RunConfig
from mm1_jax.inference.model import Model
from mm1_jax.models.mm1 import MM1
from mm1_jax.sharding import abstract_state, device_batch, make_mesh
from mm1_jax.train.step import TrainState, init_state, train_step_on

WORLD = (
  1  # goes up with every change of what documents or measures are: kept runs are then of no use
)
SAVE_SECONDS = 60
CURVE_POINTS = 50
Measure = Callable[[Model], np.ndarray]  # a value for each held-out item, float[n]


@dataclasses.dataclass(frozen=True)
class Run:
  """One cell of a contrast, but for its seed.

  Attributes:
    mixture: streams and their shares of positions.
    steps: of training.
    config: overrides of `base.config`, as on the command line.
    start: the run whose params this one starts from.
    fresh: parts of the model that start from random params all the same.
    shuffled: whether pictures are shuffled against texts: then there is nothing to learn of them.
  """

  mixture: Mixture
  steps: int
  config: Mapping[str, str] = dataclasses.field(default_factory=dict)
  start: "Run | None" = None
  fresh: tuple[str, ...] = ()
  shuffled: bool = False

  @property
  def key(self) -> str:
    """A hash of everything above, and of the runs before it."""
    before = self.start and self.start.key
    what = (WORLD, self.mixture, self.steps, sorted(self.config.items()), before, self.fresh)
    return hashlib.sha256(repr((*what, self.shuffled)).encode()).hexdigest()[:12]

  def run_config(self) -> RunConfig:
    return base.config(self.steps, self.config.items())


class Lab:
  """Trains and measures runs in a folder, each once.

  Args:
    folder: of what is kept.
    short: divides the steps of every run, to try things out; such runs are kept apart.
  """

  def __init__(self, folder: pathlib.Path, short: int = 1):
    self._folder, self._short = folder, short

  def values(self, run: Run, seed: int, measures: Mapping[str, Measure]) -> dict[str, np.ndarray]:
    """Returns each measure's values of a run with one seed, from the folder if they are there."""
    run = self._shortened(run)
    path = self._folder / "measured" / f"{run.key}-{seed}.json"
    kept = json.loads(path.read_text()) if path.exists() else {"values": {}, "seconds": {}}
    if missing := [name for name in measures if name not in kept["values"]]:
      model = self.model(run, seed)
      for name in missing:
        begin = time.process_time()
        kept["values"][name] = [round(float(x), 4) for x in measures[name](model)]
        kept["seconds"][name] = round(time.process_time() - begin, 1)
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(json.dumps(kept) + "\n")
    return {name: np.array(kept["values"][name]) for name in measures}

  def cost(self, run: Run, seed: int) -> float:
    """Returns the CPU seconds that a run's training took, without those of the runs before it."""
    return self.record(run, seed)["cpu_seconds"]

  def record(self, run: Run, seed: int) -> dict:
    """Returns what was noted of a finished run: seconds, steps refused, the curve of its loss."""
    return json.loads((self._workdir(self._shortened(run), seed) / "trained.json").read_text())

  def model(self, run: Run, seed: int) -> Model:
    """Returns a run's model, trained if it is not there."""
    workdir = self._workdir(run, seed)
    if not (workdir / "trained.json").exists():
      start = run.start and self._trained(run.start, seed)
      train(run, seed, workdir, start)
    return Model.load(workdir)

  def _trained(self, run: Run, seed: int) -> pathlib.Path:
    """Returns the folder of a trained run."""
    self.model(run, seed)
    return self._workdir(run, seed)

  def _workdir(self, run: Run, seed: int) -> pathlib.Path:
    return self._folder / "runs" / f"{run.key}-{seed}"

  def _shortened(self, run: Run) -> Run:
    if self._short == 1:
      return run
    start = run.start and self._shortened(run.start)
    return dataclasses.replace(run, steps=max(1, run.steps // self._short), start=start)


def train(run: Run, seed: int, workdir: pathlib.Path, start: pathlib.Path | None) -> None:
  """Trains a run to its end, from its newest checkpoint if there is one."""
  cfg = run.run_config()
  mesh = make_mesh(cfg, jax.devices()[:1])
  batches = Batches(cfg, run.mixture, seed, shuffled=run.shuffled)
  begin, saved, curve = time.process_time(), time.monotonic(), {}
  with jax.set_mesh(mesh), Checkpointer(workdir, cfg.checkpoint) as keeper:
    state, spent = _begin(run, cfg, seed, start, keeper, mesh)
    take_step = train_step_on(mesh)
    metrics = None
    for step in range(int(state.step), run.steps):
      state, metrics = take_step(state, device_batch(batches[step], mesh), run=cfg)
      if step % max(1, run.steps // CURVE_POINTS) == 0 or step == run.steps - 1:
        curve[step] = round(float(metrics["loss"].compute()), 4)
      if time.monotonic() - saved > SAVE_SECONDS or step == run.steps - 1:
        spent_now = spent + time.process_time() - begin
        keeper.save(
          step + 1, params=state.model, train=state._replace(model=None), data={"spent": spent_now}
        )
        saved = time.monotonic()
    keeper.wait()
  checkpoint.write_run_files(workdir, cfg)
  note = {
    "steps": run.steps,
    "cpu_seconds": round(spent + time.process_time() - begin, 1),
    "skipped": 0 if metrics is None else int(metrics["skipped"].compute()),
    "image_spread": None if metrics is None else float(metrics["image_spread"].compute()),
    "loss": curve,
  }
  (workdir / "trained.json").write_text(json.dumps(note) + "\n")
  logging.info("%s-%d: %d steps, %.0f CPU s", run.key, seed, run.steps, note["cpu_seconds"])


def _begin(run, cfg, seed, start, keeper, mesh) -> tuple[TrainState, float]:
  """Returns the state to start from, and the CPU seconds that were spent on it before."""
  make = functools.partial(_fresh, cfg, seed)
  if (latest := keeper.latest_step) is not None:
    abstract = abstract_state(make, mesh)
    params, rest = keeper.restore(
      latest, params=abstract.model, train=abstract._replace(model=None)
    )
    return rest._replace(model=params), keeper.restore_data(latest)["spent"]
  state = jax.jit(make, compiler_options={"xla_backend_optimization_level": 0})()
  if start is not None:
    model = checkpoint.init_from(start, state.model, fresh_parts=run.fresh)
    state = state._replace(model=model)
  return state, 0.0


def _fresh(cfg: RunConfig, seed: int) -> TrainState:
  return init_state(MM1(jax.random.key(seed), cfg.model), cfg)

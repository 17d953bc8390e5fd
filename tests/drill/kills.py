# SPDX-License-Identifier: Apache-2.0
"""kill -9 at random moments: however often a run is killed, it ends as if it never was."""

import pathlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

from tests.drill import runs
from tests.drill.core import Expected, Fault, Outcome, Scene
from tests.drill.process import Missed, Process

CHAINS, KILLS = 10, 10  # a run each, and how often it is killed
KILLED = -signal.SIGKILL


def faults() -> Iterator[Fault]:
  for i in range(CHAINS):
    strike = random_moments if i % 2 else in_saves
    where = "random" if i % 2 else "saving"
    yield Fault(f"kills/{where}-{i}", strike)
  yield Fault("kills/quick-random", lambda scene: random_moments(scene, 3), quick=True, whole=False)
  yield Fault("kills/quick-saving", lambda scene: in_saves(scene, 3), quick=True, whole=False)
  yield Fault("kills/first-save", first_save, quick=True)
  yield Fault("kills/evaluating", evaluating)
  yield Fault("kills/restoring", restoring)
  yield Fault("kills/with-workers", with_workers)


def random_moments(scene: Scene, kills: int = KILLS) -> None:
  """Kills at a random time after the start, or after a random step."""
  usual = _usual(scene)

  def wait(process: Process, workdir: pathlib.Path) -> None:
    if scene.dice.random() < 0.5:
      time.sleep(scene.dice.uniform(0.1, 0.95) * usual)
    else:
      left = range(runs.newest(workdir) + 1, runs.NUM_STEPS + 1)
      process.wait_for(rf"^step +{scene.dice.choice(left or [0])}/")
      time.sleep(scene.dice.uniform(0, 0.1))

  _chain(scene, kills, wait)


def in_saves(scene: Scene, kills: int = KILLS) -> None:
  """Kills while a checkpoint is being written: the first or the second, at a moment of it."""

  def wait(process: Process, workdir: pathlib.Path) -> None:
    seen = set(runs.saves_in_work(workdir))

    def another() -> set[str]:
      return set(runs.saves_in_work(workdir)) - seen

    for _ in range(scene.dice.randint(1, 2)):
      process.wait_for(another)
      seen |= another()
    time.sleep(scene.dice.uniform(0, 0.03))

  _chain(scene, kills, wait)


def _chain(scene: Scene, kills: int, wait: Callable[[Process, pathlib.Path], None]) -> None:
  """Starts a run again after each kill; where it comes to its end before, another one begins."""
  runs.reference(scene.lab)
  struck, number = 0, 0
  for _ in range(3 * kills):
    workdir = scene.folder / f"run{number}"
    process = runs.start(scene, workdir=workdir)
    try:
      wait(process, workdir)
      _kill(scene, process)
      struck += 1
    except Missed:
      scene.finish(process, Expected(within=180), shown=False)
      scene.keeps(runs.differences(scene, workdir))
      number += 1
    if struck == kills:
      break
  else:
    raise Missed(f"{struck} kills of {kills}")
  _end(scene, struck, workdir=scene.folder / f"run{number}")


def first_save(scene: Scene) -> None:
  runs.reference(scene.lab)
  process = runs.start(scene)
  process.wait_for(lambda: runs.saves_in_work(scene.folder / "run"))
  _kill(scene, process)
  _end(scene, 1)


def evaluating(scene: Scene) -> None:
  """Kills in the evaluation of step 12; how much is evaluated changes nothing that is trained."""
  longer = {"train.eval_batches": 40}
  runs.reference(scene.lab)
  process = runs.start(scene, longer)
  process.wait_for(r"step +12/")
  _kill(scene, process)
  _end(scene, 1, besides="metric eval/")


def restoring(scene: Scene) -> None:
  runs.copy_of_base(scene)
  process = runs.start(scene)
  process.wait_for(r"images come|resuming at step")
  _kill(scene, process)
  _end(scene, 1)


def with_workers(scene: Scene) -> None:
  """Worker processes too are gone after it, and make the same batches."""
  runs.reference(scene.lab)
  process = runs.start(scene, {"data.num_workers": 2})
  process.wait_for(r"step +7/")
  _kill(scene, process)
  _end(scene, 1, overrides={"data.num_workers": 2})


def _usual(scene: Scene) -> float:
  """Returns the seconds that a launch takes, measured once."""

  def measure(folder) -> float:
    begun = time.monotonic()
    folder.mkdir()
    other = Scene(scene.lab, folder / "scene", scene.dice)
    ended = runs.start(other).end(600)
    if ended.code != 0:
      raise RuntimeError(f"a run ended with {ended.code}: {ended.text[-500:]}")
    return time.monotonic() - begun

  return scene.lab.once("usual", measure)


def _kill(scene: Scene, process: Process) -> None:
  process.strike(signal.SIGKILL)
  ended = process.end(30)
  if ended.code != KILLED:
    scene.add(Outcome.WRONG, f"exit code {ended.code} after kill -9")


def _end(scene: Scene, struck: int, **how: Any) -> None:
  runs.restart(scene, **how)
  scene.message = f"kills: {struck}"

# SPDX-License-Identifier: Apache-2.0
"""Data workers that freeze, die, or lose their parent; and shared memory that is full."""

import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator

from tests.drill import runs
from tests.drill.core import REFUSED, Expected, Fault, NotRun, Outcome, Scene, shell, told
from tests.drill.process import Process, lives
from tests.drill.runs import STOPPED

TWO = {"data.num_workers": 2, "data.prefetch_batches": 1}
STALL = 3  # seconds without a step until the run must say so
SAYS_STALLED = r"(?i)no step for|waiting for|waits for"
ORPHANS_LIVE = 15  # seconds, at most
PIECE = "spawn_main"  # in the command line of a worker


def faults() -> Iterator[Fault]:
  yield Fault("workers/frozen-told", frozen_told)
  yield Fault("workers/frozen-then-term", frozen_then_term, quick=True)
  yield Fault("workers/killed", lambda scene: died(scene, signal.SIGKILL))
  yield Fault("workers/terminated", lambda scene: died(scene, signal.SIGTERM))
  yield Fault("workers/orphaned", orphaned, quick=True)
  yield Fault("workers/orphaned-while-frozen", orphaned_while_frozen)
  yield Fault("workers/no-shared-memory", no_shared_memory)


def frozen_told(scene: Scene) -> None:
  """A worker that stands still, as in a read that never returns: the run says what it waits for."""
  process, ids = _with_workers(scene)
  process.strike(signal.SIGSTOP, ids)
  deadline = time.monotonic() + scene.patient(60)
  while not re.search(SAYS_STALLED, process.text):
    if time.monotonic() > deadline:
      scene.add(Outcome.HUNG, "no step for 60 s, and no line says so")
      return
    if process.ended():
      scene.finish(process, Expected((REFUSED,)))
      return
    time.sleep(0.05)
  scene.seconds = time.monotonic() - process.struck
  scene.message = next(x for x in process.text.splitlines() if re.search(SAYS_STALLED, x))


def frozen_then_term(scene: Scene) -> None:
  """SIGTERM ends a run that waits for its workers; the state in memory is saved."""
  process, ids = _with_workers(scene)
  process.strike(signal.SIGSTOP, ids)
  time.sleep(STALL)
  process.strike(signal.SIGTERM)
  scene.finish(process, Expected((STOPPED,), within=40))
  saved, taken = runs.newest(scene.folder / "run"), runs.steps_taken(process.text)
  if saved < taken:
    scene.add(Outcome.LOST, f"step {taken} was taken, {saved} is saved")
  runs.restart(scene, TWO)


def died(scene: Scene, number: signal.Signals) -> None:
  """One worker dies: the run ends in one line, or goes on; what it had is saved."""
  process, ids = _with_workers(scene)
  process.strike(number, ids[-1:])
  ended = scene.finish(process, Expected((0, REFUSED)))
  if ended.code == REFUSED:
    if told(ended, r"(?i)worker") is None:
      scene.add(Outcome.WRONG, f"no word of a worker: {scene.message}")
    saved, taken = runs.newest(scene.folder / "run"), runs.steps_taken(process.text)
    if saved < taken:
      scene.add(Outcome.LOST, f"step {taken} was taken, {saved} is saved")
  runs.restart(scene, TWO)


def orphaned(scene: Scene) -> None:
  """kill -9 of the run alone: its workers end, too."""
  process, ids = _with_workers(scene)
  _leave_alone(scene, process, ids)


def orphaned_while_frozen(scene: Scene) -> None:
  """The same of workers that are stopped and continue after their parent's end."""
  process, ids = _with_workers(scene)
  process.strike(signal.SIGSTOP, ids)
  _leave_alone(scene, process, ids, woken=True)


def _leave_alone(scene: Scene, process: Process, ids: list[int], *, woken: bool = False) -> None:
  process.strike(signal.SIGKILL)
  deadline = time.monotonic() + scene.patient(ORPHANS_LIVE)
  while not process.ended():
    time.sleep(0.01)
  if woken:
    subprocess.run(["kill", "-CONT", *map(str, filter(lives, ids))], check=False)
  while any(map(lives, ids)):
    if time.monotonic() > deadline:
      left = sum(map(lives, ids))
      scene.add(
        Outcome.HUNG,
        f"{left} workers of {len(ids)} live {scene.patient(ORPHANS_LIVE):.0f} s after it",
      )
      break
    time.sleep(0.05)
  scene.seconds = time.monotonic() - process.struck
  scene.message = f"{len(ids)} workers ended after it"


def no_shared_memory(scene: Scene) -> None:
  """/dev/shm has 64 kB: one line, or the batches go another way."""
  unshared = shutil.which("unshare") and subprocess.run(["unshare", "-m", "true"], check=False)
  if not unshared or unshared.returncode:
    raise NotRun("there are no mount namespaces here")
  large = {**TWO, "model.vision.image_size": "(384, 384)", "model.vision.patch_size": 16}
  own = ("unshare", "-m", *shell("mount -t tmpfs -o size=64k tmpfs /dev/shm"))
  process = runs.start(scene, large, wrapped=own)
  says = r"(?i)shared memory|/dev/shm|100%"
  scene.finish(process, Expected((0, REFUSED), says=says, within=150))


def _with_workers(scene: Scene) -> tuple[Process, list[int]]:
  """Returns a run that has taken four steps, and its workers."""
  runs.reference(scene.lab)
  process = runs.start(scene, {**TWO, "train.stall_seconds": STALL})
  process.wait_for(r"^step +4/")
  ids = [pid for pid in process.children() if PIECE in _command(pid)]
  if len(ids) != TWO["data.num_workers"]:
    raise RuntimeError(f"{len(ids)} workers were found")
  return process, ids


def _command(pid: int) -> str:
  try:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
      return file.read().decode(errors="replace")
  except OSError:
    return ""

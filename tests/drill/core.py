# SPDX-License-Identifier: Apache-2.0
"""What a fault is, what must come of it, and what came of it."""

import contextlib
import dataclasses
import enum
import os
import pathlib
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tests.drill.process import ROOT, Ended, Missed, Process, last_line

ATTEMPTS = 3  # at a fault whose moment was missed
CRASHED = re.compile(r"^(Traceback \(most recent call last\)|Fatal Python error)", re.MULTILINE)
ERROR = "error: "  # begins the one line that a user's mistake is told in
# A program that needs more is wrong: it must not take the whole machine.
MOST_GB = 12


class Outcome(enum.StrEnum):
  """What came of a fault, the worst first."""

  HUNG = "HUNG"  # over its bound
  LOST = "LOST"  # what was saved is gone, or the run's end is another one
  WRONG = "WRONG"  # another exit code or message than expected, or none
  TRACEBACK = "TRACEBACK"
  MISSED = "MISSED"  # its moment never came, in several attempts
  NOT_RUN = "not run"  # this machine cannot
  GOOD = "good"

  @property
  def fails(self) -> bool:
    return self not in (Outcome.NOT_RUN, Outcome.GOOD)


class NotRun(Exception):
  """This machine lacks what a fault needs."""


@dataclasses.dataclass(frozen=True)
class Expected:
  """How a program has to end.

  Attributes:
    codes: any of these exit codes.
    says: a pattern that a line of the output has; of an exit code 1, the line that begins "error:".
    within: seconds from the blow.
    most_gb: of memory.
  """

  codes: tuple[int, ...] = (0,)
  says: str = ""
  within: float = 60
  most_gb: float = MOST_GB


REFUSED = 1  # exit code of a user's mistake


def judge(ended: Ended, expected: Expected) -> list[tuple[Outcome, str]]:
  """Returns what is wrong with a program's end: pairs of outcome and reason; [] if nothing is."""
  if ended.code is None:
    return [(Outcome.HUNG, f"still there after {expected.within:.0f} s: {last_line(ended.text)}")]
  problems = []
  if crashed := CRASHED.search(ended.text) is not None:
    problems.append((Outcome.TRACEBACK, said(ended)))
  if ended.code not in expected.codes:
    wanted = " or ".join(map(str, expected.codes))
    problems.append((Outcome.WRONG, f"exit code {ended.code}, not {wanted}: {said(ended)}"))
  if ended.code == REFUSED and not crashed:
    lines = [line for line in ended.text.splitlines() if line.startswith(ERROR)]
    if len(lines) != 1:
      problems.append((Outcome.WRONG, f"{len(lines)} lines begin '{ERROR}': {lines[:2]}"))
  silent = expected.says and told(ended, expected.says) is None
  if silent and ended.code in expected.codes and not crashed:
    problems.append((Outcome.WRONG, f"no line says '{expected.says}': {said(ended)}"))
  if ended.seconds > expected.within:
    problems.append((Outcome.HUNG, f"ended {ended.seconds:.0f} s after the blow"))
  if ended.peak_gb > expected.most_gb:
    problems.append(
      (Outcome.WRONG, f"took {ended.peak_gb:.2f} GB, of {expected.most_gb:.2f} at most")
    )
  return problems


def said(ended: Ended) -> str:
  """Returns the line of the error, or else the last one."""
  lines = [line for line in ended.text.splitlines() if line.startswith(ERROR)]
  return lines[0] if lines else last_line(ended.text)


def told(ended: Ended, says: str) -> str | None:
  """Returns the first line that has the pattern; of a refused one, the error's line alone."""
  lines = ended.text.splitlines()
  if ended.code == REFUSED:
    lines = [line for line in lines if line.startswith(ERROR)]
  return next((line for line in lines if re.search(says, line)), None)


def shell(text: str) -> tuple[str, ...]:
  """Returns what runs a command line, such as "ulimit -f 100", before a program, in its process."""
  return "bash", "-c", f'{text} && exec "$@"', "bash"


class Lab:
  """What all faults share: the environment of programs, and what is made once.

  Args:
    folder: for all of it.
    patience: what bounds in seconds are multiplied with, on a machine with much other work.
  """

  def __init__(self, folder: pathlib.Path, patience: float = 1.0):
    self.folder, self.patience = folder, patience
    folder.mkdir(parents=True, exist_ok=True)
    self.env = {name: text for name, text in os.environ.items() if name != "XLA_FLAGS"} | {
      "JAX_PLATFORMS": "cpu",
      "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
      "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
      "MM1_JAX_CACHE": str(folder / "cache"),
      "XLA_FLAGS": "--xla_backend_optimization_level=0",  # tiny programs: compile fast
      "TF_CPP_MIN_LOG_LEVEL": "2",
      "PYTHONUNBUFFERED": "1",
      "PYTHONPATH": str(ROOT),
      "OMP_NUM_THREADS": "1",
    }
    self._processes: list[Process] = []
    self._closed = False
    self._made: dict[str, Any] = {}
    self._making: dict[str, threading.Lock] = {}
    self._lock = threading.Lock()

  def once(self, name: str, make: Callable[[pathlib.Path], Any]) -> Any:
    """Returns what `make` returned of a folder, which it is called with the first time."""
    with self._lock:
      making = self._making.setdefault(name, threading.Lock())
    with making:
      if name not in self._made:
        self._made[name] = make(self.folder / name)
      return self._made[name]

  def start(
    self,
    command: Sequence[str],
    log: pathlib.Path,
    env: Mapping[str, str | None] | None = None,
    cwd: pathlib.Path = ROOT,
  ) -> Process:
    """Starts a program in the drill's environment, with variables of its own; None unsets one."""
    with self._lock:
      if self._closed:
        raise Missed("the drill was stopped")
      variables = {name: text for name, text in {**self.env, **(env or {})}.items() if text}
      process = Process(list(command), log, variables, cwd)
      process.patience = self.patience
      self._processes.append(process)
    return process

  def close(self) -> None:
    """Kills all programs; no other one is started."""
    with self._lock:
      self._closed = True
      for process in self._processes:
        process.kill()

  def faults_folder(self, fault: "Fault") -> pathlib.Path:
    return self.folder / "faults" / fault.name.replace("/", "-")

  def forget(self, name: str) -> None:
    """Lets what was made be made again."""
    with self._lock:
      self._made.pop(name, None)


class Scene:
  """One attempt at a fault: its folder, its dice, its programs, and what was found.

  Args:
    lab: what it shares with others.
    folder: its own, empty.
    dice: the same for a name and a seed.
  """

  def __init__(self, lab: Lab, folder: pathlib.Path, dice: random.Random):
    self.lab, self.folder, self.dice = lab, folder, dice
    self.problems: list[tuple[Outcome, str]] = []
    self.seconds: float | None = None  # from the blow until it was told, or the program had ended
    self.message = ""
    self.kept: bool | None = None  # whether all that was saved is there; None: nothing was at stake
    self._processes: list[Process] = []
    folder.mkdir(parents=True)

  def start(
    self,
    *command: str,
    env: Mapping[str, str | None] | None = None,
    wrapped: Sequence[str] = (),
    cwd: pathlib.Path = ROOT,
  ) -> Process:
    """Starts a Python module, by way of the command `wrapped`: see `shell`."""
    full = [*wrapped, sys.executable, "-m", *command]
    log = self.folder / f"{len(self._processes)}.log"
    process = self.lab.start(full, log, env, cwd)
    self._processes.append(process)
    return process

  def finish(self, process: Process, expected: Expected, *, shown: bool = True) -> Ended:
    """Waits for a program's end, judges it, and takes its time and message for the table."""
    expected = dataclasses.replace(expected, within=self.patient(expected.within))
    ended = process.end(expected.within)
    self.problems += judge(ended, expected)
    if shown:
      self.seconds = ended.seconds
      self.message = (expected.says and told(ended, expected.says)) or said(ended)
    return ended

  def patient(self, seconds: float) -> float:
    """Returns a bound as this machine has it."""
    return seconds * self.lab.patience

  def add(self, outcome: Outcome, why: str) -> None:
    self.problems.append((outcome, why))

  def keeps(self, differences: list[str]) -> None:
    """Takes how what was saved differs from what it should be; [] is not at all."""
    self.kept = not differences and self.kept is not False
    if differences:
      self.add(Outcome.LOST, "; ".join(differences))

  def close(self) -> None:
    for process in self._processes:
      process.kill()


@dataclasses.dataclass(frozen=True)
class Fault:
  """A fault.

  Attributes:
    name: SUBJECT/WHAT, as `--only` has it.
    strike: injects it, and gives the scene what it found.
    quick: part of `--quick`.
    whole: part of the whole drill; not, where it is a smaller one of another fault.
    turn: faults of one turn run one after the other, in their order.
  """

  name: str
  strike: Callable[[Scene], None]
  quick: bool = False
  whole: bool = True
  turn: str | None = None


@dataclasses.dataclass(frozen=True)
class Row:
  """A line of the table."""

  fault: str
  outcome: Outcome
  lost: str  # "no", "yes", or "-" where nothing was at stake
  seconds: float | None
  message: str
  took: float


def inject(fault: Fault, lab: Lab, seed: int) -> Row:
  """Returns what came of a fault; one whose moment was missed is tried again."""
  begun, missed = time.monotonic(), ""
  for attempt in range(ATTEMPTS):
    dice = random.Random(f"{seed} {fault.name} {attempt}")
    folder = lab.faults_folder(fault) / str(attempt)
    scene = Scene(lab, folder, dice)
    try:
      with contextlib.closing(scene):
        fault.strike(scene)
    except Missed as e:
      missed = str(e)
      continue
    except NotRun as e:
      return Row(fault.name, Outcome.NOT_RUN, "-", None, str(e), time.monotonic() - begun)
    except Exception as e:  # one broken fault must not end the drill
      scene.add(Outcome.WRONG, f"the fault itself failed: {type(e).__name__}: {e}")
    return _row(fault, scene, time.monotonic() - begun)
  return Row(fault.name, Outcome.MISSED, "-", None, missed, time.monotonic() - begun)


def _row(fault: Fault, scene: Scene, took: float) -> Row:
  lost = "-" if scene.kept is None else "no" if scene.kept else "yes"
  order = list(Outcome)
  problems = sorted(scene.problems, key=lambda problem: order.index(problem[0]))
  outcome = problems[0][0] if problems else Outcome.GOOD
  message = "; ".join(why for _, why in problems) or scene.message
  return Row(fault.name, outcome, lost, scene.seconds, message, took)

# SPDX-License-Identifier: Apache-2.0
"""A program that a fault befalls: started, watched, struck, ended."""

import contextlib
import os
import pathlib
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).parents[2]
POLL = 0.005  # seconds


class Missed(Exception):
  """The moment of a fault did not come: the program had ended before, or never reached it."""


class Ended(NamedTuple):
  """How a program ended."""

  code: int | None  # minus the signal that it died of; None: it was still there after its bound
  text: str  # of its output and errors together
  seconds: float  # since it was struck, or else since its start
  peak_gb: float  # of its resident memory; not of its children's


def last_line(text: str) -> str:
  lines = [line for line in text.splitlines() if line.strip()]
  return lines[-1].strip() if lines else "(nothing)"


class Process:
  """A program at work in a session of its own; what it prints goes to a file."""

  def __init__(self, command: list[str], log: pathlib.Path, env: Mapping[str, str], cwd=ROOT):
    self.log, self._file = log, log.open("wb")
    self.patience = 1.0  # what bounds of moments are multiplied with
    self.begun = self.struck = time.monotonic()
    self._popen = subprocess.Popen(
      command,
      cwd=cwd,
      env=dict(env),
      stdin=subprocess.DEVNULL,
      stdout=self._file,
      stderr=subprocess.STDOUT,
      start_new_session=True,
    )
    self.pid = self._popen.pid
    self._status: tuple[int, float] | None = None  # code, when
    self._peak_gb = 0.0
    self._killing = threading.Lock()

  @property
  def text(self) -> str:
    return self.log.read_text(errors="replace")

  def ended(self) -> bool:
    """Returns whether it has; it is a zombie until `kill`, so that its number is no other's."""
    if self._status is None:
      self._peak_gb = max(self._peak_gb, _peak_gb(self.pid))
      found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
      if found is not None:
        killed = found.si_code != os.CLD_EXITED
        self._status = -found.si_status if killed else found.si_status, time.monotonic()
    return self._status is not None

  def wait_for(self, moment: str | Callable[[], Any], within: float = 180) -> None:
    """Returns when a line has the pattern, or the call is true; raises Missed if it never is."""
    deadline = time.monotonic() + within * self.patience
    pattern = re.compile(moment, re.MULTILINE) if isinstance(moment, str) else None
    while not (pattern.search(self.text) if pattern else moment()):  # pyright: ignore
      if self.ended():
        raise Missed(f"it had ended: {last_line(self.text)}")
      if time.monotonic() > deadline:
        raise Missed(f"{within:.0f} s, and not yet: {last_line(self.text)}")
      time.sleep(POLL)

  def strike(self, number: signal.Signals, pids: Iterable[int] = ()) -> None:
    """Sends a signal to the program, or else to `pids`; raises Missed if it has ended."""
    if self.ended():
      raise Missed(f"it had ended: {last_line(self.text)}")
    self.struck = time.monotonic()
    for pid in pids or (self.pid,):
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)

  def end(self, within: float = 60) -> Ended:
    """Waits for the end, for so long since the blow; then all of its session are killed."""
    while not self.ended() and time.monotonic() < self.struck + within:
      time.sleep(POLL)
    hung = not self.ended()
    self.kill()
    assert self._status is not None
    code, at = self._status
    return Ended(None if hung else code, self.text, at - self.struck, self._peak_gb)

  def kill(self) -> None:
    """Kills the program and what is left of its session."""
    with self._killing:
      if self._popen.returncode is not None:
        return  # by now the number may be another program's
      os.killpg(self.pid, signal.SIGKILL)
      while not self.ended():
        time.sleep(POLL)
      self._popen.wait()
      self._file.close()

  def children(self) -> list[int]:
    """Returns the processes that it has started, and theirs."""
    parents = dict(_parents())
    found = [self.pid]
    for pid in found:
      found += [child for child, parent in parents.items() if parent == pid]
    return found[1:]


def _peak_gb(pid: int) -> float:
  """Returns the most memory that a process has had; of one that has ended, 0.

  What the system tells of its children at their end has the memory of their parent in it.
  """
  try:
    text = pathlib.Path(f"/proc/{pid}/status").read_text()
  except OSError:
    return 0.0
  found = re.search(r"^VmHWM:\s+(\d+) kB", text, re.MULTILINE)
  return int(found[1]) / 1e6 if found else 0.0


def _parents() -> Iterator[tuple[int, int]]:
  for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
    with contextlib.suppress(OSError):
      yield int(path.parent.name), int(path.read_text().rsplit(")", 1)[1].split()[1])


def lives(pid: int) -> bool:
  """Returns whether there is such a process, and it is no zombie."""
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
  except OSError:
    return False

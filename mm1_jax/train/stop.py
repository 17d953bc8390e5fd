# SPDX-License-Identifier: Apache-2.0
"""How a run is told to stop: by a signal to any of its processes, at any time.

Imports no JAX, so that signals are taken before the seconds that it needs.
"""

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from jax.sharding import Mesh

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LOOK_SECONDS = 1.0  # between looks at the clock
SAY_SECONDS = 2.0
AGAIN_SECONDS = 1.0  # a signal to a process and to its group may come twice

Leave = Callable[[str], None]  # says why, and ends the process


class Stopped(Exception):
  """The run was asked to stop while something was made or measured that the stop does not need."""


class Stop:
  """Turns SIGTERM, SIGHUP and Ctrl-C into a request to stop; a second one is not caught any more.

  A thread takes the signals, as Python's own handlers wait until the main thread returns from the
  device or the disk. Until `begin_steps`, when there is nothing to save, a signal ends the process
  at once, if a way is given. SIGHUP is left ignored where it is, as under nohup.

  Attributes:
    requested: the signal that this process was sent.
    at: when, by `time.monotonic()`.
    votes: processes that had been sent one, by the newest sum over all.
    leave: ends the process at once; None where it is not this object's to end.
    left_out: whether the run ended before all was measured that was due.
    stuck: what does not end though the run has; the process must not wait for it.
    look: called about every second, by the thread.
  """

  def __init__(self, leave: Leave | None = None):
    self.requested: str | None = None
    self.at: float | None = None
    self.votes = 0.0
    self.leave = leave
    self.left_out = False
    self.stuck: str | None = None
    self.look: Callable[[], None] | None = None
    self._starting = True
    self._polled = None

  @property
  def agreed(self) -> bool:
    """Whether to stop: the same on all processes, as each of them must take the same steps."""
    return self.votes > 0 if _process_count() > 1 else self.requested is not None

  def begin_steps(self) -> None:
    """From now on a signal waits until the step is saved."""
    self._starting = False

  def poll(self, mesh: "Mesh") -> bool:
    """Returns whether to stop, between the batches of an evaluation.

    The same on all processes, which must call it alike: of several it returns what they had said at
    the call before, so that no device waits for it.
    """
    if _process_count() == 1:
      return self.requested is not None
    import numpy as np

    from mm1_jax.distributed import sum_over_processes

    mine = np.array([self.requested is not None], np.float32)
    before, self._polled = self._polled, sum_over_processes(mine, mesh)
    if before is not None:
      self.votes = max(self.votes, float(np.asarray(before)[0]))
    return self.votes > 0

  def __enter__(self) -> "Stop":
    self._wake, self._woken = socket.socketpair()
    self._wake.setblocking(False)
    taken = [s for s in SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
    self._wakeup = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
    self._handlers = {s: signal.signal(s, self._handle) for s in taken}
    self._done = threading.Event()
    self._thread = threading.Thread(target=self._run, name="stop", daemon=True)
    self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._done.set()
    self._restore()
    signal.set_wakeup_fd(self._wakeup)
    self._wake.close()  # the thread reads the end
    self._thread.join(LOOK_SECONDS)
    self._woken.close()

  def _restore(self) -> None:
    for number, handler in self._handlers.items():
      signal.signal(number, handler)

  def _handle(self, number: int, _) -> None:
    self._request(number)
    self._restore()

  def _request(self, number: int) -> None:
    if self.requested is None:
      self.at = time.monotonic()
      self.requested = signal.Signals(number).name
    if self._starting and self.leave:
      self.leave(f"stopped by {self.requested} while starting: nothing is lost, run again")

  def _again(self, number: int) -> None:
    """Takes a signal though one was taken, so the main thread does not come to handle it."""
    if self.leave and self.at and time.monotonic() - self.at > AGAIN_SECONDS:
      self.leave(f"stopped by a second {signal.Signals(number).name}: not saved")

  def _run(self) -> None:
    while not self._done.is_set():
      if select.select([self._woken], [], [], LOOK_SECONDS)[0]:
        for number in self._woken.recv(64):
          if number in self._handlers:
            (self._again if self.requested else self._request)(number)
      if self.look and not self._done.is_set():
        self.look()


def _process_count() -> int:
  jax = sys.modules.get("jax")
  return jax.process_count() if jax else 1


def leave(reason: str, code: int) -> None:
  """Says why, and ends this process: for one whose run has not met others yet."""
  say = threading.Thread(target=print, args=(reason,), kwargs={"file": sys.stderr, "flush": True})
  say.daemon = True
  say.start()
  say.join(SAY_SECONDS)  # nothing may read what is written
  os._exit(code)

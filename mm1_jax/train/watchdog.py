# SPDX-License-Identifier: Apache-2.0
"""The watchdog: tells what a run waits for, and ends one that was told to stop and cannot."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from absl import logging

from mm1_jax.train.stop import Stop

LONG_STEPS = 3  # times the longest step, that a step may take before it counts as hanging
TELL_SECONDS = 2.0
SAVE_STALLS = 8  # times `stall_seconds`, that a save has where no signal was sent


class Watchdog:
  """Is told what the main thread waits for; another thread calls `look` about every second.

  Nothing here waits: `progress` and `waiting` assign attributes.

  - No progress for `stall_seconds`: a warning names the last step and what is waited for. It comes
    again after as long.
  - A signal to stop, and no progress since for `stop_seconds`, or for three times the longest step
    so far if that is more: the process ends, with the stopped code.
  - Waiting for a save has `stall_seconds` after a signal, else eight times as long.
  """

  def __init__(
    self,
    stop: Stop,
    *,
    stall_seconds: float,
    stop_seconds: float,
    where: str = "",
    clock: Callable[[], float] = time.monotonic,
  ):
    """Begins to watch.

    Args:
      stop: asked for signals; its `leave` ends the process, without it this only tells.
      stall_seconds: `train.stall_seconds`.
      stop_seconds: `train.stop_seconds`.
      where: in front of what is said: the process, of several.
      clock: seconds.
    """
    self._stop, self._stall, self._grace, self._where = stop, stall_seconds, stop_seconds, where
    self._clock = clock
    self._step, self._stepped, self._longest = 0, False, 0.0
    self._since = self._told = clock()  # the newest progress, and when it was last told
    self._what, self._saving = "the start", False

  def begin(self, step: int) -> None:
    """Notes that steps begin, after this one."""
    self._step = step
    self.progress()

  def progress(self, step: int | None = None) -> None:
    """Notes that something was done: a step, whose number is given, or a part of an evaluation."""
    now = self._clock()
    if step is not None:
      if self._stepped:  # the first one of a command is longer
        self._longest = max(self._longest, now - self._since)
      self._step, self._stepped = step, True
    self._since = self._told = now

  @contextlib.contextmanager
  def waiting(self, what: str, *, saving: bool = False) -> Iterator[None]:
    """Says what the block waits for, such as "the next batch"."""
    before = self._what, self._saving
    self._what, self._saving = what, saving
    if saving:
      self.progress()
    try:
      yield
    finally:
      self._what, self._saving = before

  def look(self) -> None:
    """Compares the clock; tells, or ends the process."""
    now = self._clock()
    still = now - self._since
    bound = self._bound()
    if self._stop.leave and bound is not None and still > bound:
      signal = self._stop.requested
      self._stop.leave(
        f"{self._where}{f'stopped by {signal}' if signal else 'ended'}, without a save of step "
        f"{self._step}: waited {still:.0f} s for {self._what}; run again to continue from the "
        "newest checkpoint"
      )
    if now - self._told >= self._stall:
      self._told = now
      _warn(
        f"{self._where}no progress for {still:.0f} s since step {self._step}, waiting for "
        f"{self._what}"
      )

  def _bound(self) -> float | None:
    """Returns the seconds without progress after which the process has to end, if any."""
    if self._saving:
      return self._stall * (1 if self._stop.at else SAVE_STALLS)
    if self._stop.at is None:
      return None
    # From the signal on, not from progress before it.
    late = max(0.0, self._stop.at - self._since)
    return late + max(self._grace, LONG_STEPS * self._longest)


def _warn(text: str) -> None:
  """Logs it, in a thread: where nothing reads what is written, that would hold up the watch."""
  thread = threading.Thread(target=logging.warning, args=("%s", text), daemon=True)
  thread.start()
  thread.join(TELL_SECONDS)

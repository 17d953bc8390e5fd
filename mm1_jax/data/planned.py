# SPDX-License-Identifier: Apache-2.0
"""Random access to what is planned: the pieces of each row of each batch, for one process."""

import collections
import threading
from typing import NamedTuple

from mm1_jax.data.mixing import Mixer, Row, WindowState

ENDLESS = 1 << 40  # batches


class PlannedRow(NamedTuple):
  """One row to make."""

  row: Row
  next_window: WindowState | None  # in the last row of a batch: what the next one is planned from
  place: tuple[int, int]  # number of its batch, and in it


class PlannedBatches:
  """Random access to the pieces of batches `first`, `first + 1`, ...; rows of one process.

  Each window follows from the one before, so the next one is cheap, while access before the two
  latest windows plans again from the beginning. Pickles without what it has planned.
  """

  def __init__(self, mixer: Mixer, state: WindowState, first: int, rows: range):
    self._mixer = mixer
    self._first = first
    self._rows = rows
    self._base = state
    self._reset()

  def _reset(self) -> None:
    self._lock = threading.Lock()
    # The two latest windows, each with its state and the next one's.
    self._windows: collections.deque[tuple[list[Row], WindowState, WindowState]]
    self._windows = collections.deque(maxlen=2)

  def __len__(self) -> int:
    return ENDLESS

  def __getitem__(self, index: int) -> tuple[list[Row], WindowState]:
    """Returns this process's rows of batch `first + index`, and the state for the one after it."""
    batch = self._first + index
    rows, state, after = self._window(batch)
    start = (batch - state.batch) * self._mixer.batch_size
    return [rows[start + r] for r in self._rows], after if batch + 1 == after.batch else state

  def _window(self, batch: int) -> tuple[list[Row], WindowState, WindowState]:
    """Returns the rows of the window that has a batch, its state, and the next one's."""
    with self._lock:
      if self._windows and batch < self._windows[0][1].batch:
        self._windows.clear()
      while not self._windows or self._windows[-1][2].batch <= batch:
        state = self._windows[-1][2] if self._windows else self._base
        rows, after = self._mixer.window(state)
        self._windows.append((rows, state, after))
      return next(window for window in self._windows if batch < window[2].batch)

  def __getstate__(self):
    return self._mixer, self._base, self._first, self._rows

  def __setstate__(self, state):
    self._mixer, self._base, self._first, self._rows = state
    self._reset()


class PlannedRows:
  """The rows of planned batches one by one; the last of a batch with the state for the next batch.

  A thread makes one row at a time: the first batch is ready after the time of a few rows, and
  memory does not grow with the number of workers.
  """

  def __init__(self, batches: PlannedBatches, num_rows: int):
    self._batches = batches
    self._num_rows = num_rows

  def __len__(self) -> int:
    return len(self._batches) * self._num_rows

  def __getitem__(self, index: int) -> PlannedRow:
    batch, row = divmod(index, self._num_rows)
    rows, state = self._batches[batch]
    return PlannedRow(rows[row], state if row == self._num_rows - 1 else None, (batch, row))

# SPDX-License-Identifier: Apache-2.0
"""How a run is told to stop: by a signal to any of its processes, after the current step."""

import signal

import jax


class Stop:
  """Turns SIGTERM and Ctrl-C into a request to stop; a second one is not caught any more.

  Attributes:
    requested: the signal that this process was sent.
    votes: processes that had been sent one, by the newest sum over all.
  """

  def __init__(self):
    self.requested: str | None = None
    self.votes = 0.0

  @property
  def agreed(self) -> bool:
    """Whether to stop: the same on all processes, as each of them must take the same steps."""
    return self.votes > 0 if jax.process_count() > 1 else self.requested is not None

  def __enter__(self) -> "Stop":
    self._handlers = {s: signal.signal(s, self._request) for s in (signal.SIGTERM, signal.SIGINT)}
    return self

  def __exit__(self, *_) -> None:
    for number, handler in self._handlers.items():
      signal.signal(number, handler)

  def _request(self, number: int, _) -> None:
    self.requested = signal.Signals(number).name
    for s, handler in self._handlers.items():
      signal.signal(s, handler)

# SPDX-License-Identifier: Apache-2.0
"""The watchdog, on a clock that the tests set."""

import signal

import pytest

from mm1_jax.train.stop import Stop
from mm1_jax.train.watchdog import Watchdog


class Watched:
  """A watchdog of 100 s, and 20 s after a signal; `left` are the reasons it gave to end."""

  def __init__(self):
    self.now, self.left = 0.0, []
    self.stop = Stop(self.left.append)
    self.dog = Watchdog(self.stop, stall_seconds=100, stop_seconds=20, clock=lambda: self.now)

  def pass_by(self, seconds: float) -> None:
    """Looks once a second."""
    for _ in range(int(seconds)):
      self.now += 1
      self.dog.look()

  def signal(self) -> None:
    self.stop.requested, self.stop.at = signal.SIGTERM.name, self.now

  def steps(self, num: int, seconds: float) -> None:
    for step in range(1, num + 1):
      self.pass_by(seconds)
      self.dog.progress(step)


@pytest.fixture
def watched():
  return Watched()


def told(caplog) -> list[str]:
  return [record.getMessage() for record in caplog.records]


def test_what_is_waited_for_is_told_again_and_again(watched, caplog):
  watched.steps(3, 5)
  with watched.dog.waiting("the next batch"):
    watched.pass_by(99)
    assert told(caplog) == []
    watched.pass_by(101)
  assert told(caplog) == [
    "no progress for 100 s since step 3, waiting for the next batch",
    "no progress for 200 s since step 3, waiting for the next batch",
  ]
  assert watched.left == []


def test_steps_and_batches_of_evaluations_are_progress(watched, caplog):
  with watched.dog.waiting("the evaluation 'held out'"):
    for _ in range(10):
      watched.pass_by(60)
      watched.dog.progress()
  assert told(caplog) == []


def test_after_a_signal_it_ends_a_run_that_hangs(watched):
  watched.steps(3, 5)
  with watched.dog.waiting("the devices"):
    watched.pass_by(50)
    watched.signal()
    watched.pass_by(20)
    assert watched.left == []
    watched.pass_by(1)
  assert watched.left == [
    "stopped by SIGTERM, without a save of step 3: waited 71 s for the devices; run again to "
    "continue from the newest checkpoint"
  ]


def test_slow_steps_are_not_taken_for_hanging(watched):
  """Nor is the first one, which is slower, taken for how long they are."""
  watched.dog.begin(10)
  watched.pass_by(500)
  watched.dog.progress(11)
  for step in (12, 13):
    watched.pass_by(60)
    watched.dog.progress(step)
  watched.signal()
  watched.pass_by(180)
  assert watched.left == []
  watched.pass_by(1)
  assert len(watched.left) == 1


def test_the_last_save_has_longer_but_not_for_ever(watched):
  watched.steps(3, 5)
  watched.signal()
  with watched.dog.waiting("the last save", saving=True):
    watched.pass_by(100)
    assert watched.left == []
    watched.pass_by(1)
  assert "waited 101 s for the last save" in watched.left[0]


def test_the_last_save_of_a_run_that_was_not_signalled_ends_too(watched, caplog):
  with watched.dog.waiting("the last save", saving=True):
    watched.pass_by(800)
    assert watched.left == []
    watched.pass_by(1)
  assert watched.left[0].startswith("ended, without a save of step 0: waited 801 s")
  assert len(told(caplog)) == 8


def test_without_a_way_to_end_it_only_tells(watched, caplog):
  watched.stop.leave = None
  watched.signal()
  watched.pass_by(101)
  assert len(told(caplog)) == 1

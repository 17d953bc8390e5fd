# SPDX-License-Identifier: Apache-2.0
"""Goodput: where the time of made-up runs went, second by second."""

import dataclasses
import json
import pathlib

import pytest

from mm1_jax import metrics
from mm1_jax.goodput import Goodput, read_goodput


def write(workdir: pathlib.Path, *lines: tuple) -> None:
  """Adds lines to a workdir's log, each `(time, step, content)`."""
  with (workdir / metrics.FILE).open("a") as file:
    for time, step, content in lines:
      file.write(json.dumps({"time": time, "step": step, **content}) + "\n")


def resumed(launched: float) -> dict:
  return {"resumed": True, "launched": launched}


FIRST = {"event": "first step"}
NUMBERS = {"values": {"loss": 1.0}}


def saved(seconds: float) -> dict:
  return {"event": "saved", "seconds": seconds}


def evaluated(seconds: float) -> dict:
  return {"event": "evaluated", "name": "held out", "seconds": seconds}


def ended(*, done: bool) -> dict:
  return {"event": "ended", "done": done}


def spent(workdir: pathlib.Path) -> Goodput:
  found = read_goodput(workdir)
  assert found
  return found


def test_nothing_was_written(tmp_path):
  assert read_goodput(tmp_path) is None


def test_one_command(tmp_path):
  write(
    tmp_path,
    (130, 0, resumed(100)),
    (150, 1, FIRST),
    (150, 1, NUMBERS),
    (210, 10, saved(4)),
    (240, 10, evaluated(30)),
    (300, 20, NUMBERS),
    (303, 20, saved(1)),
    (303, 20, ended(done=True)),
  )
  assert spent(tmp_path) == Goodput(1, 118, 50, 5, 30, 0, 0)
  assert spent(tmp_path).total == 203
  assert spent(tmp_path).share == pytest.approx(118 / 203)
  assert str(spent(tmp_path)) == (
    "goodput 58%: 1m58s of training in 3m23s and 1 command (starting 50s, saving 5s, evaluating "
    "30s, retaken 0s, down 0s)"
  )


def test_killed_and_resumed(tmp_path):
  """The steps after the save are lost; so is the evaluation among them."""
  write(
    tmp_path,
    (0, 0, resumed(0)),
    (10, 1, FIRST),
    (50, 10, saved(2)),
    (70, 15, evaluated(5)),
    (80, 16, NUMBERS),  # kill -9
    (120, 10, resumed(100)),
    (130, 11, FIRST),
    (170, 20, saved(3)),
    (175, 20, ended(done=False)),
    (190, 20, resumed(185)),
    (200, 21, FIRST),
    (210, 22, NUMBERS),
  )
  assert spent(tmp_path) == Goodput(
    commands=3,
    training=38 + (45 - 3) + 10,
    starting=10 + 30 + 15,
    saving=2 + 3,
    evaluating=0,
    retaken=30,
    down=20 + 10,
  )
  assert spent(tmp_path).total == 210


def test_a_checkpoint_before_the_newest_takes_two_commands_back(tmp_path):
  write(
    tmp_path,
    (0, 0, resumed(0)),
    (10, 1, FIRST),
    (20, 5, saved(0)),
    (30, 10, saved(0)),
    (40, 10, resumed(30)),
    (50, 11, FIRST),
    (60, 15, saved(0)),
    (70, 5, resumed(60)),
    (80, 6, FIRST),
    (90, 9, NUMBERS),
  )
  found = spent(tmp_path)
  assert (found.training, found.retaken, found.starting) == (10 + 0 + 10, 10 + 10, 10 + 20 + 20)
  assert found.total == 90


def test_a_command_that_was_killed_while_starting(tmp_path):
  write(tmp_path, (20, 0, resumed(0)), (50, 0, resumed(30)), (60, 1, FIRST), (70, 2, NUMBERS))
  assert dataclasses.astuple(spent(tmp_path)) == (2, 10, 20 + 30, 0, 0, 0, 10)


def test_an_evaluation_before_the_first_step_is_no_start(tmp_path):
  write(tmp_path, (20, 5, resumed(0)), (50, 5, evaluated(25)), (60, 6, FIRST), (70, 7, NUMBERS))
  assert dataclasses.astuple(spent(tmp_path)) == (1, 10, 35, 0, 25, 0, 0)


def test_the_time_after_a_run_is_done_is_not_its_own(tmp_path):
  """A run that is made longer a week later was not down meanwhile."""
  write(tmp_path, (1, 0, resumed(0)), (2, 1, FIRST), (9, 9, saved(0)), (9, 9, ended(done=True)))
  write(tmp_path, (600_001, 9, resumed(600_000)), (600_002, 10, FIRST), (600_012, 19, NUMBERS))
  assert spent(tmp_path).total == 9 + 12


def test_a_log_without_events_counts_from_its_first_numbers(tmp_path):
  write(tmp_path, (5, 0, {"resumed": True}), (15, 1, NUMBERS), (25, 2, NUMBERS))
  assert dataclasses.astuple(spent(tmp_path)) == (1, 10, 10, 0, 0, 0, 0)

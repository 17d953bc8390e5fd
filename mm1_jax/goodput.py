# SPDX-License-Identifier: Apache-2.0
"""Where a run's time went, over all its commands: the log of its workdir read back.

A step counts as productive if its work was kept: what was trained after the checkpoint that the
next command resumed from was lost, and was trained again.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Any

from etils import epath

from mm1_jax.metrics import format_seconds, read_lines


@dataclasses.dataclass(frozen=True)
class Goodput:
  """Seconds of a run by what they were spent on; `total` is their sum."""

  commands: int
  training: float  # steps that were kept
  starting: float  # from a command to the end of its first step: imports, data, restore, compiling
  saving: float  # while training waited
  evaluating: float
  retaken: float  # lost with the steps after the checkpoint that was resumed from
  down: float  # between a command that was stopped or killed and the next

  @property
  def total(self) -> float:
    parts = dataclasses.asdict(self)
    return sum(seconds for name, seconds in parts.items() if name != "commands")

  @property
  def share(self) -> float:
    """Productive time over all time."""
    return self.training / self.total if self.total > 0 else 0.0

  def __str__(self) -> str:
    spent = ", ".join(
      f"{name} {format_seconds(seconds)}"
      for name, seconds in dataclasses.asdict(self).items()
      if name not in ("commands", "training")
    )
    times = f"{self.commands} command{'s' * (self.commands > 1)}"
    return (
      f"goodput {self.share:.0%}: {format_seconds(self.training)} of training in "
      f"{format_seconds(self.total)} and {times} ({spent})"
    )


@dataclasses.dataclass
class _Command:
  """What one command wrote."""

  begun: float
  step: int  # that it resumed at
  end: float  # its last line
  last: int  # step of its lines
  first: float | None = None  # the end of its first step
  done: bool = False  # nothing was left to do
  # Time at its end, seconds, kind; a save's step.
  spans: list[tuple[float, float, str]] = dataclasses.field(default_factory=list)
  saved: dict[int, float] = dataclasses.field(default_factory=dict)

  def add(self, line: dict[str, Any]) -> None:
    self.end, event = max(self.end, line["time"]), line.get("event")
    self.last = max(self.last, line["step"])
    if event == "first step" or (self.first is None and "values" in line):
      self.first = line["time"]
    elif event in ("saved", "evaluated"):
      self.spans.append((line["time"], line["seconds"], event))
    if event == "saved":
      self.saved[line["step"]] = line["time"]
    self.done |= event == "ended" and bool(line["done"])

  def spent(self, event: str, begin: float, end: float) -> float:
    """Returns the seconds of saves or evaluations that ended in (begin, end]."""
    return sum(s for at, s, kind in self.spans if kind == event and begin < at <= end)

  def kept_until(self, resumed: float) -> float:
    """Returns when the last step that counts ended, as a later command resumed at `resumed`."""
    assert self.first is not None
    return self.end if resumed >= self.last else self.saved.get(int(resumed), self.first)


def read_goodput(workdir: epath.PathLike) -> Goodput | None:
  """Returns where the time of the run at `workdir` went; None if it has written nothing.

  A command that was killed ends with its last line.
  """
  commands = _commands(read_lines(workdir))
  if not commands:
    return None
  total = dict.fromkeys(("training", "starting", "saving", "evaluating", "retaken", "down"), 0.0)
  resumed = math.inf  # the lowest step that a later command resumed at
  for command in reversed(commands):
    first = command.end if command.first is None else command.first
    until = command.end if command.first is None else command.kept_until(resumed)
    saving = command.spent("saved", command.begun, until)
    evaluating = command.spent("evaluated", command.begun, until)
    before = sum(command.spent(e, command.begun, first) for e in ("saved", "evaluated"))
    total["starting"] += first - command.begun - before
    total["training"] += until - first - (saving + evaluating - before)
    total["saving"] += saving
    total["evaluating"] += evaluating
    total["retaken"] += command.end - until
    resumed = min(resumed, command.step)
  for one, following in itertools.pairwise(commands):
    total["down"] += 0.0 if one.done else max(0.0, following.begun - one.end)
  return Goodput(len(commands), **{name: max(0.0, s) for name, s in total.items()})


def _commands(lines: Iterable[dict[str, Any]]) -> list[_Command]:
  found: list[_Command] = []
  for line in lines:
    if line.get("resumed"):
      launched = line.get("launched", line["time"])
      found.append(_Command(launched, line["step"], line["time"], line["step"]))
    elif found:
      found[-1].add(line)
  return found

# SPDX-License-Identifier: Apache-2.0
"""The drill's table: printed as it grows, and kept as text and JSON."""

import collections
import dataclasses
import json
import os
import pathlib
import threading

from tests.drill.core import Row

HEADER = f"{'fault':34s} {'outcome':9s} {'lost':4s} {'s':>6s}  message"
SHOWN = 300  # characters of a message


def line(row: Row) -> str:
  seconds = "-" if row.seconds is None else f"{row.seconds:.1f}"
  message = " ".join(row.message.split())[:SHOWN]
  return f"{row.fault:34s} {row.outcome:9s} {row.lost:4s} {seconds:>6s}  {message}"


class Table:
  """The rows so far.

  Args:
    folder: where `write` puts drill.txt and drill.json.
  """

  def __init__(self, folder: pathlib.Path):
    self.folder, self.rows, self._lock = folder, list[Row](), threading.Lock()
    print(HEADER, flush=True)

  def add(self, row: Row) -> None:
    """Takes a row, from any thread, and prints it."""
    with self._lock:
      self.rows.append(row)
      print(line(row), flush=True)

  def summary(self, *, seed: int, seconds: float) -> str:
    counts = collections.Counter(str(row.outcome) for row in self.rows)
    spent = os.times()
    cpu = (spent.children_user + spent.children_system) / 60
    parts = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    took = f"{seconds / 60:.1f} minutes ({cpu:.1f} of CPU)"
    return f"{len(self.rows)} faults in {took}, seed {seed}: {parts}"

  def write(self, *, seed: int, seconds: float) -> None:
    """Prints the sum of all rows, and writes all of it, ordered by the faults' names."""
    rows = sorted(self.rows, key=lambda row: row.fault)
    summary = self.summary(seed=seed, seconds=seconds)
    print(summary, flush=True)
    self.folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join([HEADER, *map(line, rows), summary]) + "\n"
    (self.folder / "drill.txt").write_text(text)
    values = {"seed": seed, "seconds": seconds, "rows": [dataclasses.asdict(row) for row in rows]}
    (self.folder / "drill.json").write_text(json.dumps(values, indent=2) + "\n")

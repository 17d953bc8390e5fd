# SPDX-License-Identifier: Apache-2.0
r"""Injects faults into the real commands; says what came of each, and exits 1 if any harmed.

  python -m tests.drill
  python -m tests.drill --quick
  python -m tests.drill --only=kills --only=signals/term-saving --seed=7

A fault harms if something saved is lost, if a program ends or says other than it should, if it
hangs over its bound, or tells of it with a traceback. The table is printed as it grows, and written
to OUT/drill.txt and OUT/drill.json; the files of faults that harmed stay in OUT/work/faults.
"""

import argparse
import concurrent.futures
import logging
import os
import pathlib
import shutil
import signal
import sys
import time

from tests.drill import (
  archives,
  configs,
  disks,
  files,
  fuzz,
  kills,
  owners,
  page,
  peers,
  rates,
  shards,
  signals,
  workers,
)
from tests.drill.core import Fault, Lab, inject
from tests.drill.table import Table

# The longest first, so that the lanes end together.
SUBJECTS = (
  page,
  peers,
  kills,
  workers,
  signals,
  disks,
  files,
  shards,
  owners,
  archives,
  fuzz,
  configs,
  rates,
)


def all_faults() -> list[Fault]:
  return [fault for subject in SUBJECTS for fault in subject.faults()]


def chosen(faults: list[Fault], only: list[str], quick: bool) -> list[Fault]:
  """Returns the faults of a subject or a name in `only` (all, if empty), of them the quick ones."""
  for name in only:
    if not any(name in (fault.name, fault.name.split("/")[0]) for fault in faults):
      raise SystemExit(f"error: there is no fault or subject '{name}'; --list has them.")
  return [
    fault
    for fault in faults
    if (not only or fault.name in only or fault.name.split("/")[0] in only)
    and (fault.quick if quick else fault.whole)
  ]


def by_turns(faults: list[Fault]) -> list[list[Fault]]:
  """Returns the faults in groups, of which each must be injected one after the other."""
  groups: dict[str, list[Fault]] = {}
  for fault in faults:
    groups.setdefault(fault.turn or fault.name, []).append(fault)
  return list(groups.values())


def drill(
  faults: list[Fault], out: pathlib.Path, *, seed: int, lanes: int, patience: float
) -> Table:
  """Injects the faults, `lanes` at once, and returns the table."""
  work = out / "work"
  shutil.rmtree(work, ignore_errors=True)
  table, lab = Table(out), Lab(work, patience)

  def take(group: list[Fault]) -> None:
    for fault in group:
      row = inject(fault, lab, seed)
      table.add(row)
      if not row.outcome.fails:
        shutil.rmtree(lab.faults_folder(fault), ignore_errors=True)

  with concurrent.futures.ThreadPoolExecutor(lanes) as pool:
    try:
      for group in [pool.submit(take, group) for group in by_turns(faults)]:
        group.result()
    finally:  # where it is interrupted, too: what is at work is killed, and the faults end
      pool.shutdown(wait=False, cancel_futures=True)
      lab.close()
  return table


def main(argv: list[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    prog="python -m tests.drill",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--quick", action="store_true", help="a part of the faults, in minutes")
  add("--only", action="append", default=[], metavar="NAME", help="a subject or a fault; again")
  add("--seed", type=int, default=0, help="of the moments, places and mutations (0)")
  add("--list", action="store_true", help="names the faults, and injects none")
  add("--lanes", type=int, default=len(os.sched_getaffinity(0)), help="faults at once (cores)")
  add("--patience", type=float, default=1.0, help="times the bounds in seconds, on a busy machine")
  add("--out", type=pathlib.Path, default=pathlib.Path("runs/drill"), metavar="FOLDER")
  args = parser.parse_args(argv)
  faults = chosen(all_faults(), args.only, args.quick)
  if args.list:
    print(*(fault.name for fault in faults), sep="\n")
    return 0
  begun = time.monotonic()
  table = drill(
    faults, args.out.absolute(), seed=args.seed, lanes=args.lanes, patience=args.patience
  )
  table.write(seed=args.seed, seconds=time.monotonic() - begun)
  return int(any(row.outcome.fails for row in table.rows))


if __name__ == "__main__":
  signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is at work must not stay
  signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored under nohup, and so in all that is started
  logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax's, on reading states
  sys.exit(main())

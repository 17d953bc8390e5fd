# SPDX-License-Identifier: Apache-2.0
"""A falsified world: of pictures shuffled against their names nothing can be learned."""

import dataclasses
import functools

from lab import measures, starts
from lab.finding import Chart, Finding
from lab.rules import Table, Verdict, Word

TRUE = starts.captions()
CELLS = {"true names": TRUE, "shuffled names": dataclasses.replace(TRUE, shuffled=True)}


def decide(table: Table) -> Verdict:
  """Both must hold: own pictures help where names are true, and do not where they are shuffled."""
  gains = {
    cell: table.paired({(cell, "kind"): 1.0, (cell, "kind, next picture"): -1.0}) for cell in CELLS
  }
  why = "; ".join(f"{cell}: own minus next picture {gain}" for cell, gain in gains.items())
  right = gains["true names"].sign > 0 and gains["shuffled names"].sign == 0
  return Verdict(Word.REPRODUCED if right else Word.NOT, why)


FINDING = Finding(
  title="A falsified world teaches nothing",
  paper="None: a check of the lab itself.",
  question="Does a model learn kinds of things where each picture has another picture's name?",
  cells=CELLS,
  measures={
    "kind": measures.kind,
    "kind, next picture": functools.partial(measures.kind, other=True),
  },
  rule=(
    "Reproduced if kinds are named better with the own picture than with the next one (by 2 "
    "standard errors) where names are true, and not where they are shuffled; else not."
  ),
  decide=decide,
  charts=(
    Chart("kind", tuple(CELLS), "right kind, own picture", chance=1 / 8),
    Chart("kind, next picture", tuple(CELLS), "right kind, next picture", chance=1 / 8),
  ),
)

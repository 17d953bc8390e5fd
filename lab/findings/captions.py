# SPDX-License-Identifier: Apache-2.0
"""Captions give zero-shot ability: the runs of `interleaved`."""

from lab import mixtures
from lab.finding import Chart, Finding
from lab.findings.interleaved import CELLS
from lab.rules import Table, Verdict, all_above

FIRST, *_, LAST = CELLS
HALF = "50:50"


def decide(table: Table) -> Verdict:
  pairs = ((FIRST, LAST), (HALF, LAST), (FIRST, "33:66"))
  return all_above({f"{a} - {b}": table.difference(a, b, "naming") for a, b in pairs})


FINDING = Finding(
  title="Captions give zero-shot ability",
  paper="Figure 5a, captions:interleaved from 100:0 to 0:100: 0-shot 39.3, 35.9, 33.4, 33.1, 25.8.",
  question="How well is a thing named at once, by the share of captions?",
  cells=CELLS,
  measures={"naming": mixtures.MEASURES["naming"]},
  rule=(
    "Reproduced if naming without shots is better at 100:0 than at 0:100 and at 33:66, and better "
    "at 50:50 than at 0:100, each by 2 standard errors; not reproduced if one is the other way "
    "round."
  ),
  decide=decide,
  remark=(
    "The order is MM1's at every step, and the ends differ; the differences are small because "
    "documents name things too, and all runs start from an encoder that has seen captions."
  ),
  charts=(Chart("naming", tuple(CELLS), "right kind, no shots", chance=1 / 8, line=True),),
)

# SPDX-License-Identifier: Apache-2.0
"""Interleaved documents give few-shot ability and keep text."""

from lab import mixtures
from lab.finding import Chart, Finding
from lab.rules import Table, Verdict, all_above

RATIOS = ((1.0, 0.0), (0.66, 0.33), (0.5, 0.5), (0.33, 0.66), (0.0, 1.0))
CELLS = {f"{round(100 * c)}:{round(100 * d)}": mixtures.cell(c, d) for c, d in RATIOS}
ALONE, *MIXED = CELLS


def decide(table: Table) -> Verdict:
  few = {f"{name} - {ALONE}, 8-shot": table.difference(name, ALONE, "8-shot") for name in MIXED}
  text = {f"{ALONE} - {n}, text nats": table.difference(ALONE, n, "text nats") for n in MIXED}
  return all_above(few | text)


FINDING = Finding(
  title="Interleaved documents give few-shot ability and keep text",
  paper=(
    "Figure 5a, captions:interleaved 100:0, 66:33, 50:50, 33:66, 0:100: 8-shot 45.0, 61.1, 62.2, "
    "61.9, 56.9; TextCore 49.6, 51.7, 52.2, 52.0, 52.8."
  ),
  question="How well is read off the shots what is asked, by the share of interleaved documents?",
  cells=CELLS,
  measures=mixtures.MEASURES,
  rule=(
    "Reproduced if every mixture with documents is above captions alone at 8 shots, and has fewer "
    "nats per token of text, each by 2 standard errors; not reproduced if one is the other way "
    "round."
  ),
  decide=decide,
  charts=(
    Chart("8-shot", tuple(CELLS), "8-shot accuracy", line=True),
    Chart("4-shot", tuple(CELLS), "4-shot accuracy", line=True),
    Chart("text nats", tuple(CELLS), "nats per token of text", line=True),
  ),
)

# SPDX-License-Identifier: Apache-2.0
"""Synthetic captions help few-shot: clean long captions among noisy ones."""

from lab import mixtures
from lab.documents import Loose
from lab.finding import Chart, Finding
from lab.rules import Table, Verdict, Word

NOISE = 0.4  # share of the other captions that are another picture's
SHARES = (0.0, 0.07, 0.30)
CELLS = {
  f"{share:.0%} synthetic": mixtures.cell(0.5, 0.5, stream=Loose(noise=NOISE, long=share))
  for share in SHARES
}
NONE, SOME, MANY = CELLS


def decide(table: Table) -> Verdict:
  """MM1's sign is at 7%; 30% is shown to see whether more of it does more."""
  few = {n: table.difference(SOME, NONE, f"{n}-shot") for n in (4, 8)}
  why = "; ".join(f"{SOME} - {NONE}, {n}-shot {value}" for n, value in few.items())
  why += f"; {MANY} - {NONE}, 8-shot {table.difference(MANY, NONE, '8-shot')}"
  why += f"; {SOME} - {NONE}, naming {table.difference(SOME, NONE, 'naming')}"
  signs = [value.sign for value in few.values()]
  if min(signs) < 0:
    return Verdict(Word.NOT, why)
  return Verdict(Word.REPRODUCED if max(signs) > 0 else Word.UNDECIDED, why)


FINDING = Finding(
  title="Synthetic captions help few-shot",
  paper="Figure 5d, 7% VeCap: 4-shot 55.9 to 58.3, 8-shot 58.7 to 62.7, 0-shot 35.4 to 32.1.",
  question="Do clean long captions among noisy ones help at 4 and 8 shots?",
  cells=CELLS,
  measures=mixtures.MEASURES,
  rule=(
    "Reproduced if 7% of clean long captions raise accuracy at 4 or at 8 shots by 2 standard "
    "errors and lower it at neither; not reproduced if they lower it at one; else undecided."
  ),
  decide=decide,
  charts=(
    *(Chart(f"{n}-shot", tuple(CELLS), f"{n}-shot accuracy", line=True) for n in mixtures.SHOTS),
    Chart("naming", tuple(CELLS), "right kind, no shots", line=True),
  ),
)

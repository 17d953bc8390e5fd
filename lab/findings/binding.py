# SPDX-License-Identifier: Apache-2.0
"""Few-shot naming of classes never seen: letters that are bound anew in each document."""

import functools

from lab import measures, starts
from lab.documents import Bound, Loose, Pairs, Repeats
from lab.finding import Chart, Finding
from lab.rules import Figure, Table, Verdict, Word
from lab.runs import Run

WORDS = Run(((0.6, Repeats()), (0.4, Pairs(ways=2, shots=12))), 8000, starts.NO_PICTURES)
ROWS = {"data.images_per_row": "24", "data.batch_size": "4"}
PICTURES = Run(
  ((0.8, Bound()), (0.2, Loose())),
  1000,
  ROWS | {"model.connector.token_grid": "(1,1)"},
  WORDS,
)
CELLS = {"words": WORDS, "words, then pictures": PICTURES}
CHANCE = {"words of 2": 0.5, "novel pictures of 2": 0.5}


def decide(table: Table) -> Verdict:
  """Text first: where not even words are bound, pictures cannot be."""
  above = {}
  for measure, chance in CHANCE.items():
    found = table.mean("words, then pictures", measure)
    above[measure] = Figure(found.mean - chance, found.error)
  why = "; ".join(f"{name} above chance {value}" for name, value in above.items())
  word = Word.REPRODUCED if min(v.sign for v in above.values()) > 0 else Word.UNDECIDED
  return Verdict(word, why)


FINDING = Finding(
  title="Classes never seen are named after a few shots",
  paper="Figure 5a: interleaved documents give few-shot accuracy; no figure of novel classes.",
  question="Is a letter that only this document gives to a class read off its shots?",
  cells=CELLS,
  measures={
    "words of 2": functools.partial(measures.pairs, ways=2, shots=8),
    "novel pictures of 2": functools.partial(measures.bound, shots=8),
  },
  rule=(
    "Reproduced if, after pictures, both words and pictures of classes never seen get their letter "
    "above chance by 2 standard errors; undecided otherwise: circuits that match and copy come "
    "abruptly and late, so chance after these steps shows nothing about more of them. With a GPU, "
    "raise the steps in lab/findings/binding.py."
  ),
  decide=decide,
  charts=tuple(Chart(m, tuple(CELLS), f"right letter, {m}", chance=c) for m, c in CHANCE.items()),
  seeds=2,
  remark=(
    "On words it comes, after some 6 million positions: 2,000 steps had left it at chance. A "
    "thousand steps of documents with pictures and without pairs of words then undo it, before "
    "pictures are matched. Next: pairs kept in the mixture, or the decoder frozen at first."
  ),
)

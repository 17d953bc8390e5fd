# SPDX-License-Identifier: Apache-2.0
"""The connector hardly matters: equivalence by a margin, not the absence of a difference."""

from lab import measures
from lab.finding import Chart, Finding
from lab.findings import resolution
from lab.rules import Table, Verdict, all_within

MARGIN = 0.05
SIDE = 24  # pixels: nine patches, which linear and mlp make nine tokens of
NINE = ("c_abstractor", "average_pool", "attention_pool", "linear", "mlp")
KINDS = {kind: resolution.cell(SIDE, kind=kind, tokens=3) for kind in NINE}
TOKENS = {
  "4 tokens": resolution.cell(),
  "9 tokens": resolution.cell(tokens=3),
  "16 tokens": resolution.cell(tokens=4),
}
CELLS = {**KINDS, **TOKENS}


def decide(table: Table) -> Verdict:
  first, *others = NINE
  pairs = {f"{kind} - {first}": table.difference(kind, first, "digits") for kind in others}
  return all_within(pairs, MARGIN)


FINDING = Finding(
  title="The connector's kind hardly matters",
  paper=(
    "Section 3.2 and figure 4: average pooling, attention pooling and C-Abstractor give similar "
    "results; the number of tokens and the resolution matter more."
  ),
  question="How well are small digits read through connectors of five kinds, at nine tokens?",
  cells=CELLS,
  measures={"digits": measures.strings},
  rule=(
    f"Reproduced if each kind's accuracy is within {MARGIN} of the C-Abstractor's by two one-sided "
    f"tests at 5%; not reproduced if one is surely beyond; else undecided. Tokens are shown beside."
  ),
  decide=decide,
  charts=(
    Chart("digits", NINE, "digits read, 24 pixels, 9 tokens", chance=0.1),
    Chart("digits", tuple(TOKENS), "digits read, 32 pixels", chance=0.1, line=True),
  ),
  remark=(
    "Connectors begin from random params and have 400 steps: the C-Abstractor's convolutions read "
    "neighbouring patches from the first step, while attention pooling has to learn where its "
    "queries look. MM1 compares them after far longer training, and with 64 and 144 tokens. That "
    "more tokens help is as MM1 has it."
  ),
)

# SPDX-License-Identifier: Apache-2.0
"""5:5:1: a little text keeps what the decoder knew, at little cost to the rest."""

from lab import mixtures, starts
from lab.finding import Chart, Finding
from lab.rules import Table, Verdict, all_above

SHARES = (0.0, 1 / 11, 0.14, 0.33)
CELLS = {
  f"text {share:.0%}": mixtures.cell((1 - share) / 2, (1 - share) / 2, share) for share in SHARES
}
NONE, LITTLE, *_ = CELLS
MARGIN = 0.05


def decide(table: Table) -> Verdict:
  gain = table.difference(NONE, LITTLE, "text nats")
  cost = table.difference(LITTLE, NONE, "8-shot")
  verdict = all_above({f"{NONE} - {LITTLE}, text nats": gain})
  return verdict if cost.sign >= 0 or cost.within(MARGIN) else all_above({"8-shot lost": cost})


FINDING = Finding(
  title="One part of text in eleven keeps text ability",
  paper=(
    "Figure 5c, text share 0, 9, 14, 33%: TextCore 52.2, 54.0, 54.2, 54.6; 8-shot 62.2, 62.7, "
    "60.8, 61.0."
  ),
  question="How much of its text does a decoder forget, by the share of text in the mixture?",
  cells={"before": starts.text(), **CELLS},
  measures=mixtures.MEASURES,
  rule=(
    "Reproduced if 5:5:1 has fewer nats per token of text than 1:1 by 2 standard errors, and does "
    f"not lose at 8 shots (no difference beyond 2 standard errors, or within {MARGIN})."
  ),
  decide=decide,
  charts=(
    Chart("text nats", ("before", *CELLS), "nats per token of text", line=True),
    Chart("8-shot", tuple(CELLS), "8-shot accuracy", line=True),
  ),
)

# SPDX-License-Identifier: Apache-2.0
"""What a finding is: cells that differ in one thing, measures, and a rule written beforehand."""

import dataclasses
from collections.abc import Callable, Mapping

from lab.rules import Table, Verdict
from lab.runs import Measure, Run


@dataclasses.dataclass(frozen=True)
class Chart:
  """One panel of a finding's picture: a measure over cells, in their order.

  Attributes:
    measure: name.
    cells: drawn; those joined by a line if `line`.
    label: of the axis.
    chance: where a line is drawn, if there is such a value.
  """

  measure: str
  cells: tuple[str, ...]
  label: str
  chance: float | None = None
  line: bool = False


@dataclasses.dataclass(frozen=True)
class Finding:
  """A question to a grid of small models.

  Attributes:
    title: what MM1 says.
    paper: the paper's own figures, with their place in it.
    question: what is asked here, in one sentence.
    cells: runs by name.
    measures: functions of a model by name, all of them for each cell.
    rule: what `decide` does, in words.
    decide: from the table to a verdict.
    charts: panels of the picture.
    seeds: that are trained where none are asked for.
    remark: a guess why it came out so, written after the runs.
  """

  title: str
  paper: str
  question: str
  cells: Mapping[str, Run]
  measures: Mapping[str, Measure]
  rule: str
  decide: Callable[[Table], Verdict]
  charts: tuple[Chart, ...]
  seeds: int = 3
  remark: str = ""

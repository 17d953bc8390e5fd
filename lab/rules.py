# SPDX-License-Identifier: Apache-2.0
"""Figures of a finding's cells, and the rules that decide: differences, errors, equivalence.

Runs of one seed are asked the same items, so differences are paired by item and by seed. A
difference's standard error has two parts, of the items and of what else a seed changes (fresh
params, order of data): the root of s_items^2 / items, of differences averaged over seeds, plus
s_seeds^2 / seeds. With one seed the second part cannot be known, and no rule decides.
"""

import dataclasses
import enum
from collections.abc import Mapping

import numpy as np

SIGMAS = 2.0  # standard errors that a difference must exceed
ONE_SIDED = 1.645  # standard errors of a one-sided test at 5%, for equivalence
FEWEST_SEEDS = 2


class Word(enum.Enum):
  REPRODUCED = "reproduced"
  NOT = "not reproduced"
  UNDECIDED = "undecided"


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What a rule says, and why, with its figures."""

  word: Word
  why: str


@dataclasses.dataclass(frozen=True)
class Figure:
  """A mean with its standard error."""

  mean: float
  error: float

  def __str__(self) -> str:
    return f"{self.mean:+.3f} ± {self.error:.3f}"

  @property
  def sign(self) -> int:
    """1 or -1 where the mean is beyond `SIGMAS` standard errors, else 0."""
    return int(np.sign(self.mean)) if abs(self.mean) > SIGMAS * self.error else 0

  def within(self, margin: float) -> bool:
    """Whether the mean is nearer to 0 than `margin`, by two one-sided tests at 5%."""
    return abs(self.mean) + ONE_SIDED * self.error < margin


class Table:
  """Values by cell and measure: float[seeds, items] each."""

  def __init__(self, values: Mapping[str, Mapping[str, np.ndarray]]):
    self.values = values

  @property
  def seeds(self) -> int:
    return min(len(v) for measured in self.values.values() for v in measured.values())

  def mean(self, cell: str, measure: str) -> Figure:
    """Returns the mean over seeds and items."""
    return self.contrast({cell: 1.0}, measure)

  def difference(self, a: str, b: str, measure: str) -> Figure:
    """Returns by how much cell `a` is above cell `b`."""
    return self.contrast({a: 1.0, b: -1.0}, measure)

  def contrast(self, weights: Mapping[str, float], measure: str) -> Figure:
    """Returns a weighted sum of cells' means, item by item and seed by seed."""
    return self.paired({(cell, measure): weight for cell, weight in weights.items()})

  def paired(self, weights: Mapping[tuple[str, str], float]) -> Figure:
    """Returns a weighted sum over cells and measures of the same items."""
    return figure(sum(weight * self.values[c][m] for (c, m), weight in weights.items()))


def figure(values: np.ndarray) -> Figure:
  """Returns the mean of float[seeds, items], its error as this module's docstring says.

  With one seed it is that of the items alone.
  """
  seeds, items = values.shape
  of_items = values.mean(axis=0).var(ddof=1) / items
  of_seeds = values.mean(axis=1).var(ddof=1) / seeds if seeds > 1 else 0.0
  return Figure(float(values.mean()), float(np.sqrt(of_items + of_seeds)))


def all_above(figures: Mapping[str, Figure]) -> Verdict:
  """Reproduced where every difference is above 0, not where one is below; else undecided."""
  why = "; ".join(f"{name} {value}" for name, value in figures.items())
  signs = [value.sign for value in figures.values()]
  if min(signs) < 0:
    return Verdict(Word.NOT, why)
  return Verdict(Word.REPRODUCED if min(signs) > 0 else Word.UNDECIDED, why)


def all_within(figures: Mapping[str, Figure], margin: float) -> Verdict:
  """Reproduced where every difference is within a margin, not where one is surely beyond it."""
  why = "; ".join(f"{name} {value}" for name, value in figures.items()) + f"; margin {margin}"
  if all(value.within(margin) for value in figures.values()):
    return Verdict(Word.REPRODUCED, why)
  beyond = [v for v in figures.values() if abs(v.mean) - ONE_SIDED * v.error > margin]
  return Verdict(Word.NOT if beyond else Word.UNDECIDED, why)

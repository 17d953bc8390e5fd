# SPDX-License-Identifier: Apache-2.0
"""The learning-rate law: the best rate falls with the size of the decoder."""

import math

import numpy as np

from lab import measures, starts
from lab.documents import Prose
from lab.finding import Chart, Finding
from lab.rules import Table, Verdict, Word
from lab.runs import Run
from mm1_jax.train.optimizer import backbone_params

STEPS = 300
WIDTHS = (32, 64, 128, 256)
RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
LAW = -0.4214  # slope of ln(rate) in ln(params), section 3.3
RESAMPLES = 1000


def cell(width: int, rate: float) -> Run:
  config = starts.NO_PICTURES | {
    "model.decoder.width": str(width),
    "model.decoder.head_dim": str(width // 4),
    "model.decoder.mlp_dim": str(width * 3 // 2),
    "optimizer.learning_rate": str(rate),
  }
  return Run(((1.0, Prose()),), STEPS, config)


def name(width: int, rate: float) -> str:
  return f"{width} wide, {rate:g}"


CELLS = {name(width, rate): cell(width, rate) for width in WIDTHS for rate in RATES}
SIZES = [backbone_params(cell(width, 1e-3).run_config().model.decoder) for width in WIDTHS]


def best_rate(nats: np.ndarray) -> float:
  """Returns ln of the rate where a parabola through (ln rate, nats) is lowest, within the sweep."""
  x = np.log(RATES)
  square, linear, _ = np.polyfit(x, nats, 2)
  lowest = x[int(np.argmin(nats))] if square <= 0 else -linear / (2 * square)
  return float(np.clip(lowest, x[0], x[-1]))


def slope(nats: np.ndarray) -> float:
  """Returns the slope of ln(best rate) in ln(params); nats is float[widths, rates]."""
  return float(np.polyfit(np.log(SIZES), [best_rate(row) for row in nats], 1)[0])


def decide(table: Table) -> Verdict:
  values = np.array(
    [[table.values[name(w, r)]["text nats"] for r in RATES] for w in WIDTHS]
  )  # [widths, rates, seeds, items]
  rng = np.random.default_rng(0)
  slopes = []
  for _ in range(RESAMPLES):  # of seeds and of passages, the same for all runs
    seeds = rng.integers(values.shape[2], size=values.shape[2])
    items = rng.integers(values.shape[3], size=values.shape[3])
    slopes.append(slope(values[:, :, seeds][..., items].mean(axis=(2, 3))))
  low, high = np.quantile(slopes, (0.025, 0.975))
  rates = [math.exp(best_rate(row)) for row in values.mean(axis=(2, 3))]
  best = ", ".join(f"{size:,} params {rate:.1e}" for size, rate in zip(SIZES, rates, strict=True))
  found = slope(values.mean(axis=(2, 3)))
  why = f"slope {found:.2f}, 95% interval {low:.2f} to {high:.2f}, MM1's {LAW}; best rates: {best}"
  if low <= LAW <= high and high < 0:
    return Verdict(Word.REPRODUCED, why)
  return Verdict(Word.UNDECIDED if low <= LAW <= high else Word.NOT, why)


FINDING = Finding(
  title="The best learning rate falls with size as N^-0.42",
  paper="Section 3.3 and figure 6: ln(rate) = -0.4214 ln(N) - 0.5535, from 9M to 1.2B params.",
  question="At which rate do decoders of four sizes read textbooks best, after 300 steps?",
  cells=CELLS,
  measures={"text nats": measures.text},
  rule=(
    "The best rate of each size is the lowest point of a parabola in ln(rate). Reproduced if the "
    "95% bootstrap interval of the slope holds -0.4214 and is below 0; undecided if it holds both; "
    "not reproduced if it does not hold -0.4214."
  ),
  decide=decide,
  charts=tuple(
    Chart("text nats", tuple(name(w, r) for r in RATES), f"nats per token, {w} wide", line=True)
    for w in WIDTHS
  ),
)

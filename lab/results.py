# SPDX-License-Identifier: Apache-2.0
"""A finding's results: table, verdict and cost as plain values, and their picture and page."""

import json
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Drawing

from lab.finding import Chart, Finding
from lab.rules import FEWEST_SEEDS, Table, Verdict, Word, figure
from mm1_jax.drawing import INK, MUTED, PADDING, as_html, color, img, page, to_png

Results = dict[str, Any]
WIDTH, HEIGHT = 4.6, 3.4  # inches of a panel
LABEL = 11  # characters of a line below a panel


def judge(finding: Finding, table: Table) -> Verdict:
  """Returns what the finding's rule says; undecided where there are too few seeds for a rule."""
  verdict = finding.decide(table)
  if table.seeds < FEWEST_SEEDS:
    why = f"{verdict.why} (one seed: its noise is not known)"
    return Verdict(Word.UNDECIDED, why)
  return verdict


def collect(finding: Finding, table: Table, costs: Mapping[str, Sequence[float]]) -> Results:
  """Returns a finding's results.

  Args:
    finding: what was asked.
    table: the values.
    costs: CPU seconds of each cell's training, a number for each seed.
  """
  verdict = judge(finding, table)
  cells = {}
  for cell, measured in table.values.items():
    cells[cell] = {
      "measures": {name: _summary(values) for name, values in measured.items()},
      "cpu_seconds": [round(x) for x in costs[cell]],
    }
  return {
    "title": finding.title,
    "paper": finding.paper,
    "question": finding.question,
    "rule": finding.rule,
    "verdict": verdict.word.value,
    "why": verdict.why,
    "seeds": table.seeds,
    "cells": cells,
  }


def _summary(values: np.ndarray) -> dict[str, Any]:
  of_all = figure(values)
  seeds = values.mean(axis=1)
  return {
    "mean": round(of_all.mean, 4),
    "standard_error": round(of_all.error, 4),
    "seeds": [round(float(x), 4) for x in seeds],
    "between_seeds": round(float(seeds.std(ddof=1)), 4) if len(seeds) > 1 else None,
    "items": values.shape[1],
  }


def draw(charts: Sequence[Chart], results: Results) -> bytes:
  """Returns a PNG: each chart's cells with two standard errors, and each seed as a dot."""
  drawing = Drawing(figsize=(WIDTH * len(charts), HEIGHT), layout="constrained")
  for ax, chart in zip(np.atleast_1d(drawing.subplots(1, len(charts))), charts, strict=True):
    _panel(ax, chart, results)
  drawing.suptitle(f"{results['title']}: {results['verdict']}", color=INK)
  return to_png(drawing)


def _panel(ax, chart: Chart, results: Results) -> None:
  summaries = [results["cells"][cell]["measures"][chart.measure] for cell in chart.cells]
  at = np.arange(len(summaries))
  means = np.array([s["mean"] for s in summaries])
  errors = np.array([s["standard_error"] for s in summaries])
  ax.errorbar(
    at, means, 2 * errors, fmt="o-" if chart.line else "o", color=color(0), capsize=4, lw=1.5
  )
  for x, summary in zip(at, summaries, strict=True):
    ax.plot([x + 0.12] * len(summary["seeds"]), summary["seeds"], ".", color=MUTED, ms=4)
  if chart.chance is not None:
    ax.axhline(chart.chance, color=MUTED, lw=1, ls=":")
    ax.annotate("chance", (-0.45, chart.chance), color=MUTED, fontsize=8, va="bottom")
    ax.set_ylim(bottom=0.0)
  labels = [textwrap.fill(cell.replace("_", " "), LABEL) for cell in chart.cells]
  ax.set_xticks(at, labels, fontsize=8)
  ax.set_ylabel(chart.label, color=INK, fontsize=9)
  ax.set_xlim(-0.5, len(at) - 0.5)
  ax.grid(axis="y", color=PADDING, lw=0.6)
  ax.spines[["top", "right"]].set_visible(False)


def table_lines(results: Results) -> list[str]:
  """Returns the results' table as lines of Markdown."""
  measures = list(next(iter(results["cells"].values()))["measures"])
  lines = [f"| | {' | '.join(measures)} | CPU s a seed |", "|---" * (len(measures) + 2) + "|"]
  for cell, values in results["cells"].items():
    shown = [_shown(values["measures"][name]) for name in measures]
    seconds = round(float(np.mean(values["cpu_seconds"])))
    lines.append(f"| {cell} | {' | '.join(shown)} | {seconds} |")
  return lines


def _shown(summary: Mapping[str, Any]) -> str:
  return f"{summary['mean']:.3f} ± {summary['standard_error']:.3f}"


def write_page(folder: pathlib.Path, all_results: Mapping[str, Results]) -> pathlib.Path:
  """Writes `index.html`: verdicts first, then each finding with its picture."""
  rows = "".join(
    f"<tr><td><a href='#{name}'>{as_html(r['title'])}</a></td><td>{r['verdict']}</td>"
    f"<td>{r['seeds']}</td></tr>"
    for name, r in all_results.items()
  )
  body = f"<table><tr><th>MM1 says</th><th>here</th><th>seeds</th></tr>{rows}</table>"
  for name, r in all_results.items():
    picture = img((folder / f"{name}.png").read_bytes(), f"{r['title']}: {r['verdict']}")
    facts = {key: r[key] for key in ("question", "paper", "rule", "verdict", "why")}
    listed = "".join(f"<p><b>{key}</b>: {as_html(value)}</p>" for key, value in facts.items())
    body += f"<h2 id='{name}'>{as_html(r['title'])}</h2>{listed}{picture}"
  path = folder / "index.html"
  path.write_text(page("What matters, tried here", body))
  return path


def read(folder: pathlib.Path) -> dict[str, Results]:
  """Returns the results of all findings in a folder, in the order of their names."""
  return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}

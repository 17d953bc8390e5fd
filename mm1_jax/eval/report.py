# SPDX-License-Identifier: Apache-2.0
"""Results as text: a table for a terminal, Markdown beside MM1's figures, and two runs compared."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from mm1_jax import untrusted
from mm1_jax.drawing import counted, printable
from mm1_jax.eval import published, results
from mm1_jax.eval.evaluate import Result
from mm1_jax.eval.metrics.statistics import paired
from mm1_jax.eval.task import EvalError

HEADER = ("task", "split", "form", "shots", "control", "n (dropped)", "metric", "value ± error")
# A metric by group, such as MMMU's 30 subjects, has so many lines in a terminal.
MOST_GROUPS = 12
WIDTHS = (18, 11, 12, 8, 9, 16, 20, 40)  # characters of a cell in a terminal, at most
NOTE = "± one standard error; shares are in %"
# Metrics, by how their names begin or end, in a unit of their own; others up to 1 are shares.
_NO_SHARES = ("cider", "nats", "perception", "cognition", "bits_per_byte", "perplexity")


# --- One evaluation ---


def table(of: Sequence[Result]) -> str:
  """Returns results as lines of at most 120 columns: a line for each metric, mean over trials.

  Below a control is how much better items are with their own pictures.
  """
  lines = list(lines_of(results.entries(of), MOST_GROUPS))
  lines = [tuple(map(_clipped, line, WIDTHS)) for line in lines]
  note = f"{NOTE}; x: draws of demonstrations" if _has_trials(lines) else NOTE
  return f"{_columns([HEADER, *lines], right=(3, 5, 7))}\n{note}"


def lines_of(
  entries: Iterable[Mapping[str, Any]], most_groups: int | None = None
) -> Iterator[tuple[str, ...]]:
  for entry in entries:
    trials = f" x{len(entry['files'])}" if len(entry["files"]) > 1 else ""
    dropped = f" ({len(entry['dropped']):,})" if entry["dropped"] else ""
    job = (
      *(printable(entry[key]) for key in ("task", "split", "form")),
      f"{entry['shots']}{trials}",
      entry["control"],
      f"{entry['items'] - len(entry['dropped']):,}{dropped}",
    )
    for metric, value in _metrics(entry, most_groups):
      yield (*job, metric, value)
      job = ("",) * len(job)
    if minus := entry["own_minus_this"]:
      yield (*job, f"own - {entry['control']}", value_of(minus["metric"], minus, sign=True))


def _metrics(entry: Mapping[str, Any], most_groups: int | None = None) -> Iterator[tuple[str, str]]:
  groups = [metric for metric in entry["values"] if "/" in metric]
  left_out = set(groups[most_groups:] if most_groups is not None else ())
  for metric, value in entry["values"].items():
    if metric not in left_out:
      yield printable(metric), value_of(metric, value)
  if left_out:
    yield f"and {len(left_out)} more groups", ""
  if not entry["values"]:
    yield "not scored here", ""


def is_share(metric: str, mean: float) -> bool:
  """Returns whether a metric's value is a share of 1, which is shown in per cent."""
  name = metric.split("/")[0]
  return abs(mean) <= 1 and not (name.startswith(_NO_SHARES) or name.endswith(_NO_SHARES))


def value_of(metric: str, value: Mapping[str, Any], *, sign: bool = False) -> str:
  """Returns a value of `results.json` and its error as text."""
  mean, error = value["mean"], value["standard_error"]
  if mean is None:
    return "not a number"
  share = is_share(metric, mean)
  text = _number(100 * mean if share else mean, "+" if sign else "")
  if error is not None:
    text += f" ± {_number(100 * error if share else error)}"
  return f"{text} %" if share else text


def _number(value: float, sign: str = "") -> str:
  return f"{value:{sign}.2f}" if abs(value) < 1e6 else f"{value:{sign}.3e}"


def _has_trials(lines: Iterable[Sequence[str]]) -> bool:
  return any(" x" in line[3] for line in lines)


def _clipped(text: str, longest: int) -> str:
  """Returns a text without its middle if it is long: names differ at both ends."""
  return text if len(text) <= longest else f"{text[: longest // 2]}…{text[1 - longest // 2 :]}"


def _columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
  """Returns rows as aligned lines; the columns `right` are aligned to the right."""
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = []
  for row in rows:
    cells = [
      cell.rjust(width) if i in right else cell.ljust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    lines.append("  ".join(cells).rstrip())
  return "\n".join(lines)


# --- Markdown ---


def markdown(values: Mapping[str, Any]) -> str:
  """Returns `results.json` as Markdown, beside MM1's figures of the same benchmarks."""
  titles = {entry["task"]: (entry["title"], entry["metric"]) for entry in values["results"]}
  head = (
    f"# Evaluation of {_cell(title(values))}\n",
    _table(("setting", "value"), facts(values)),
    "## Results\n",
    _table(HEADER, lines_of(values["results"]), right=(3, 5, 7)),
    f"Values are {NOTE}. In the last line of a control is the paired difference of items\n"
    "with their own pictures and this control.\n",
    "## What is measured\n",
    _table(("task", "benchmark", "metric"), [(task, *about) for task, about in titles.items()]),
  )
  return "\n".join([*head, *_beside_mm1(values)])


def title(values: Mapping[str, Any]) -> str:
  run = values["run"]
  return f"{run.get('name') or 'a model'}, step {run.get('step', '?')}"


def facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Returns run, versions and settings by name, as text."""
  return [
    (f"{part}.{key}", value if isinstance(value, str) else json.dumps(value))
    for part in ("run", "versions", "settings")
    for key, value in values[part].items()
  ]


def _beside_mm1(values: Mapping[str, Any]) -> Iterator[str]:
  params = values["run"].get("params")
  nearest = published.nearest(params) if params else ""
  limit = values["settings"]["limit"]
  rows, sources = [], {}
  for entry in values["results"]:
    for figures in _published(entry):
      sources[figures.source] = None
      rows += _beside(entry, figures, nearest, limit)
  core = _text_core(values["results"], limit)
  if not rows and not core:
    return
  yield "## Beside MM1\n"
  if rows:
    bold = f"**Bold**: nearest to this model's {params:,} params. " if nearest else ""
    yield _table(
      ("task", "shots", "metric", "ours", *published.MODELS, "what differs"), rows, right=(1,)
    )
    yield (
      f"{bold}A dash: not seen in the source. {'; '.join(sources)}.\nMM1's splits are as users of "
      "its figures state them; its prompts, and its draws of demonstrations,\nwere not published.\n"
    )
  yield core


def _published(entry: Mapping[str, Any]) -> list[published.Published]:
  if entry["control"] != "own":
    return []
  return published.beside(entry["task"], entry["form"], entry["shots"], entry["split"])


def _beside(
  entry: Mapping[str, Any], figures: published.Published, nearest: str, limit: int | None
) -> Iterator[tuple[str, ...]]:
  """Yields a line for each metric of ours that a published figure is set beside."""
  names = [*entry["values"]]
  if figures.metric:
    names = [name for name in names if name.startswith(figures.metric) and "/" not in name]
  for metric in names[: None if figures.metric else 1] or [""]:
    differs = published.differs(
      figures,
      metric=metric,
      form=entry["form"],
      shots=entry["shots"],
      split=entry["split"],
      limit=limit,
    )
    shown = {m: f"{x:g}" for m, x in figures.figures.items()}
    yield (
      entry["task"],
      str(entry["shots"]),
      metric or "-",
      value_of(metric, entry["values"][metric]) if metric else "not scored here",
      *(
        f"**{shown[m]}**" if m == nearest and m in shown else shown.get(m, "-")
        for m in published.MODELS
      ),
      "; ".join(differs),
    )


def _text_core(entries: Iterable[Mapping[str, Any]], limit: int | None) -> str:
  """Returns the mean over the benchmarks of TextCore, if all were evaluated; else ""."""
  means = {}
  for entry in entries:
    headline = next(iter(entry["values"].values()), {"mean": None})["mean"]
    own = entry["control"] == "own" and entry["shots"] == 0
    if own and entry["task"] in published.TEXT_CORE_TASKS and headline is not None:
      means[entry["task"]] = headline
  if len(means) < len(published.TEXT_CORE_TASKS):
    return ""
  mean = 100 * sum(means.values()) / len(means)
  part = "" if limit is None else f" (at most {limit:,} items each)"
  return (
    f"TextCore: ours {mean:.1f}, the mean of {', '.join(means)}{part}. MM1 reports "
    f"{published.TEXT_CORE} for its\n"
    "ablation with a 1.2B decoder and the mixture it chose (figure 5); which metric of each\n"
    "benchmark it takes, and whether it has both parts of ARC, is not known.\n"
  )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> str:
  line = ["---:" if i in right else "---" for i in range(len(header))]
  rows = [header, line, *([_cell(text) for text in row] for row in rows)]
  return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _cell(text: str) -> str:
  """Returns a text as it is, on one line: not Markdown, nor HTML."""
  text = printable(text).replace("&", "&amp;").replace("<", "&lt;")
  return text.replace("\\", "\\\\").replace("|", r"\|").replace("`", r"\`")


# --- Two evaluations ---

_TRUTH = ("question", "choices", "answers")  # of an item that two evaluations have in common


def compare(a: epath.PathLike, b: epath.PathLike) -> str:
  """Returns the paired differences of two evaluations' folders, for each job that both have.

  An item counts where both scored it, and it is the same one: its question, choices and answers.

  Raises:
    EvalError: a folder's files are missing or damaged, or the two have no scored item in common.
  """
  folders = epath.Path(a), epath.Path(b)
  values = [results.read(folder) for folder in folders]
  first, second = (_jobs(v) for v in values)
  common = [name for name in first if name in second]
  rows, notes = [], []
  for name in common:
    row, note = _compared(name, _scored(folders[0], first[name]), _scored(folders[1], second[name]))
    rows += row
    notes += note
  for letter, own, other in (("A", first, second), ("B", second, first)):
    notes += [f"only in {letter}: {name}" for name in own if name not in other]
  if not rows:
    raise EvalError(f"'{a}' and '{b}' have no scored item in common; {'; '.join(notes)}.")
  header = ("job", "metric", "n", "A", "B", "A - B ± error", "only A right", "only B right")
  lines = [f"A: {a}", f"B: {b}", *_what_differs(*values), ""]
  return "\n".join([*lines, _columns([header, *rows], right=range(2, 8)), NOTE, *notes])


def _jobs(values: Mapping[str, Any]) -> dict[str, tuple[str, dict[str, float | None]]]:
  """Returns each job's file, and its metrics' means, by the job's name."""
  return {
    epath.Path(file).stem: (file, {metric: value["mean"] for metric, value in means.items()})
    for entry in values["results"]
    for file, means in zip(
      entry["files"], entry["trials"] or [{}] * len(entry["files"]), strict=True
    )
  }


class _Scored(NamedTuple):
  """The scored items of a job."""

  metric: str  # what their scores are
  rows: dict[str, Mapping[str, Any]]  # by id


def _scored(folder: epath.Path, job: tuple[str, Mapping[str, float | None]]) -> _Scored:
  file, means = job
  path = folder / file
  try:
    lines = path.read_bytes().splitlines()
  except OSError as e:
    raise EvalError(f"'{path}' cannot be read ({type(e).__name__}: {e}).") from e
  rows = {}
  for number, line in enumerate(lines, start=1):
    with untrusted.of_form(f"'{path}' line {number} is damaged", EvalError):
      row = untrusted.loads(line)
      if row.get("score") is not None:
        rows[row["id"]] = row | {"score": float(row["score"])}
  return _Scored(results.metric_of_items(means, [row["score"] for row in rows.values()]), rows)


def _compared(name: str, a: _Scored, b: _Scored) -> tuple[list[tuple[str, ...]], list[str]]:
  """Returns the table's line of a job, if it has one, and notes on items that are not in it."""
  shared = [id for id in a.rows if id in b.rows]
  same = [id for id in shared if all(a.rows[id][k] == b.rows[id][k] for k in _TRUTH)]
  notes = [
    f"{name}: {counted(number, 'item')} {what}"
    for number, what in (
      (len(a.rows) - len(shared), "scored only in A"),
      (len(b.rows) - len(shared), "scored only in B"),
      (len(shared) - len(same), "with another question or truth under the same id: left out"),
    )
    if number
  ]
  if not same:
    return [], [*notes, f"{name}: no scored item in common"]
  if a.metric != b.metric:
    return [], [*notes, f"{name}: its items' scores are {a.metric} in A, {b.metric} in B"]
  scores = [[x.rows[id]["score"] for id in same] for x in (a, b)]
  means = [value_of(a.metric, {"mean": float(np.mean(s)), "standard_error": None}) for s in scores]
  right = [(a.rows[id].get("right"), b.rows[id].get("right")) for id in same]
  known = all(isinstance(side, bool) for pair in right for side in pair)
  only = [str(right.count(pair)) if known else "-" for pair in ((True, False), (False, True))]
  delta = value_of(a.metric, paired(*scores)._asdict(), sign=True)
  return [(_clipped(name, 40), a.metric, f"{len(same):,}", *means, delta, *only)], notes


def _what_differs(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
  """Returns what of run, versions, settings and metrics is not the same."""
  first, second = dict(facts(a)), dict(facts(b))
  measured = [{entry["task"]: entry["metric"] for entry in values["results"]} for values in (a, b)]
  for task in measured[0].keys() & measured[1].keys():
    first[f"metric of {task}"], second[f"metric of {task}"] = (of[task] for of in measured)
  lines = [
    f"  {key}: A {first.get(key, 'has none')}, B {second.get(key, 'has none')}"
    for key in first | second
    if first.get(key) != second.get(key)
  ]
  return ["They differ in:", *lines] if lines else ["Run, versions and settings are the same."]

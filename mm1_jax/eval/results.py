# SPDX-License-Identifier: Apache-2.0
"""What is left of an evaluation: `results.json`, and each item's answer beside it.

  results.json       run, versions, settings, and each result with its trials
  items/JOB.jsonl    a line an item: what it was asked after, the reply, the truth, its score
  replies/           what `replies` keeps; may be removed when the job is done

`results.json` has no times, so that a job that was stopped and started again leaves the same file.
"""

import dataclasses
import itertools
import json
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from mm1_jax import __version__, untrusted
from mm1_jax.eval import few_shot
from mm1_jax.eval.evaluate import (
  Job,
  Result,
  Settings,
  difference,
  mean_of_trials,
  over_trials,
)
from mm1_jax.eval.metrics.statistics import Estimate
from mm1_jax.eval.task import EvalError, Likelihood

FORMAT = 1
MAX_RESULTS_BYTES = 1 << 30
RESULTS, ITEMS, SUBMISSIONS = "results.json", "items", "submissions"
PER_ITEM = "per item"  # a difference of items' values, where their mean is no metric of the task


def to_json(results: Sequence[Result], settings: Settings, run: dict[str, Any]) -> dict[str, Any]:
  """Returns what `results.json` holds.

  Args:
    results: all of an evaluation.
    settings: what was evaluated.
    run: which model: its checkpoint, step, digest and whatever else it is known by.
  """
  return {
    "format": FORMAT,
    "run": run,
    "versions": {
      "mm1_jax": __version__,
      "jax": jax.__version__,
      "python": platform.python_version(),
    },
    "settings": dataclasses.asdict(settings),
    "results": entries(results),
  }


def entries(results: Iterable[Result]) -> list[dict[str, Any]]:
  """Returns each result with its trials as JSON; a control has its paired difference, too."""
  groups = by_trial(results)
  own = {_key(trials[0].job): trials for trials in groups if trials[0].job.control == "own"}
  return [
    _entry(trials) | {"own_minus_this": _own_minus(own.get(_key(trials[0].job, "own")), trials)}
    for trials in groups
  ]


def by_trial(results: Iterable[Result]) -> list[list[Result]]:
  """Returns results that differ in nothing but the draw of demonstrations together."""
  found: dict[Any, list[Result]] = {}
  for result in results:
    found.setdefault(_key(result.job), []).append(result)
  return list(found.values())


def _key(job: Job, control: str | None = None) -> tuple[Any, ...]:
  return job.task.name, job.form, job.split, job.shots, control or job.control


def _own_minus(own: list[Result] | None, control: list[Result]) -> dict[str, Any] | None:
  """Returns the paired difference of items' own pictures and a control, mean over trials.

  A control without trials is paired with each of them.
  """
  if own is None or control[0].job.control == "own" or control[0].scores is None:
    return None
  others = control if len(control) == len(own) else control[:1] * len(own)
  try:
    pairs = [difference(a, b) for a, b in zip(own, others, strict=True)]
  except EvalError:  # no item was scored by both
    return None
  scores = own[0].scores
  assert scores is not None
  means = {metric: value.mean for metric, value in scores.values.items()}
  metric = metric_of_items(means, scores.per_item.tolist())
  return {"metric": metric, **_estimate(mean_of_trials(pairs))}


def metric_of_items(means: Mapping[str, float | None], per_item: Sequence[float | None]) -> str:
  """Returns the metric that is the mean of items' values: the headline, where it is a mean.

  F1 is none, and POPE's items count for its accuracy.
  """
  values = np.array([np.nan if value is None else value for value in per_item], np.float64)
  values = values[np.isfinite(values)]
  for metric, mean in means.items():
    if len(values) and mean is not None and np.isclose(values.mean(), mean):
      return metric
  return PER_ITEM


def _entry(trials: list[Result]) -> dict[str, Any]:
  (job, answered, scores), *_ = trials
  return {
    "task": job.task.name,
    "title": job.task.title,
    "metric": job.task.metric,
    "split": job.split,
    "form": job.form,
    "shots": job.shots,
    "control": job.control,
    "items": len(answered),
    "values": _values(over_trials(trials)),
    "trials": [_values(t.scores.values) for t in trials if t.scores is not None],
    "counts": dict(scores.counts) if scores is not None else {},
    "dropped": [{"id": a.item.id, "problem": a.problem} for a in trials[0].dropped],
    "files": [f"{ITEMS}/{t.job.name}.jsonl" for t in trials],
  }


def _values(values: dict[str, Any]) -> dict[str, Any]:
  return {metric: _estimate(value) for metric, value in values.items()}


def _estimate(value: Estimate) -> dict[str, Any]:
  return {key: _number(x) for key, x in value._asdict().items()}


def _number(value: float) -> float | None:
  return value if math.isfinite(value) else None


def item_rows(result: Result) -> Iterable[dict[str, Any]]:
  """Yields a JSON object for each item of a result, dropped ones included."""
  scores = result.scores
  place = itertools.count()
  for answered in result.answered:
    item = answered.item
    row = {
      "id": item.id,
      "question": item.question,
      "pictures": [_picture(p) for p in item.pictures],
      "choices": list(item.choices),
      "answers": list(item.answers),
      "demonstrations": [shown.id for shown in answered.demonstrations],
    }
    if answered.reply is None:
      yield row | {"problem": answered.problem}
      continue
    at = next(place)
    row["reply"] = reply_json(answered.reply)
    if scores is not None:
      row["score"] = _number(float(scores.per_item[at]))
      row["right"] = None if scores.right is None else bool(scores.right[at])
    yield row


def _picture(picture: Any) -> str:
  return f"bytes {few_shot.identity(picture)[:16]}" if isinstance(picture, bytes) else str(picture)


def reply_json(reply: str | tuple[Likelihood, ...]) -> Any:
  if isinstance(reply, str):
    return reply
  return [[_number(one.log_prob), one.greedy, one.num_tokens] for one in reply]


def write_items(folder: epath.Path, result: Result) -> None:
  """Writes a result's items, and its official answer file if there is one."""
  lines = (json.dumps(row, ensure_ascii=False) for row in item_rows(result))
  write_whole(folder / ITEMS / f"{result.job.name}.jsonl", "".join(f"{line}\n" for line in lines))
  submission = result.job.task.submission
  if submission is not None and result.job.control == "own":
    place = folder / SUBMISSIONS / result.job.name
    place.mkdir(parents=True, exist_ok=True)
    items, replies = zip(*((a.item, a.reply) for a in result.scored), strict=True)
    submission(items, replies, place)


def write_whole(path: epath.Path, text: str) -> None:
  r"""Writes a file so that a killed process leaves it whole, or as it was.

  Halves of surrogate pairs, which JSON files can hold and UTF-8 cannot, become `\ud83d`.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  new = path.with_name(f"{path.name}.tmp")
  new.write_bytes(text.encode("utf-8", "backslashreplace"))
  new.replace(path)


def read(folder: epath.PathLike) -> dict[str, Any]:
  """Returns the `results.json` of an evaluation's folder.

  Raises:
    EvalError: there is none, or it is damaged.
  """
  path = epath.Path(folder) / RESULTS
  values = untrusted.read_object(path, EvalError, most=MAX_RESULTS_BYTES)
  if values.get("format") != FORMAT:
    raise EvalError(f"'{path}' is not of format {FORMAT}; evaluate again.")
  return values

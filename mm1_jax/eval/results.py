# SPDX-License-Identifier: Apache-2.0
"""What is left of an evaluation: `results.json`, and each item's answer beside it.

  results.json       run, versions, settings, and each result with its trials
  items/JOB.jsonl    a line an item: what it was asked after, the reply, the truth, its score
  replies/           what `replies` keeps; may be removed when the job is done

`results.json` has no times, so that a job that was stopped and started again leaves the same file.
"""

import dataclasses
import json
import math
import platform
from collections.abc import Iterable, Sequence
from typing import Any

import jax
from etils import epath

import mm1_jax
from mm1_jax.eval import few_shot
from mm1_jax.eval.evaluate import Result, Settings, over_trials
from mm1_jax.eval.task import EvalError, Likelihood

FORMAT = 1
RESULTS, ITEMS = "results.json", "items"


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
      "mm1_jax": mm1_jax.__version__,
      "jax": jax.__version__,
      "python": platform.python_version(),
    },
    "settings": dataclasses.asdict(settings),
    "results": [_result(trials) for trials in by_trial(results)],
  }


def by_trial(results: Iterable[Result]) -> list[list[Result]]:
  """Returns results that differ in nothing but the draw of demonstrations together."""
  found: dict[Any, list[Result]] = {}
  for result in results:
    key = (result.job.task.name, *result.job._replace(task=None, trial=0))  # pyright: ignore
    found.setdefault(key, []).append(result)
  return list(found.values())


def _result(trials: list[Result]) -> dict[str, Any]:
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
  return {
    metric: {key: _number(x) for key, x in value._asdict().items()}
    for metric, value in values.items()
  }


def _number(value: float) -> float | None:
  return value if math.isfinite(value) else None


def item_rows(result: Result) -> Iterable[dict[str, Any]]:
  """Yields a JSON object for each item of a result, dropped ones included."""
  place = iter(range(len(result.scored)))
  for answered in result.answered:
    item, scores = answered.item, result.scores
    row = {
      "id": item.id,
      "question": item.question,
      "pictures": [_picture(p) for p in item.pictures],
      "choices": list(item.choices),
      "answers": list(item.answers),
      "demonstrations": list(answered.demonstrations),
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
  return reply if isinstance(reply, str) else [list(likelihood) for likelihood in reply]


def write_items(folder: epath.Path, result: Result) -> None:
  """Writes a result's items, and its official answer file if there is one."""
  lines = (json.dumps(row, ensure_ascii=False) for row in item_rows(result))
  write_whole(folder / ITEMS / f"{result.job.name}.jsonl", "".join(f"{line}\n" for line in lines))
  submission = result.job.task.submission
  if submission is not None and result.job.control == "own":
    place = folder / "submissions" / result.job.name
    place.mkdir(parents=True, exist_ok=True)
    items, replies = zip(*((a.item, a.reply) for a in result.scored), strict=True)
    submission(items, replies, place)


def write_whole(path: epath.Path, text: str) -> None:
  """Writes a file so that a killed process leaves it whole, or as it was."""
  path.parent.mkdir(parents=True, exist_ok=True)
  new = path.with_name(f"{path.name}.tmp")
  new.write_text(text)
  new.replace(path)


def read(folder: epath.PathLike) -> dict[str, Any]:
  """Returns the `results.json` of an evaluation's folder.

  Raises:
    EvalError: there is none, or it is damaged.
  """
  path = epath.Path(folder) / RESULTS
  try:
    values = json.loads(path.read_text())
  except (OSError, ValueError) as e:
    raise EvalError(f"'{path}' cannot be read ({type(e).__name__}: {e}).") from e
  if not isinstance(values, dict) or values.get("format") != FORMAT:
    raise EvalError(f"'{path}' is not of format {FORMAT}; evaluate again.")
  return values

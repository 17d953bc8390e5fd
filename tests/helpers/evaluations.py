# SPDX-License-Identifier: Apache-2.0
"""Small benchmarks and their results, without a model."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image

from mm1_jax.eval.evaluate import Job, Result, Settings
from mm1_jax.eval.metrics.statistics import estimate
from mm1_jax.eval.replies import Answered
from mm1_jax.eval.results import to_json
from mm1_jax.eval.task import Form, Item, Reply, Scores, Task


def png(color: Sequence[int] = (200, 30, 30), size: tuple[int, int] = (40, 20)) -> bytes:
  data = io.BytesIO()
  PIL.Image.new("RGB", size, tuple(color)).save(data, "PNG")
  return data.getvalue()


def exact(items: Sequence[Item], replies: Sequence[Reply]) -> Scores:
  """The share of replies that are the first answer."""
  right = np.array([reply == item.answers[0] for item, reply in zip(items, replies, strict=True)])
  values = right.astype(float)
  return Scores({"accuracy": estimate(values)}, values, right, {"empty": 0})


FORM = Form(
  prompt=lambda item: [*item.pictures, f"Question:{item.question} Answer:"],
  demonstration=lambda item: f"{item.answers[0]}\n",
)


def make_task(name: str = "colors", **changes: Any) -> Task:
  task = {
    "name": name,
    "title": name.title(),
    "read": lambda folder, split: [],
    "splits": ("val", "train"),
    "split": "val",
    "forms": {"mm1": FORM, "openflamingo": FORM, "sft": FORM},
    "score": exact,
    "metric": "exact match",
    "demonstrations": "train",
  }
  return Task(**(task | changes))


def make_result(
  answered: Sequence[Answered],
  *,
  scores: Scores | None = None,
  task: Task | None = None,
  **job: Any,
) -> Result:
  """Returns a job's result: with these scores, else with the task's own."""
  task = task or make_task()
  settings = {"form": "mm1", "split": task.split, "shots": 0, "control": "own", "trial": 0} | job
  if scores is None and task.score is not None:
    scored = [a for a in answered if a.reply is not None]
    scores = task.score([a.item for a in scored], [a.reply for a in scored])  # pyright: ignore
  return Result(Job(task, **settings), list(answered), scores)


def said(replies: Sequence[str | None], truth: str = "red", **fields: Any) -> list[Answered]:
  """Returns items 0, 1, ... with one truth, and what was replied; None was not asked."""
  return [
    Answered(
      Item(str(i), f"question {i}", answers=(truth,), **fields), (), reply, "" if reply else "why"
    )
    for i, reply in enumerate(replies)
  ]


def values_of(results: Sequence[Result], run: dict[str, Any] | None = None, **settings: Any):
  """Returns `results.json`."""
  names = tuple(dict.fromkeys(result.job.task.name for result in results))
  run = {"name": "mm1_3b", "step": 7, "digest": "abc", "params": 2_900_000_000} | (run or {})
  return to_json(results, Settings(names, **settings), run)

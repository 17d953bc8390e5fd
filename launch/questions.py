# SPDX-License-Identifier: Apache-2.0
"""The demo's questions: the sample's held-out ones, by what they ask for, and the scores."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from mm1_jax.configs import common
from mm1_jax.data.build.world import ASKS
from mm1_jax.eval import tasks
from mm1_jax.eval.evaluate import Result, Settings, evaluate
from mm1_jax.eval.metrics.statistics import estimate
from mm1_jax.eval.task import Item, source
from mm1_jax.eval.tasks.scoring import is_accepted
from mm1_jax.inference.model import Model

Curves = dict[str, dict[int, float]]
TASK = "records:questions"
CONTROLS = ("own", "other", "frequent")
LONGEST = 8  # tokens of an answer, in curves
AT_ONCE = 64  # questions that are answered together


def held_out() -> list[Item]:
  """Returns the held-out questions; `source` says what one asks for, one of `ASKS`."""
  return tasks.read_items(tasks.get_task(TASK), common.SAMPLE)


def few(items: Sequence[Item], num: int) -> list[Item]:
  """Returns the first `num` items of each kind of question."""
  return [item for asks in ASKS for item in of_kind(items, asks)[:num]]


def of_kind(items: Sequence[Item], asks: str) -> list[Item]:
  return [item for item in items if source(item) == asks]


def measure(model: Model) -> list[Result]:
  """Returns the answers to all held-out questions, and those of each control."""
  settings = Settings((TASK,), form="sft", controls=CONTROLS, batch_size=AT_ONCE)
  return [*evaluate(model, settings, common.SAMPLE)]


def figures(results: Sequence[Result]) -> dict[str, dict[str, Any]]:
  """Returns the figures of each kind of question, of `measure`."""
  own, other, frequent = (_by_kind(result) for result in results)
  found = {}
  for asks in ASKS:
    right = estimate(own[asks])
    found[asks] = {
      "accuracy": right.mean,
      "standard_error": right.standard_error,
      "other_picture": estimate(other[asks]).mean,
      "most_frequent": estimate(frequent[asks]).mean,
      "n": right.n,
    }
  return found


def _by_kind(result: Result) -> dict[str, list[float]]:
  assert result.scores is not None
  found: dict[str, list[float]] = {asks: [] for asks in ASKS}
  for answered, score in zip(result.scored, result.scores.per_item, strict=True):
    found[source(answered.item)].append(score)
  return found


def answer_right(model: Model, items: Sequence[Item]) -> list[float]:
  """Returns whether a fine-tuned model answers each of some questions right."""
  asked = [[*item.pictures, item.question] for item in items]
  said = model.generate(asked, max_new_tokens=LONGEST, chat=True, batch_size=AT_ONCE)
  return [is_accepted(item, text) for item, text in zip(items, said, strict=True)]


def caption_names(model: Model, items: Sequence[Item]) -> list[float]:
  """Returns whether a pre-trained model's caption of each item's pictures has its answer."""
  shown = [[*item.pictures] for item in items]
  said = model.generate(shown, max_new_tokens=LONGEST, chat=False, batch_size=AT_ONCE)
  return [float(names(item, text)) for item, text in zip(items, said, strict=True)]


def names(item: Item, said: str) -> bool:
  """Returns whether a caption has an item's answer among its words."""
  words = said.lower()
  for mark in ".:,":
    words = words.replace(mark, " ")
  return f" {item.answers[0]} " in f" {' '.join(words.split())} "


def curves(items: Sequence[Item], points: Mapping[int, Sequence[float]]) -> Curves:
  """Returns accuracy by kind of question and step, of which of `items` were right at each step."""
  found: Curves = {}
  for step, right in points.items():
    for asks in dict.fromkeys(map(source, items)):
      group = [r for item, r in zip(items, right, strict=True) if source(item) == asks]
      found.setdefault(asks, {})[step] = float(np.mean(group))
  return found


def pixels(item: Item) -> np.ndarray:
  """Returns an item's pictures side by side with a line between them, uint8[H, W, 3]."""
  images = [np.asarray(PIL.Image.open(io.BytesIO(i)).convert("RGB")) for i in item.pictures]  # pyright: ignore
  line = np.full_like(images[0][:, :1], 200)
  return np.concatenate([part for image in images for part in (line, image)][1:], axis=1)

# SPDX-License-Identifier: Apache-2.0
"""Asks a model the sample's held-out questions, and scores its answers beside two controls."""

import collections
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from mm1_jax.config import RunConfig
from mm1_jax.data.build.world import ASKS
from mm1_jax.data.sources import Record, Source
from mm1_jax.inference.model import Model

Curves = dict[str, dict[int, float]]
SOURCE = "questions"  # name of the source in `configs/mm1_demo_sft.py`
LONGEST = 8  # tokens of an answer
AT_ONCE = 64  # questions that are answered together


@dataclasses.dataclass(frozen=True)
class Item:
  """A question about one or two pictures, and its answer."""

  asks: str  # one of `ASKS`
  images: tuple[bytes, ...]
  question: str
  answer: str


def held_out(run: RunConfig) -> list[Item]:
  """Returns the held-out questions of a fine-tuning run, one a record."""
  source = Source(next(s for s in run.data.eval_sources if s.name == SOURCE))
  return [item for i in range(len(source)) for item in read_items(source[i])]


def read_items(record: Record) -> list[Item]:
  """Returns each question of a conversation, to be asked alone, with its pictures."""
  content = [item for turn in record["turns"] for item in turn["content"]]
  images = tuple(item["image"] for item in content if "image" in item)
  texts = [item["text"] for item in content if "text" in item]
  return [
    Item(asks, images, question, answer)
    for asks, question, answer in zip(record["asks"], texts[::2], texts[1::2], strict=True)
  ]


def few(items: Sequence[Item], num: int) -> list[Item]:
  """Returns the first `num` items of each kind of question."""
  return [item for asks in ASKS for item in of_kind(items, asks)[:num]]


def of_kind(items: Sequence[Item], asks: str) -> list[Item]:
  return [item for item in items if item.asks == asks]


def ask(model: Model, items: Sequence[Item]) -> list[str]:
  """Returns the model's answers: greedy, each question in a conversation of its own."""
  return model.generate(
    [[*item.images, item.question] for item in items],
    max_new_tokens=LONGEST,
    chat=True,
    batch_size=AT_ONCE,
  )


def caption(model: Model, items: Sequence[Item]) -> list[str]:
  """Returns what a pre-trained model continues each item's pictures with, without the question."""
  return model.generate(
    [[*item.images] for item in items], max_new_tokens=LONGEST, chat=False, batch_size=AT_ONCE
  )


def with_other_pictures(items: Sequence[Item]) -> list[Item]:
  """Returns the same questions and answers, each with another item's pictures of its kind."""
  moved = {}
  for asks in ASKS:
    group = of_kind(items, asks)
    order = np.random.default_rng(0).permutation(len(group))
    for i, other in zip(order, np.roll(order, 1), strict=True):
      moved[id(group[i])] = dataclasses.replace(group[i], images=group[other].images)
  return [moved[id(item)] for item in items]


def is_right(item: Item, said: str) -> bool:
  return _plain(said) == item.answer


def names(item: Item, said: str) -> bool:
  """Returns whether a caption has an item's answer among its words."""
  return f" {item.answer} " in f" {_plain(said).replace(':', ' ').replace(',', ' ')} "


def accuracy(right: Sequence[bool]) -> tuple[float, float]:
  """Returns a share and its binomial standard error."""
  share = sum(right) / len(right)
  return share, math.sqrt(share * (1 - share) / len(right))


def score(
  items: Sequence[Item], said: Sequence[str], other: Sequence[str], frequent: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
  """Returns the figures of each kind of question.

  Args:
    items: held-out questions.
    said: the answers to them.
    other: the answers to the same questions with other pictures.
    frequent: the most frequent answer of training by kind of question.
  """
  figures = {}
  for asks in ASKS:
    rows = [(i, s, o) for i, s, o in zip(items, said, other, strict=True) if i.asks == asks]
    share, error = accuracy([is_right(i, s) for i, s, _ in rows])
    figures[asks] = {
      "accuracy": share,
      "standard_error": error,
      "other_picture": accuracy([is_right(i, o) for i, _, o in rows])[0],
      "most_frequent": accuracy([is_right(i, frequent[asks]) for i, _, _ in rows])[0],
      "n": len(rows),
    }
  return figures


def curves(items: Sequence[Item], points: Mapping[int, Sequence[bool]]) -> Curves:
  """Returns accuracy by kind of question and step, of which of `items` were right at each step."""
  found: Curves = {}
  for step, right in points.items():
    for asks in dict.fromkeys(item.asks for item in items):
      group = [r for item, r in zip(items, right, strict=True) if item.asks == asks]
      found.setdefault(asks, {})[step] = accuracy(group)[0]
  return found


def most_frequent(run: RunConfig) -> dict[str, str]:
  """Returns the most frequent answer of training by kind of question."""
  source = Source(next(s for s in run.data.leaves if s.name == SOURCE))
  counts = collections.defaultdict(collections.Counter)
  for i in range(len(source)):
    for item in read_items(source[i]):
      counts[item.asks][item.answer] += 1
  return {asks: count.most_common(1)[0][0] for asks, count in counts.items()}


def pixels(item: Item) -> np.ndarray:
  """Returns an item's pictures side by side with a line between them, uint8[H, W, 3]."""
  images = [np.asarray(PIL.Image.open(io.BytesIO(i)).convert("RGB")) for i in item.images]
  line = np.full_like(images[0][:, :1], 200)
  return np.concatenate([part for image in images for part in (line, image)][1:], axis=1)


def _plain(said: str) -> str:
  return said.strip().rstrip(".").lower()

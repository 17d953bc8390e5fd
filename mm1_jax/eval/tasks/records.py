# SPDX-License-Identifier: Apache-2.0
"""Held-out shards of a run's own data: `records:NAME` reads NAME-heldout-*.arrayrecord.

Each question of a conversation is asked by itself, after the pictures that were shown before it;
the answer is right if it is the same, case and punctuation ignored. A document that is one picture
and a text is a picture to caption. Demonstrations come from NAME-train-*.arrayrecord. Scores are
also by the records' sources.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mm1_jax.config import SourceConfig
from mm1_jax.eval.metrics.statistics import estimate
from mm1_jax.eval.task import Content, EvalError, Form, Item, Reply, Scores, Task
from mm1_jax.eval.tasks import captions, prompts, scoring

PREFIX = "records:"
SPLITS = ("heldout", "train")
CAPTION, ANSWER = "captions", "answers"


def get_task(name: str) -> Task:
  """Returns the task of `records:NAME`."""
  return Task(
    name=name,
    title=f"records of {name.removeprefix(PREFIX)}",
    read=functools.partial(read, name.removeprefix(PREFIX)),
    splits=SPLITS,
    split=SPLITS[0],
    forms=FORMS,
    score=score,
    metric=f"exact match, case and punctuation ignored; of captions {captions.METRIC}",
    demonstrations="train",
    source="python -m mm1_jax.data.build",
    files=(f"{name.removeprefix(PREFIX)}-heldout-*.arrayrecord",),
  )


def read(name: str, folder: epath.Path, split: str) -> Iterator[Item]:
  """Yields the items of shards; documents that are no captions are passed over.

  Raises:
    EvalError: there are no shards, a record is damaged, or none of them can be asked.
  """
  # Only now: Grain imports JAX, which lists of tasks can do without.
  from mm1_jax.data.sources import DataError, Source

  path = str(epath.Path(folder) / f"{name}-{split}-*.arrayrecord")
  try:
    source = Source(SourceConfig(name=name, path=path))
    records = [source[i] for i in range(len(source))]
  except DataError as e:
    raise EvalError(str(e)) from e
  found = 0
  for record in records:
    for item in _questions(record) if "turns" in record else _captions(record):
      found += 1
      yield item
  if not found:
    raise EvalError(f"none of {len(records)} records of {path} is a caption or a conversation.")


def _questions(record: Mapping[str, Any]) -> Iterator[Item]:
  """Yields an item for each answer that follows a user's turn.

  A record may say what each of its answers is about, `asks`; else its source is told.
  """
  shown: list[bytes] = []  # in turns before
  turns = record["turns"]
  pairs = [
    (asked["content"], said["content"])
    for asked, said in itertools.pairwise(turns)
    if (asked["role"], said["role"]) == ("user", "assistant")
  ]
  kinds = record.get("asks") or [record["source"]] * len(pairs)
  for number, ((asked, said), kind) in enumerate(zip(pairs, kinds, strict=True), start=1):
    content = [*shown, *(next(iter(part.values())) for part in asked)]
    shown = [part for part in content if not isinstance(part, str)]
    yield Item(
      record["id"] if len(pairs) == 1 else f"{record['id']}/{number}",
      _text(asked),
      tuple(shown),
      (_text(said).strip(),),
      details={"source": kind, "content": content, "kind": ANSWER},
    )


def _captions(record: Mapping[str, Any]) -> Iterator[Item]:
  """Yields a document that is one picture and a text."""
  content = record["content"]
  if [list(part) for part in content] == [["image"], ["text"]]:
    yield Item(
      record["id"],
      "",
      (content[0]["image"],),
      (content[1]["text"].strip(),),
      details={"source": record["source"], "kind": CAPTION},
    )


def _text(content: Sequence[Mapping[str, Any]]) -> str:
  return "".join(part.get("text", "") for part in content)


def prompt(item: Item) -> Content:
  """Returns a question's texts and pictures in their order, or a picture to caption."""
  return list(item.details.get("content", item.pictures))


def score(items: Sequence[Item], replies: Sequence[Reply]) -> Scores:
  """Returns the share of right answers, captions' CIDEr, or nats of the text, also by source."""
  if not isinstance(replies[0], str):
    return _nats(items, replies)
  if {item.details["kind"] for item in items} == {CAPTION}:
    return captions.score(items, replies)
  return _exact(items, replies)


def _nats(items: Sequence[Item], replies: Sequence[Reply]) -> Scores:
  """Returns nats per token of the texts, so that another picture can be compared with one's own."""
  own = [one for (one,) in scoring.likelihoods(items, replies)]
  nats = np.array([-one.log_prob / one.num_tokens for one in own])
  values = {"nats_per_token": estimate(nats)}
  values |= scoring.by_group("nats_per_token", nats, items, "source")
  return Scores(values, nats, np.array([one.greedy for one in own]))


_exact = scoring.mean_score({"exact_match": scoring.is_accepted}, "source")


def _said(item: Item) -> str:
  """Returns an item's true text as it follows its prompt in a document."""
  return f" {item.answers[0]}" if item.question else item.answers[0]


def _likelihood(form: Form) -> Form:
  """Returns the form that scores the true text instead of what a model says."""
  return dataclasses.replace(form, options=lambda item: [(prompt(item), _said(item))])


DOCUMENT = Form(
  prompt,
  demonstration=lambda item: f"{_said(item)}\n",
  max_new_tokens=64,
  stop=("\n",),
  clean=prompts.caption_part,
)
TURN = Form(prompt, demonstration=lambda item: item.answers[0], chat=True, max_new_tokens=64)
FORMS = {
  "mm1": DOCUMENT,
  "sft": TURN,
  "nats": _likelihood(DOCUMENT),
  "sft_nats": _likelihood(TURN),
}

# SPDX-License-Identifier: Apache-2.0
"""Held-out shards of a run's own data: `records:NAME` reads NAME-heldout-*.arrayrecord.

A conversation is asked its first question; the answer is right if it is the same, case and
punctuation ignored. A document that is one picture and a text is a
picture to caption. Demonstrations come from NAME-train-*.arrayrecord. Scores are also by the
records' sources.
"""

import dataclasses
import functools
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
    item = _conversation(record) if "turns" in record else _caption(record)
    if item is not None:
      found += 1
      yield item
  if not found:
    raise EvalError(f"none of {len(records)} records of {path} is a caption or a conversation.")


def _conversation(record: Mapping[str, Any]) -> Item | None:
  turns = [turn for turn in record["turns"] if turn["role"] != "system"]
  if [turn["role"] for turn in turns[:2]] != ["user", "assistant"]:
    return None
  content = [next(iter(part.values())) for part in turns[0]["content"]]
  return Item(
    record["id"],
    _text(turns[0]["content"]),
    tuple(part for part in content if not isinstance(part, str)),
    (_text(turns[1]["content"]).strip(),),
    details={"source": record["source"], "content": content, "kind": ANSWER},
  )


def _caption(record: Mapping[str, Any]) -> Item | None:
  content = record["content"]
  if [list(part) for part in content] != [["image"], ["text"]]:
    return None
  return Item(
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


def _likelihood(form: Form) -> Form:
  """Returns the form that scores the true text instead of what a model says."""
  return dataclasses.replace(form, options=lambda item: [(prompt(item), item.answers[0])])


DOCUMENT = Form(
  prompt,
  demonstration=lambda item: f"{item.answers[0]}\n",
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

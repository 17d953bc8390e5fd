# SPDX-License-Identifier: Apache-2.0
"""What a benchmark is: its items, the forms they can be put to a model in, and its score.

A `Task` is data. Its `read` turns official files into `Item`s; a `Form` turns an item into a prompt
and the model's reply into an answer; its `score` compares answers with the truth:

  files --read--> Item --Form.prompt--> model --reply--> Form.clean --> answer --score--> Scores

`tasks/` has one file per kind of benchmark, `tasks.TASKS` all of them by name.
"""

import dataclasses
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from mm1_jax.config import UserError
from mm1_jax.eval.metrics.statistics import Estimate

# A picture: a file, or an encoded file's bytes.
Picture = epath.Path | bytes
# Text and pictures in the order that the model reads them; a str is always text.
Content = list[str | Picture]


class EvalError(UserError):
  """Files, settings or answers that cannot be evaluated; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Item:
  """One question, picture to caption, or text.

  Attributes:
    id: unique within its split.
    question: as it is in the file; "" where there is none.
    pictures: in order of appearance.
    answers: all that are accepted or that people gave, in the file's order. Empty where the split's
      answers are not published.
    choices: of a multiple-choice question; its `answers` is then the right one's text.
    right: index of the right choice; -1 where there are none, or it is not published.
    details: what forms, metrics or reports need besides: category, hint, type of the answer. Items
      of the same "group" are only scored together; "source" says what kind of data one is of.
  """

  id: str
  question: str = ""
  pictures: tuple[Picture, ...] = ()
  answers: tuple[str, ...] = ()
  choices: tuple[str, ...] = ()
  right: int = -1
  details: Mapping[str, Any] = dataclasses.field(default_factory=lambda: types.MappingProxyType({}))


def source(item: Item) -> str:
  """Returns what kind of data an item is of; controls compare with items of the same kind."""
  return str(item.details.get("source", ""))


class Likelihood(NamedTuple):
  """How likely a continuation is after its prompt."""

  log_prob: float  # nats, summed over its tokens
  greedy: bool  # whether each of its tokens is the likeliest one after those before it
  num_tokens: int


# What a model gave for an item: its cleaned answer, or the likelihoods of its options in order.
Reply = str | tuple[Likelihood, ...]


@dataclasses.dataclass(frozen=True)
class Form:
  """How an item is put to a model, and what counts as its answer.

  Attributes:
    prompt: what the model reads of an item, without demonstrations; its reply is generated.
    options: where likelihoods are compared instead: (context, continuation) for each choice. Most
      contexts are `prompt`'s; WinoGrande's differ and share the continuation. A continuation begins
      with its own space. A task with one option scores a given continuation (LAMBADA).
    demonstration: how an item of the demonstration split continues its own prompt, up to the next
      prompt: the answer, and the separator after it.
    chat: whether the prompt is a user's turn; else it is the beginning of a document.
    max_new_tokens: of a generated reply.
    stop: texts that end a generated answer where they first appear.
    num_beams: of beam search; 1 is greedy.
    text_demonstrations: demonstrations without their pictures that a prompt of 0 shots begins with
      (OpenFlamingo's "0-shot" has 2).
    clean: a generated text becomes the answer that is scored and submitted.
  """

  prompt: Callable[[Item], Content]
  options: Callable[[Item], Sequence[tuple[Content, str]]] | None = None
  demonstration: Callable[[Item], str] | None = None
  chat: bool = False
  max_new_tokens: int = 16
  stop: tuple[str, ...] = ()
  num_beams: int = 1
  text_demonstrations: int = 0
  clean: Callable[[str, Item], str] = lambda text, item: text.strip()


class Scores(NamedTuple):
  """A task's results.

  Attributes:
    values: estimates by metric, in the metric's own unit (shares from 0 to 1, CIDEr x 100, points);
      the first is the task's headline.
    per_item: the headline's value for each item, in order: for paired differences, and for the
      page that shows the worst first. NaN where an item has none.
    right: whether each item's answer is right, where that can be said; None otherwise.
    counts: what was seen and may matter, such as answers that are neither yes nor no.
  """

  values: dict[str, Estimate]
  per_item: np.ndarray
  right: np.ndarray | None = None
  counts: dict[str, int] = {}  # noqa: RUF012


# A judged or hidden benchmark has no score here: only its answer file is written.
Score = Callable[[Sequence[Item], Sequence[Reply]], Scores]
# Writes answers in the form that the benchmark's server or judge reads; returns the files.
Submission = Callable[[Sequence[Item], Sequence[Reply], epath.Path], list[epath.Path]]


@dataclasses.dataclass(frozen=True)
class Task:
  """A benchmark.

  Attributes:
    name: on the command line.
    title: as papers call it.
    read: (folder, split) to items. Raises EvalError that names the missing file and where to get
      it, or the place in a file that is damaged.
    splits: all that `read` knows.
    split: that is evaluated by default.
    forms: by protocol: "mm1", "openflamingo" (both few-shot), "sft" (a user's turn, as lmms-eval),
      "text" (as lm-eval). The first one that fits the model is its default.
    score: answers to scores; None where only a server or a judge can score.
    metric: what the headline is, with everything that changes it (normalisation, tokenizer).
    demonstrations: split that demonstrations are drawn from; None if there are no shots.
    submission: the official answer file, if there is one.
    source: where the official files come from, for messages.
    files: what `read` needs of the default split, by official name.
  """

  name: str
  title: str
  read: Callable[[epath.Path, str], Iterable[Item]]
  splits: tuple[str, ...]
  split: str
  forms: Mapping[str, Form]
  score: Score | None
  metric: str
  demonstrations: str | None = None
  submission: Submission | None = None
  source: str = ""
  files: tuple[str, ...] = ()

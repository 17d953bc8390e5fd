# SPDX-License-Identifier: Apache-2.0
"""A file of one's own as a task: JSON lines, or a TSV of VLMEvalKit's form, by its path.

A line is one of these; pictures are paths within the file's folder:

  {"id": "1", "image": "a.jpg", "captions": ["A cat.", "A cat on a mat."]}
  {"id": "2", "images": ["a.jpg", "b.jpg"], "question": "...", "answer": "two"}
  {"id": "3", "image": "a.jpg", "question": "...", "answers": ["two", "2"]}
  {"id": "4", "question": "...", "choices": ["cat", "dog"], "answer": "dog"}

Captions are scored by CIDEr, questions by whether the reply is an accepted answer, or names the
right choice. `<image>` in a question is where a picture goes; otherwise pictures come first. The
right choice is `answer_index`, or `answer` as its text or its letter. Lines without captions may be
of several kinds; if all have choices, these can be compared by likelihood (form "text").
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from mm1_jax.eval.metrics.choices import can_infer
from mm1_jax.eval.metrics.strings import exact_match
from mm1_jax.eval.task import Content, EvalError, Form, Item, Reply, Scores, Task
from mm1_jax.eval.tasks import (
  answer_files,
  captions,
  choices,
  files,
  prompts,
  scoring,
  text,
  vlmevalkit,
)

_PLACE = re.compile(r"<image\d*>")
_KEPT = ("source", "split", "type", "subject", "level", "category", "answer_type")


def file_task(path: epath.Path) -> Task:
  """Returns the task of a file.

  Raises:
    EvalError: it is missing, or not of the form above.
  """
  items = read(path)
  captioned = _are_captions(items, path)
  return Task(
    name=path.name,
    title=path.stem,
    read=lambda folder, split: items,
    splits=("all",),
    split="all",
    forms=captions.FORMS if captioned else _forms(items),
    score=captions.score if captioned else score,
    metric=captions.METRIC if captioned else METRIC,
    demonstrations="all",
    submission=answer_files.vlmevalkit(path.stem) if path.suffix == ".tsv" else None,
    source="you",
    files=(path.name,),
  )


def read(path: epath.Path) -> list[Item]:
  if not path.exists():
    raise EvalError(f"'{path}' is not there.")
  if path.suffix == ".tsv":
    return vlmevalkit.read(path)

  def make(numbered: tuple[int, Mapping[str, Any]]) -> Iterator[Item]:
    number, row = numbered
    names = row.get("images") or ([row["image"]] if row.get("image") else [])
    pictures = tuple(files.picture(path.parent, name) for name in names)
    options = tuple(row.get("choices") or ())
    right = _right(row, options) if options else -1
    answers = (options[right],) if right >= 0 else _answers(row)
    details = {name: row[name] for name in _KEPT if row.get(name) is not None}
    question = _placed(row.get("question", ""), len(pictures))
    id = str(row.get("id", number))
    yield Item(id, question, pictures, answers, options, right, details)

  return files.items(path, enumerate(files.read_rows(path)), make)


def _answers(row: Mapping[str, Any]) -> tuple[str, ...]:
  listed = row.get("captions") or row.get("answers")
  if listed is None and "answer" in row:
    listed = [row["answer"]]
  if not listed:
    raise EvalError("it has none of captions, answers, answer")
  return tuple(listed)


def _right(row: Mapping[str, Any], options: Sequence[str]) -> int:
  if "answer_index" in row:
    return row["answer_index"]
  if row["answer"] in options:
    return options.index(row["answer"])
  return files.letter_index(row["answer"], options)


def _placed(question: str, pictures: int) -> str:
  """Returns a question with as many `<image>` as pictures, or none.

  MATH-Vision numbers them, and names parts of its one picture.
  """
  found = len(_PLACE.findall(question))
  if found < pictures:
    return _PLACE.sub("", question).strip()
  kept = iter([prompts.IMAGE] * pictures + [""] * (found - pictures))
  return _PLACE.sub(lambda _: next(kept), question).strip()


def _are_captions(items: Sequence[Item], path: epath.Path) -> bool:
  """Returns whether items have captions rather than questions.

  Raises:
    EvalError: some have, or one has neither a question nor a picture.
  """
  asked = [item.id for item in items if item.question]
  captioned = [item.id for item in items if not item.question and item.pictures]
  if len(asked) + len(captioned) < len(items):
    wrong = next(item.id for item in items if not item.question and not item.pictures)
    raise EvalError(f"'{path}': item '{wrong}' has neither a question nor a picture.")
  if asked and captioned:
    raise EvalError(
      f"'{path}': item '{asked[0]}' has a question, and '{captioned[0]}' has none, as captions "
      f"have; make a file of each kind."
    )
  return bool(captioned)


# --- Forms and score of questions ---

METRIC = (
  "accuracy: the reply is an accepted answer in any case, or names the right choice by MMBench's "
  "rules; or the likeliest choice"
)


def _forms(items: Sequence[Item]) -> dict[str, Form]:
  forms = {**prompts.vqa_shots(), "sft": prompts.chat(_text, 32)}
  if not all(item.choices for item in items):
    return forms
  if any(item.pictures for item in items):
    return {**forms, "text": _likeliest()}
  return {"text": _likeliest(), "sft": forms["sft"]}


def _text(item: Item) -> str:
  if item.choices:
    return f"{item.question}\n{prompts.lettered(item.choices)}\n{prompts.LETTER}"
  return f"{item.question}\n{prompts.SHORT}"


def _likeliest() -> Form:
  def prompt(item: Item) -> Content:
    return prompts.turn(item, f"Question: {item.question}\nAnswer:")

  return Form(prompt, lambda item: [(prompt(item), f" {choice}") for choice in item.choices])


def score(items: Sequence[Item], replies: Sequence[Reply]) -> Scores:
  """Returns accuracy, of generated replies or of likelihoods."""
  if replies and not isinstance(replies[0], str):
    return text.choice_score(items, replies)
  return scoring.mean_score({"accuracy": _is_right}, "type")(items, replies)


def _is_right(item: Item, answer: str) -> float:
  if item.choices:
    by_letter = {chr(65 + i): choice for i, choice in enumerate(item.choices)}
    return float(can_infer(answer, by_letter) == choices.letter(item))
  accepted = [truth.lower() for truth in item.answers]
  return exact_match(answer.strip().removesuffix(".").lower(), accepted, "exact")

# SPDX-License-Identifier: Apache-2.0
"""A file of one's own as a task: JSON lines, or a TSV of VLMEvalKit's form, by its path.

A line is one of these; pictures are paths within the file's folder, and further fields are kept as
details:

  {"id": "1", "image": "a.jpg", "captions": ["A cat.", "A cat on a mat."]}           CIDEr
  {"id": "2", "images": ["a.jpg", "b.jpg"], "question": "...", "answer": "two"}      exact match
  {"id": "3", "image": "a.jpg", "question": "...", "answers": ["two", "2", ...]}     one of them
  {"id": "4", "question": "...", "choices": ["cat", "dog"], "answer": "dog"}         a letter

`<image>` in a question is where a picture goes; otherwise pictures come first. The right choice is
`answer_index`, or `answer` as its text or its letter. Choices without a picture, and those of
"text" as the form, are compared by likelihood. All lines of a file are of one kind.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from mm1_jax.eval.metrics.choices import can_infer
from mm1_jax.eval.metrics.strings import exact_match
from mm1_jax.eval.task import EvalError, Form, Item, Reply, Scores, Task
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
_FIELDS = {"id", "image", "images", "captions", "question", "answer", "answers", "choices"}
_KEPT = ("source", "split", "type", "subject", "level", "category", "answer_type")


def file_task(path: epath.Path) -> Task:
  """Returns the task of a file.

  Raises:
    EvalError: it is missing, or not of the form above.
  """
  items = read(path)
  kind = kind_of(items, path)
  forms, score, metric = KINDS[kind]
  if kind == "choices" and not any(item.pictures for item in items):
    forms = {"text": forms["text"], "sft": forms["sft"]}
  return Task(
    name=path.name,
    title=path.stem,
    read=lambda folder, split: items,
    splits=("all",),
    split="all",
    forms=forms,
    score=score,
    metric=metric,
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


def kind_of(items: Sequence[Item], path: epath.Path) -> str:
  """Returns which of `KINDS` a file is.

  Raises:
    EvalError: it is of several, or has neither questions nor pictures.
  """
  kinds = {item.id: _kind(item) for item in items}
  if len(set(kinds.values())) > 1:
    first, other = dict(zip(kinds.values(), kinds, strict=True)).items()
    raise EvalError(
      f"'{path}' has items of several kinds: '{first[1]}' is of {first[0]}, '{other[1]}' of "
      f"{other[0]}. Make a file of each."
    )
  return next(iter(kinds.values()))


def _kind(item: Item) -> str:
  if item.choices:
    return "choices"
  if item.question:
    return "answers"
  if item.pictures:
    return "captions"
  raise EvalError(f"item '{item.id}' has neither a question nor a picture.")


# --- Forms and scores ---


def _letter_rule(item: Item, answer: str) -> str | None:
  return can_infer(answer, {chr(65 + i): choice for i, choice in enumerate(item.choices)})


def choice_score(items: Sequence[Item], replies: Sequence[Reply]) -> Scores:
  """Returns accuracy, of generated replies or of likelihoods."""
  if replies and not isinstance(replies[0], str):
    return text.choice_score(items, replies)
  return choices.letter_score(_letter_rule)(items, replies)


def _likeliest() -> Form:
  def prompt(item: Item):
    asked = prompts.turn(item, f"Question: {item.question}\nAnswer:")
    return asked

  return Form(prompt, lambda item: [(prompt(item), f" {choice}") for choice in item.choices])


KINDS = {
  "captions": (captions.FORMS, captions.score, captions.METRIC),
  "answers": (
    {**prompts.vqa_shots(), "sft": prompts.short_answer(32)},
    scoring.mean_score(exact_match=lambda item, answer: exact_match(answer.strip(), item.answers)),
    "exact match of an accepted answer, case and punctuation ignored",
  ),
  "choices": (
    {"sft": prompts.letter(), "text": _likeliest()},
    choice_score,
    "accuracy: MMBench's rules on a reply, or the likeliest choice",
  ),
}

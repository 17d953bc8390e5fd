# SPDX-License-Identifier: Apache-2.0
"""Documents, infographics and charts: DocVQA, InfoVQA, ChartQA."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from mm1_jax.eval.metrics.strings import anls, relaxed_accuracy
from mm1_jax.eval.task import Item, Task
from mm1_jax.eval.tasks import answer_files, files, prompts
from mm1_jax.eval.tasks.scoring import mean_score

DOCVQA = {
  "train": ("train_v1.0_withQT.json", "train_v1.0.json"),
  "val": ("val_v1.0_withQT.json", "val_v1.0.json"),
  "test": ("test_v1.0.json",),
}
INFOVQA = {
  "train": ("infographicsVQA_train_v1.0.json",),
  "val": ("infographicsVQA_val_v1.0_withQT.json", "infographicsVQA_val_v1.0.json"),
  "test": ("infographicsVQA_test_v1.0.json",),
}
CHARTQA = ("train", "val", "test")
DOCVQA_SOURCE = "https://rrc.cvc.uab.es/?ch=17&com=downloads"
CHARTQA_SOURCE = "https://github.com/vis-nlp/ChartQA (ChartQA Dataset)"


def read_documents(
  names: Mapping[str, tuple[str, ...]], pictures: tuple[str, ...], folder: epath.Path, split: str
) -> list[Item]:
  """DocVQA's form, which InfographicVQA shares."""
  path = files.find(folder, files.choose(names, split), DOCVQA_SOURCE)
  place = files.below(folder, *pictures)

  def make(q: Any) -> Iterator[Item]:
    # The path of a page begins with a folder that the archive of pictures does not have.
    name = q.get("image_local_name") or q["image"].removeprefix("documents/")
    yield Item(
      str(q["questionId"]),
      q["question"],
      (files.picture(place, name),),
      tuple(q.get("answers", ())),
    )

  return files.items(path, files.read_list(path, "data"), make)


def read_chartqa(folder: epath.Path, split: str) -> list[Item]:
  """Questions that people wrote, then those made by a program; both count alike."""
  found = {}
  for origin in ("human", "augmented"):
    name = f"{files.choose(dict.fromkeys(CHARTQA, split), split)}_{origin}.json"
    found[files.find(folder, [name, f"{split}/{name}"], CHARTQA_SOURCE)] = origin
  pictures = files.below(folder, f"{split}/png", "png")

  def rows(path: epath.Path) -> Iterator[tuple[str, int, Any]]:
    return ((found[path], number, row) for number, row in enumerate(files.read_rows(path)))

  def make(row: tuple[str, int, Any]) -> Iterator[Item]:
    origin, number, q = row
    picture = files.picture(pictures, q["imgname"])
    details = {"origin": origin}
    yield Item(f"{origin}/{number}", q["query"], (picture,), (q["label"],), details=details)

  return files.all_items(found, rows, make)


def _entry(item: Item, answer: str) -> dict[str, Any]:
  return {"questionId": answer_files.number(item.id), "answer": answer}


def _document_task(name: str, title: str, names: Mapping[str, tuple[str, ...]], place: str) -> Task:
  return Task(
    name=name,
    title=title,
    read=functools.partial(read_documents, names, (place, "documents", "images")),
    splits=tuple(names),
    split="val",
    forms={"sft": prompts.short_answer(32)},
    score=mean_score({"anls": lambda item, answer: anls(answer, item.answers)}),
    metric="ANLS, threshold 0.5",
    submission=answer_files.json_list(f"{name}_answers.json", _entry),
    source=DOCVQA_SOURCE,
    files=names["val"][:1],
  )


TASKS = (
  _document_task("docvqa", "DocVQA", DOCVQA, "spdocvqa_images"),
  _document_task("infovqa", "InfographicVQA", INFOVQA, "infographicsvqa_images"),
  Task(
    name="chartqa",
    title="ChartQA",
    read=read_chartqa,
    splits=CHARTQA,
    split="test",
    forms={"sft": prompts.chat(lambda i: f"{i.question}\nAnswer the question with a single word.")},
    score=mean_score(
      {"relaxed_accuracy": lambda item, answer: relaxed_accuracy(answer, item.answers[0])}, "origin"
    ),
    metric="relaxed accuracy: numbers within 5 %, else equal in lower case",
    source=CHARTQA_SOURCE,
    files=("test_human.json", "test_augmented.json"),
  ),
)

# SPDX-License-Identifier: Apache-2.0
"""Questions about a picture, answered in few words: VQAv2, OK-VQA, VizWiz, TextVQA, GQA."""

from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from mm1_jax.eval.metrics.vqa import vqa_accuracy
from mm1_jax.eval.task import EvalError, Item, Score, Task
from mm1_jax.eval.tasks import answer_files, files, prompts
from mm1_jax.eval.tasks.scoring import Value, is_accepted, mean_score

VQAV2 = {  # split: questions, annotations, folder of pictures
  "train": (
    "v2_OpenEnded_mscoco_train2014_questions.json",
    "v2_mscoco_train2014_annotations.json",
    "train2014",
  ),
  "val": (
    "v2_OpenEnded_mscoco_val2014_questions.json",
    "v2_mscoco_val2014_annotations.json",
    "val2014",
  ),
  "test-dev": ("v2_OpenEnded_mscoco_test-dev2015_questions.json", "", "test2015"),
  "test": ("v2_OpenEnded_mscoco_test2015_questions.json", "", "test2015"),
}
OKVQA = {
  "train": (
    "OpenEnded_mscoco_train2014_questions.json",
    "mscoco_train2014_annotations.json",
    "train2014",
  ),
  "val": (
    "OpenEnded_mscoco_val2014_questions.json",
    "mscoco_val2014_annotations.json",
    "val2014",
  ),
}
VIZWIZ = {
  split: (f"Annotations/{split}.json", f"{split}.json") for split in ("train", "val", "test")
}
TEXTVQA = {split: f"TextVQA_0.5.1_{split}.json" for split in ("train", "val", "test")}
GQA = {
  "train": "train_balanced_questions.json",
  "val": "val_balanced_questions.json",
  "testdev": "testdev_balanced_questions.json",
}
VQAV2_SOURCE = "https://visualqa.org/download.html"
OKVQA_SOURCE = "https://okvqa.allenai.org/download.html"
VIZWIZ_SOURCE = "https://vizwiz.org/tasks-and-datasets/vqa/"
TEXTVQA_SOURCE = "https://textvqa.org/dataset/"
GQA_SOURCE = "https://cs.stanford.edu/people/dorarad/gqa/download.html"


# --- Readers ---


def read_vqav2(folder: epath.Path, split: str) -> list[Item]:
  """Questions, answers of ten people, and pictures of COCO, which may be in a folder by split."""
  return _of_coco(folder, files.choose(VQAV2, split), VQAV2_SOURCE)


def read_okvqa(folder: epath.Path, split: str) -> list[Item]:
  return _of_coco(folder, files.choose(OKVQA, split), OKVQA_SOURCE)


def _of_coco(folder: epath.Path, names: tuple[str, str, str], source: str) -> list[Item]:
  questions, annotations, part = names
  path = files.find(folder, [questions], source)
  truth = _annotations(files.find(folder, [annotations], source)) if annotations else None
  pictures = files.coco_pictures(folder, part)

  def make(q: Any) -> Iterator[Item]:
    id = q["question_id"]
    if truth is not None and id not in truth:
      raise EvalError(f"question {id} is not in {annotations}")
    known = truth[id] if truth else {"answers": ()}
    yield Item(
      str(id),
      q["question"],
      (files.picture(pictures, f"COCO_{part}_{q['image_id']:012d}.jpg"),),
      tuple(answer["answer"] for answer in known["answers"]),
      details=_details(known, "answer_type", "question_type"),
    )

  return files.items(path, files.read_list(path, "questions"), make)


def _annotations(path: epath.Path) -> dict[Any, Any]:
  by_id = files.grouped(path, files.read_list(path, "annotations"), "question_id")
  if twice := [id for id, rows in by_id.items() if len(rows) > 1]:
    raise EvalError(f"'{path}' has more than one annotation of question {twice[0]}.")
  return {id: row for id, (row,) in by_id.items()}


def _details(row: Mapping[str, Any], *names: str) -> dict[str, Any]:
  return {name: row[name] for name in names if name in row}


def read_vizwiz(folder: epath.Path, split: str) -> list[Item]:
  path = files.find(folder, files.choose(VIZWIZ, split), VIZWIZ_SOURCE)
  pictures = files.below(folder, split, f"images/{split}")

  def make(q: Any) -> Iterator[Item]:
    yield Item(
      q["image"],
      q["question"],
      (files.picture(pictures, q["image"]),),
      tuple(answer["answer"] for answer in q.get("answers", ())),
      details=_details(q, "answer_type", "answerable"),
    )

  return files.items(path, files.read_rows(path), make)


def read_textvqa(folder: epath.Path, split: str) -> list[Item]:
  path = files.find(folder, [files.choose(TEXTVQA, split)], TEXTVQA_SOURCE)
  part = "test_images" if split == "test" else "train_images"
  pictures = files.below(folder, part, f"train_val_images/{part}")

  def make(q: Any) -> Iterator[Item]:
    picture = files.picture(pictures, f"{q['image_id']}.jpg")
    yield Item(str(q["question_id"]), q["question"], (picture,), tuple(q.get("answers", ())))

  return files.items(path, files.read_list(path, "data"), make)


def read_gqa(folder: epath.Path, split: str) -> list[Item]:
  path = files.find(folder, [files.choose(GQA, split), f"questions1.2/{GQA[split]}"], GQA_SOURCE)
  pictures = files.below(folder, "images")
  questions = files.read_json(path)
  if not isinstance(questions, dict):
    raise EvalError(f"'{path}' is not of the form of its benchmark: no object of questions.")

  def make(pair: tuple[str, Any]) -> Iterator[Item]:
    id, q = pair
    picture = files.picture(pictures, f"{q['imageId']}.jpg")
    answers = (q["answer"],) if "answer" in q else ()
    kind = q.get("types", {}).get("structural", "")
    yield Item(id, q["question"], (picture,), answers, details={"type": kind} if kind else {})

  return files.items(path, questions.items(), make)


# --- Scores ---


def accuracy(normalization: str) -> Value:
  return lambda item, answer: vqa_accuracy(answer, item.answers, normalization)


def _score(normalization: str, other: str = "official") -> Score:
  names = {f"accuracy_{name}": accuracy(name) for name in (normalization, other)}
  return mean_score(names, "answer_type")


def _metric(normalization: str, other: str = "official") -> str:
  return f"VQA accuracy, leave one out; answers normalised as '{normalization}', and '{other}'"


# --- Tasks ---


def _entry(item: Item, answer: str) -> dict[str, Any]:
  return {"question_id": answer_files.number(item.id), "answer": answer}


TASKS = (
  Task(
    name="vqav2",
    title="VQAv2",
    read=read_vqav2,
    splits=tuple(VQAV2),
    split="val",
    forms={**prompts.vqa_shots(), "sft": prompts.short_answer()},
    score=_score("lmms"),
    metric=_metric("lmms"),
    demonstrations="train",
    submission=answer_files.json_list("vqav2_answers.json", _entry),
    source=VQAV2_SOURCE,
    files=VQAV2["val"][:2],
  ),
  Task(
    name="okvqa",
    title="OK-VQA",
    read=read_okvqa,
    splits=tuple(OKVQA),
    split="val",
    forms={**prompts.vqa_shots(), "sft": prompts.short_answer(32, prompts.UNANSWERABLE)},
    score=_score("lmms", "textvqa"),
    metric=f"{_metric('lmms', 'textvqa')} (lmms-eval's for this set); words are not stemmed, which "
    "OpenFlamingo does",
    demonstrations="train",
    submission=None,
    source=OKVQA_SOURCE,
    files=OKVQA["val"][:2],
  ),
  Task(
    name="vizwiz",
    title="VizWiz-VQA",
    read=read_vizwiz,
    splits=tuple(VIZWIZ),
    split="val",
    forms={
      **prompts.vqa_shots(10),
      "sft": prompts.short_answer(32, prompts.UNANSWERABLE, capital=True),
    },
    score=_score("lmms", "textvqa"),
    metric=f"{_metric('lmms', 'textvqa')} (lmms-eval's for this set)",
    demonstrations="train",
    submission=answer_files.json_list(
      "vizwiz_answers.json", lambda item, answer: {"image": item.id, "answer": answer}
    ),
    source=VIZWIZ_SOURCE,
    files=VIZWIZ["val"][:1],
  ),
  Task(
    name="textvqa",
    title="TextVQA",
    read=read_textvqa,
    splits=tuple(TEXTVQA),
    split="val",
    forms={**prompts.vqa_shots(), "sft": prompts.short_answer(32, capital=True)},
    score=_score("textvqa"),
    metric=_metric("textvqa"),
    demonstrations="train",
    submission=answer_files.json_list("textvqa_answers.json", _entry),
    source=TEXTVQA_SOURCE,
    files=(TEXTVQA["val"],),
  ),
  Task(
    name="gqa",
    title="GQA",
    read=read_gqa,
    splits=tuple(GQA),
    split="testdev",
    forms={**prompts.vqa_shots(), "sft": prompts.short_answer()},
    score=mean_score({"accuracy": is_accepted}, "type"),
    metric="exact match, case and punctuation ignored",
    demonstrations="train",
    submission=answer_files.json_list(
      "gqa_answers.json", lambda item, answer: {"questionId": item.id, "prediction": answer}
    ),
    source=GQA_SOURCE,
    files=(GQA["testdev"],),
  ),
)

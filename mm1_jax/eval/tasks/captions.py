# SPDX-License-Identifier: Apache-2.0
"""Captions: COCO (Karpathy's splits), NoCaps, TextCaps."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from mm1_jax.eval.metrics.captions import bleu, cider_d
from mm1_jax.eval.metrics.statistics import Estimate, estimate
from mm1_jax.eval.task import Item, Reply, Scores, Task
from mm1_jax.eval.tasks import answer_files, files, prompts, scoring

KARPATHY = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}
NOCAPS = {"val": "nocaps_val_4500_captions.json", "test": "nocaps_test_image_info.json"}
TEXTCAPS = {
  "train": "TextCaps_0.1_train.json",
  "val": "TextCaps_0.1_val.json",
  "test": "TextCaps_0.1_test.json",
}
COCO_SOURCE = (
  "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip (pictures: train2014 "
  "and val2014 of https://cocodataset.org/#download)"
)
NOCAPS_SOURCE = "https://nocaps.org/download"
TEXTCAPS_SOURCE = "https://textvqa.org/textcaps/dataset/"
METRIC = (
  "CIDEr-D x 100 (coco-caption's, tokenizer 'ptb'); 'nlg_eval' splits at spaces and keeps case and "
  "full stops, as the package that MM1's authors are said to have used"
)


def read_coco(folder: epath.Path, split: str) -> list[Item]:
  parts = files.choose(KARPATHY, split)
  path = files.find(folder, ["dataset_coco.json"], COCO_SOURCE)
  place = functools.cache(functools.partial(files.coco_pictures, folder))

  def make(image: Any) -> Iterator[Item]:
    if image["split"] in parts:
      yield Item(
        str(image["cocoid"]),
        pictures=(files.picture(place(image["filepath"]), image["filename"]),),
        answers=tuple(sentence["raw"] for sentence in image["sentences"]),
      )

  return files.items(path, files.read_list(path, "images"), make)


def read_nocaps(folder: epath.Path, split: str) -> list[Item]:
  path = files.find(folder, [files.choose(NOCAPS, split)], NOCAPS_SOURCE)
  pictures = files.below(folder, split, f"images/{split}", "images")
  notes = files.read_list(path, "annotations") if split == "val" else []
  captions = files.grouped(path, notes, "image_id")

  def make(image: Any) -> Iterator[Item]:
    yield Item(
      str(image["id"]),
      pictures=(files.picture(pictures, image["file_name"]),),
      answers=tuple(note["caption"] for note in captions.get(image["id"], ())),
      details={"domain": image["domain"]} if image.get("domain") else {},
    )

  return files.items(path, files.read_list(path, "images"), make)


def read_textcaps(folder: epath.Path, split: str) -> list[Item]:
  """One item a picture; the file has a row for each of its captions."""
  path = files.find(folder, [files.choose(TEXTCAPS, split)], TEXTCAPS_SOURCE)
  part = "test_images" if split == "test" else "train_images"
  pictures = files.below(folder, part, f"train_val_images/{part}")
  seen: set[str] = set()

  def make(row: Any) -> Iterator[Item]:
    id = row["image_id"]
    if id not in seen:
      seen.add(id)
      picture = files.picture(pictures, f"{id}.jpg")
      yield Item(id, pictures=(picture,), answers=tuple(row.get("reference_strs") or ()))

  return files.items(path, files.read_list(path, "data"), make)


def score(items: Sequence[Item], replies: Sequence[Reply]) -> Scores:
  """Returns CIDEr-D x 100 and BLEU-4 over all pictures; CIDEr also by domain (NoCaps).

  The document frequencies are those of the pictures given. Errors of CIDEr take them as fixed;
  BLEU is of the whole corpus, and has none.
  """
  answers = scoring.texts(items, replies)
  references = [item.answers for item in items]
  ciders = 100 * cider_d(answers, references, tokenizer="ptb")
  values = {
    "cider_ptb": estimate(ciders),
    "cider_nlg_eval": estimate(100 * cider_d(answers, references, tokenizer="nlg_eval")),
    "bleu4_ptb": Estimate(bleu(answers, references, n=4, tokenizer="ptb"), np.nan, len(items)),
  }
  for domain in sorted({item.details["domain"] for item in items if "domain" in item.details}):
    own = [i for i, item in enumerate(items) if item.details.get("domain") == domain]
    of_domain = cider_d([answers[i] for i in own], [references[i] for i in own], tokenizer="ptb")
    values[f"cider_ptb/{domain}"] = estimate(100 * of_domain)
  return Scores(values, ciders, None, scoring.seen(answers))


def _entry(item: Item, answer: str) -> dict[str, Any]:
  return {"image_id": answer_files.number(item.id), "caption": answer}


FORMS = {**prompts.caption_shots(), "sft": prompts.chat(lambda item: prompts.CAPTION, 64)}

TASKS = (
  Task(
    name="coco",
    title="COCO captions (Karpathy)",
    read=read_coco,
    splits=tuple(KARPATHY),
    split="test",
    forms=FORMS,
    score=score,
    metric=METRIC,
    demonstrations="train",
    submission=answer_files.json_list("captions_test2014_mm1_jax_results.json", _entry),
    source=COCO_SOURCE,
    files=("dataset_coco.json",),
  ),
  Task(
    name="nocaps",
    title="NoCaps",
    read=read_nocaps,
    splits=tuple(NOCAPS),
    split="val",
    forms=FORMS,
    score=score,
    metric=METRIC,
    demonstrations="val",  # it has no training split
    submission=answer_files.json_list("nocaps_answers.json", _entry),
    source=NOCAPS_SOURCE,
    files=(NOCAPS["val"],),
  ),
  Task(
    name="textcaps",
    title="TextCaps",
    read=read_textcaps,
    splits=tuple(TEXTCAPS),
    split="val",
    forms=FORMS,
    score=score,
    metric=METRIC,
    demonstrations="train",
    submission=answer_files.json_list("textcaps_answers.json", _entry),
    source=TEXTCAPS_SOURCE,
    files=(TEXTCAPS["val"],),
  ),
)

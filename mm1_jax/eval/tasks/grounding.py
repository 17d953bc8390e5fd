# SPDX-License-Identifier: Apache-2.0
"""Phrases and the boxes that they refer to: RefCOCO, RefCOCO+, RefCOCOg, Flickr30k Entities.

The question is that of `mm1_jax.data.build.official`, whose answers are boxes `<x1,y1,x2,y2>`; form
"lmms_eval" asks as lmms-eval does, for shares between 0 and 1.
"""

import functools
import re
import xml.etree.ElementTree
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from mm1_jax.eval.metrics.boxes import grounding, parse_boxes, refcoco
from mm1_jax.eval.task import EvalError, Item, Task
from mm1_jax.eval.tasks import files, prompts
from mm1_jax.eval.tasks.scoring import mean_score

REFCOCO_SOURCE = (
  "https://github.com/lichengunc/refer (refcoco.zip, refcoco+.zip, refcocog.zip; pictures: COCO "
  "train2014)"
)
FLICKR_SOURCE = (
  "https://github.com/BryanPlummer/flickr30k_entities (annotations.zip, test.txt; pictures: "
  "https://shannon.cs.illinois.edu/DenotationGraph/)"
)
FLICKR = ("train", "val", "test")
LMMS_EVAL = (
  "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, "
  "bottom-right y). All values are floating point numbers bounded between 0 and 1. Please provide "
  "the bounding box coordinate of the region this sentence describes: "
)
FORMS = {
  "sft": prompts.chat(lambda i: f"Where is this in the image: {i.question}", 32),
  "lmms_eval": prompts.chat(lambda i: LMMS_EVAL + i.question, 64),
}
_ENTITY = re.compile(r"\[/EN#(\d+)/\S+ ([^\]]*)\]")  # [/EN#283585/people Two men]


# --- RefCOCO ---


def read_refcoco(name: str, refs: str, folder: epath.Path, split: str) -> list[Item]:
  """An item for each expression; `details["box"]` is in shares of width and height."""
  path = files.find(folder, [f"{name}/{refs}", refs], REFCOCO_SOURCE)
  images, boxes = _instances(files.find(path.parent, ["instances.json"], REFCOCO_SOURCE))
  pictures = files.coco_pictures(folder, "train2014")

  def make(r: Any) -> Iterator[Item]:
    if r["split"] == split:
      image, (x, y, width, height) = images[r["image_id"]], boxes[r["ann_id"]]
      size = np.array([image["width"], image["height"]] * 2)
      box = np.array([x, y, x + width, y + height]) / size
      picture = files.picture(pictures, image["file_name"])
      for i, sentence in enumerate(r["sentences"]):
        phrase, details = sentence["sent"].strip(), {"box": box}
        yield Item(f"{r['ref_id']}/{i}", phrase, (picture,), (text_of(box),), details=details)

  return files.items(path, files.read_pickle(path), make)


def _instances(path: epath.Path) -> tuple[dict[Any, Any], dict[Any, Any]]:
  """Returns pictures and boxes by their ids."""
  images = files.grouped(path, files.read_list(path, "images"), "id")
  notes = files.grouped(path, files.read_list(path, "annotations"), "id")
  return {id: row[0] for id, row in images.items()}, {id: r[0]["bbox"] for id, r in notes.items()}


def text_of(box: Sequence[float] | np.ndarray) -> str:
  """Returns a box in shares as text, from 0 to 999."""
  return f"<{','.join(str(min(max(int(1000 * value), 0), 999)) for value in box)}>"


# --- Flickr30k Entities ---


def read_flickr30k(folder: epath.Path, split: str) -> list[Item]:
  """An item for each phrase that has boxes; `details["boxes"]` are in shares, [boxes, 4]."""
  name = f"{files.choose(dict.fromkeys(FLICKR, split), split)}.txt"
  path = files.find(folder, [name], FLICKR_SOURCE)
  pictures = files.below(folder, "flickr30k-images", "flickr30k_images")

  def make(id: str) -> Iterator[Item]:
    boxes = _boxes(folder / "Annotations" / f"{id}.xml")
    text = files.read_text(folder / "Sentences" / f"{id}.txt")
    picture = files.picture(pictures, f"{id}.jpg")
    for i, sentence in enumerate(filter(None, map(str.strip, text.splitlines()))):
      for j, (entity, phrase) in enumerate(_ENTITY.findall(sentence)):
        if entity in boxes:
          of = np.array(boxes[entity])
          answers = tuple(text_of(box) for box in of)
          yield Item(f"{id}/{i}/{j}", phrase, (picture,), answers, details={"boxes": of})

  return files.items(path, files.read_text(path).split(), make)


def _boxes(path: epath.Path) -> dict[str, list[list[float]]]:
  """Returns the boxes of each entity of a picture, in shares.

  Raises:
    EvalError: the file is damaged.
  """
  try:
    root = xml.etree.ElementTree.fromstring(files.read_bytes(path))
    width, height = (int(root.findtext(f"size/{name}")) for name in ("width", "height"))  # pyright: ignore
    found: dict[str, list[list[float]]] = {}
    for thing in root.findall("object"):
      if (corners := thing.find("bndbox")) is not None:
        # Pixels are counted from 1, and the last one is of the box.
        x1, y1 = (int(corners.findtext(name)) - 1 for name in ("xmin", "ymin"))  # pyright: ignore
        x2, y2 = (int(corners.findtext(name)) for name in ("xmax", "ymax"))  # pyright: ignore
        for name in thing.findall("name"):
          box = [x1 / width, y1 / height, x2 / width, y2 / height]
          found.setdefault(str(name.text), []).append(box)
  except (xml.etree.ElementTree.ParseError, TypeError, ValueError, ZeroDivisionError) as e:
    if isinstance(e, EvalError):
      raise
    raise EvalError(f"'{path}' is not of the form of its benchmark ({e})") from e
  return found


# --- Tasks ---


def _is_box(item: Item, answer: str) -> float:
  return float(len(parse_boxes(answer)) > 0)


def _refcoco_task(name: str, title: str, refs: str, splits: tuple[str, ...]) -> Task:
  return Task(
    name=name,
    title=title,
    read=functools.partial(read_refcoco, title.lower(), refs),
    splits=splits,
    split="val",
    forms=FORMS,
    score=mean_score(
      {
        "accuracy": lambda item, answer: refcoco(answer, item.details["box"]),
        "has_a_box": _is_box,
      }
    ),
    metric="accuracy: IoU of the first box at least 0.5",
    source=REFCOCO_SOURCE,
    files=(f"{title.lower()}/{refs}", "instances.json"),
  )


TASKS = (
  _refcoco_task("refcoco", "RefCOCO", "refs(unc).p", ("train", "val", "testA", "testB")),
  _refcoco_task("refcoco_plus", "RefCOCO+", "refs(unc).p", ("train", "val", "testA", "testB")),
  _refcoco_task("refcocog", "RefCOCOg", "refs(umd).p", ("train", "val", "test")),
  Task(
    name="flickr30k",
    title="Flickr30k Entities",
    read=read_flickr30k,
    splits=FLICKR,
    split="test",
    forms=FORMS,
    score=mean_score(
      {
        "recall_any": lambda item, answer: grounding(answer, item.details["boxes"], "any"),
        "recall_merged": lambda item, answer: grounding(answer, item.details["boxes"], "merged"),
        "has_a_box": _is_box,
      }
    ),
    metric="recall at 1, IoU 0.5: with any box of the phrase, and with the box around all of them",
    source=FLICKR_SOURCE,
    files=("test.txt", "Sentences/*.txt", "Annotations/*.xml"),
  ),
)

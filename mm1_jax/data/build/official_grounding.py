# SPDX-License-Identifier: Apache-2.0
"""Official sets of phrases and the boxes that they refer to."""

import pathlib
import re
import xml.etree.ElementTree
from collections.abc import Iterator
from typing import Any

from mm1_jax.data.build.official_rows import Row, box, row

GROUNDED = "Describe the image in one sentence, with the boxes of what you mention."
_ENTITY = re.compile(r"\[/EN#(\d+)/\S+ ([^\]]*)\]")  # [/EN#283585/people Two men]


def _where(phrase: str) -> str:
  return f"Where is this in the image: {phrase}"


def visual_genome(regions: Any, images: Any) -> Iterator[Row]:
  """`region_descriptions.json` and `image_data.json`: phrase to box, or box to phrase,
  by turns of `region_id`."""
  sizes = {image["image_id"]: (image["width"], image["height"]) for image in images}
  for regions_of_image in regions:
    for r in regions_of_image["regions"]:
      corners = r["x"], r["y"], r["x"] + r["width"], r["y"] + r["height"]
      where, phrase = box(*corners, *sizes[r["image_id"]]), r["phrase"].strip()
      turns = (_where(phrase), where), (f"What is at {where}?", phrase)
      yield row(r["region_id"], f"{r['image_id']}.jpg", turns[r["region_id"] % 2])


def refcoco(refs: Any, instances: Any) -> Iterator[Row]:
  """RefCOCO, RefCOCO+ and RefCOCOg: `refs(unc).p` (or `umd`, `google`) and `instances.json`.

  What refers to an object of split `train` is a conversation: each expression is asked for its box.
  """
  images = {image["id"]: image for image in instances["images"]}
  boxes = {a["id"]: a["bbox"] for a in instances["annotations"]}
  for r in refs:
    if r["split"] == "train":
      image, (x, y, width, height) = images[r["image_id"]], boxes[r["ann_id"]]
      where = box(x, y, x + width, y + height, image["width"], image["height"])
      turns = [(_where(s["sent"].strip()), where) for s in r["sentences"]]
      yield row(r["ref_id"], image["file_name"], *turns)


def flickr30k(split: pathlib.Path) -> Iterator[Row]:
  """Flickr30k Entities: `train.txt`, beside the folders `Sentences` and `Annotations`.

  Every sentence of a picture is a conversation; a phrase is followed by the boxes that it has.
  """
  for id in split.read_text().split():
    boxes = _boxes(split.parent / "Annotations" / f"{id}.xml")
    sentences = (split.parent / "Sentences" / f"{id}.txt").read_text().splitlines()
    for i, sentence in enumerate(filter(None, map(str.strip, sentences))):
      yield row(f"{id}/{i}", f"{id}.jpg", (GROUNDED, _with_boxes(sentence, boxes)))


def _with_boxes(sentence: str, boxes: dict[str, list[str]]) -> str:
  return _ENTITY.sub(lambda entity: " ".join([entity[2], *boxes.get(entity[1], [])]), sentence)


def _boxes(path: pathlib.Path) -> dict[str, list[str]]:
  """Returns the boxes of each entity of a picture."""
  root = xml.etree.ElementTree.parse(path).getroot()

  def number(node: Any, name: str) -> int:
    return int(node.findtext(name))

  width, height = (number(root.find("size"), name) for name in ("width", "height"))
  found: dict[str, list[str]] = {}
  for thing in root.findall("object"):
    corners = thing.find("bndbox")
    if corners is not None:
      # Pixels are counted from 1, and the last one is of the box.
      x1, y1 = (number(corners, name) - 1 for name in ("xmin", "ymin"))
      x2, y2 = (number(corners, name) for name in ("xmax", "ymax"))
      for name in thing.findall("name"):
        found.setdefault(str(name.text), []).append(box(x1, y1, x2, y2, width, height))
  return found
